//! Secrets by identifier, and somebody who can be asked for others.

use super::authz::{Authorization, AuthorizationError};
use super::object::{self, NoItems};
use super::tls::{TlsObject, TlsObjectError};
use crate::driver::{ThrottleError, throttle_group};
use crate::keyvalue::KeyValueError;
use crate::tree::JsonError;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use qcow2_core::format::text::bytes_of;
use qcow2_crypt::{CryptError, Secret, wrap};
use qcow2_io::{OsError, ThrottleGroup, path_of};
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::fs;
use std::sync::Arc;

/// Somebody who knows passwords that no option names: a person at a terminal.
pub trait AskPassword: Send + Sync {
    /// Whether anybody can be asked now.
    fn is_possible(&self) -> bool;

    /// The password of the layer called `name`; `None` where nobody can be asked, or answers. Asked again, it
    /// gives the same answer without asking.
    fn ask(&self, name: &str) -> Option<Secret>;

    /// The answer for `name` was wrong.
    fn forget(&self, name: &str);
}

/// The objects that options may name: secrets, the credentials of TLS, and groups of limits. Secrets are
/// wiped from memory when they go; `Debug` shows none.
#[derive(Clone, Default)]
pub struct Secrets {
    secrets: BTreeMap<String, Secret>,
    tls: BTreeMap<String, Arc<TlsObject>>,
    throttle_groups: BTreeMap<String, Arc<ThrottleGroup>>,
    authorizations: BTreeMap<String, Arc<Authorization>>,
    asked: Option<Arc<dyn AskPassword>>,
}

/// Why there is no password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoSecret {
    /// There is no secret of this name.
    Missing(String),
    /// The secret of this name is not UTF-8, or has a zero byte.
    NoText(String),
}

impl fmt::Display for NoSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(id) => write!(f, "there is no secret '{id}'"),
            Self::NoText(id) => write!(f, "secret '{id}' is not UTF-8 without zero bytes, as passwords are"),
        }
    }
}

impl Error for NoSecret {}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.secrets.keys()).finish()
    }
}

impl Secrets {
    /// None yet; `asked` is asked where no option names one.
    pub fn asking(asked: Arc<dyn AskPassword>) -> Self {
        Self { asked: Some(asked), ..Self::default() }
    }

    /// Adds `secret` under `id`. Errors: there is one already.
    pub fn add(&mut self, id: &str, secret: Secret) -> Result<(), SecretError> {
        self.check_free(id)?;
        self.secrets.insert(id.to_owned(), secret);
        Ok(())
    }

    /// Adds the object that `text` defines: a secret, or a group of limits for `throttle` nodes
    /// (`throttle-group,id=NAME,x-iops-total=N` and so on), which has its clock from now on.
    ///
    /// Of a secret, `text` (`secret,id=NAME,data=TEXT` or `...,file=PATH`) has the bytes as they stand, or in
    /// `format=base64`, or encrypted under another one (`keyid=NAME,iv=BASE64`). Disk: reads the file, all of
    /// whose bytes count. `tls-creds-x509,id=NAME,dir=FOLDER` defines credentials of TLS, whose files are
    /// read, `authz-simple` and `authz-list` say which names in certificates a server accepts.
    ///
    /// All that may be a JSON object instead (`{"qom-type": "secret", ...}`). A lone item `help` gets
    /// [`SecretError::Help`].
    ///
    /// ```
    /// let mut secrets = qcow2_blockdev::Secrets::default();
    /// secrets.define("secret,id=disk,data=c2VzYW1l,format=base64")?;
    /// assert_eq!(secrets.secret("disk").map(|secret| secret.bytes().to_vec()), Some(b"sesame".to_vec()));
    /// # Ok::<(), qcow2_blockdev::SecretError>(())
    /// ```
    pub fn define(&mut self, text: &str) -> Result<(), SecretError> {
        let list = object::items(text)?;
        let kind = list.last("qom-type").ok_or(SecretError::Missing("qom-type"))?;
        let (is_group, is_authorization) = (kind == "throttle-group", kind.starts_with("authz-"));
        if kind != "secret" && !is_group && !is_authorization && !kind.starts_with("tls-creds-") {
            return Err(SecretError::UnknownType(kind.to_owned()));
        }
        let id = list.last("id").ok_or(SecretError::Missing("id"))?;
        if !is_identifier(id) {
            return Err(SecretError::NotAnIdentifier(id.to_owned()));
        }
        if is_group {
            let group = throttle_group(&list)?;
            self.check_free(id)?;
            self.throttle_groups.insert(id.to_owned(), Arc::new(group));
            return Ok(());
        }
        if is_authorization {
            let authorization = Arc::new(Authorization::define(kind, &list, text)?);
            self.check_free(id)?;
            self.authorizations.insert(id.to_owned(), authorization);
            return Ok(());
        }
        if kind != "secret" {
            let object = Arc::new(TlsObject::define(kind, &list, self)?);
            self.check_free(id)?;
            self.tls.insert(id.to_owned(), object);
            return Ok(());
        }
        if let Some(pair) = list.pairs().iter().find(|pair| !KNOWN.contains(&&*pair.key)) {
            return Err(SecretError::Unexpected(pair.key.clone()));
        }
        let base64 = match list.last("format") {
            None | Some("raw") => false,
            Some("base64") => true,
            Some(other) => return Err(SecretError::UnknownFormat(other.to_owned())),
        };
        let bytes = match (list.last("data"), list.last("file")) {
            (Some(_), Some(_)) => return Err(SecretError::DataAndFile),
            (None, None) => return Err(SecretError::NoData),
            (Some(data), None) => Secret::new(bytes_of(data).into_owned()),
            (None, Some(path)) => read_file(path)?,
        };
        let secret = match list.last("keyid") {
            Some(key) => self.unwrapped(key, list.last("iv"), base64, &bytes)?,
            None if base64 => decode(&bytes)?,
            None => bytes,
        };
        self.add(id, secret)
    }

    /// The secret called `id`, if there is one.
    pub fn secret(&self, id: &str) -> Option<Secret> {
        self.secrets.get(id).cloned()
    }

    /// The secret called `id` as a password, which is text. Errors: there is none, or it is no text.
    pub fn password(&self, id: &str) -> Result<Secret, NoSecret> {
        let secret = self.secret(id).ok_or_else(|| NoSecret::Missing(id.to_owned()))?;
        match std::str::from_utf8(secret.bytes()) {
            // As in QEMU, for which a text ends at a zero byte.
            Ok(text) if !text.contains('\0') => Ok(secret),
            _ => Err(NoSecret::NoText(id.to_owned())),
        }
    }

    /// The group of limits called `id`, if there is one.
    pub(crate) fn throttle_group(&self, id: &str) -> Option<Arc<ThrottleGroup>> {
        self.throttle_groups.get(id).cloned()
    }

    /// The credentials of TLS called `id`, if there are such.
    pub fn tls(&self, id: &str) -> Option<Arc<TlsObject>> {
        self.tls.get(id).cloned()
    }

    /// The authorization called `id`, if there is one.
    pub fn authorization(&self, id: &str) -> Option<Arc<Authorization>> {
        self.authorizations.get(id).cloned()
    }

    /// Whether an object of any kind is called `id`.
    pub fn has(&self, id: &str) -> bool {
        self.secrets.contains_key(id)
            || self.tls.contains_key(id)
            || self.throttle_groups.contains_key(id)
            || self.authorizations.contains_key(id)
    }

    /// One identifier is one object, whatever its kind.
    fn check_free(&self, id: &str) -> Result<(), SecretError> {
        if self.has(id) { Err(SecretError::Exists(id.to_owned())) } else { Ok(()) }
    }

    pub(crate) fn can_ask(&self) -> bool {
        self.asked.as_ref().is_some_and(|asked| asked.is_possible())
    }

    pub(crate) fn ask(&self, name: &str) -> Option<Secret> {
        self.asked.as_ref().and_then(|asked| asked.ask(name))
    }

    pub(crate) fn forget(&self, name: &str) {
        self.asked.iter().for_each(|asked| asked.forget(name));
    }

    /// A secret that is encrypted under another one, `key`.
    fn unwrapped(
        &self,
        key: &str,
        iv: Option<&str>,
        base64: bool,
        bytes: &Secret,
    ) -> Result<Secret, SecretError> {
        let key = decode(&self.secret(key).ok_or_else(|| SecretError::NoKey(key.to_owned()))?)?;
        let iv = iv.ok_or(SecretError::NoIv)?;
        let iv = decode(&Secret::new(iv.as_bytes().to_vec()))?;
        let bytes = if base64 { decode(bytes)? } else { bytes.clone() };
        wrap::unwrap(&key, iv.bytes(), &bytes).map_err(SecretError::Wrapped)
    }
}

fn read_file(path: &str) -> Result<Secret, SecretError> {
    fs::read(path_of(path)).map(Secret::new).map_err(|error| {
        let (path, error) = (path.to_owned(), OsError::new(error));
        SecretError::Unreadable { path, error }
    })
}

fn decode(text: &Secret) -> Result<Secret, SecretError> {
    let packed =
        Secret::new(text.bytes().iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect());
    // What was wrong with it is part of the secret.
    STANDARD.decode(packed.bytes()).map(Secret::new).map_err(|_| SecretError::NotBase64)
}

fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

const KNOWN: [&str; 7] = ["qom-type", "id", "data", "file", "format", "keyid", "iv"];

/// Why a text defines no secret. No text of a secret is in it.
#[derive(Debug)]
#[non_exhaustive]
pub enum SecretError {
    /// It defines nothing but asks what can be defined, or what a kind of object has: the answer.
    Help(String),
    /// The text is not a list of `key=value`.
    Syntax(KeyValueError),
    /// The text begins like JSON, and is not one object.
    Json(JsonError),
    /// In JSON, this item has a value of another type than this one.
    WrongType(String, &'static str),
    /// An item that there must be.
    Missing(&'static str),
    /// Something else than a secret or a group of limits.
    UnknownType(String),
    /// An identifier begins with a letter and has letters, digits, `-`, `.` and `_`.
    NotAnIdentifier(String),
    /// An item that is not known.
    Unexpected(String),
    /// A format that is neither raw nor base64.
    UnknownFormat(String),
    /// The secret is given in two ways.
    DataAndFile,
    /// The secret is not given.
    NoData,
    /// Its file cannot be read.
    Unreadable {
        /// The file.
        path: String,
        /// The system's answer.
        error: OsError,
    },
    /// It is encrypted under a secret that there is not.
    NoKey(String),
    /// It is encrypted, and the initialization vector is missing.
    NoIv,
    /// It is not base64.
    NotBase64,
    /// It cannot be decrypted.
    Wrapped(CryptError),
    /// Limits that are none.
    Throttle(ThrottleError),
    /// The identifier is taken.
    Exists(String),
    /// It defines credentials of TLS, and there are none.
    Tls(TlsObjectError),
    /// It defines who may connect, and does not say it.
    Authorization(AuthorizationError),
}

impl fmt::Display for SecretError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Help(text) => f.write_str(text),
            Self::Syntax(error) => error.fmt(f),
            Self::Json(error) => error.fmt(f),
            Self::WrongType(key, kind) => write!(f, "the value of '{key}' is not of the type {kind}"),
            Self::Missing(key) => write!(f, "the definition lacks '{key}'"),
            Self::UnknownType(kind) => {
                write!(
                    f,
                    "'{kind}' is not a kind of object (secret, throttle-group, tls-creds-x509, authz-list)"
                )
            }
            Self::NotAnIdentifier(id) => write!(f, "'{id}' is not an identifier"),
            Self::Unexpected(key) => write!(f, "a secret has no '{key}'"),
            Self::UnknownFormat(format) => {
                write!(f, "the format of a secret is raw or base64, not '{format}'")
            }
            Self::DataAndFile => f.write_str("the secret is given both as data and as a file"),
            Self::NoData => f.write_str("the secret is given neither as data nor as a file"),
            Self::Unreadable { path, error } => write!(f, "the secret in '{path}' cannot be read: {error}"),
            Self::NoKey(id) => write!(f, "there is no secret '{id}' to decrypt with"),
            Self::NoIv => f.write_str("the initialization vector of an encrypted secret is missing"),
            Self::NotBase64 => f.write_str("the secret is not base64"),
            Self::Wrapped(error) => error.fmt(f),
            Self::Throttle(error) => error.fmt(f),
            Self::Exists(id) => write!(f, "there is an object '{id}' already"),
            Self::Tls(error) => error.fmt(f),
            Self::Authorization(error) => error.fmt(f),
        }
    }
}

impl Error for SecretError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unreadable { error, .. } => error.source(),
            Self::Wrapped(error) => error.source(),
            Self::Tls(error) => error.source(),
            _ => None,
        }
    }
}

impl From<NoItems> for SecretError {
    fn from(error: NoItems) -> Self {
        match error {
            NoItems::Empty => Self::Missing("qom-type"),
            NoItems::Help(text) => Self::Help(text),
            NoItems::Syntax(error) => Self::Syntax(error),
            NoItems::Json(error) => Self::Json(error),
            NoItems::WrongType(key, kind) => Self::WrongType(key, kind),
        }
    }
}

impl From<ThrottleError> for SecretError {
    fn from(error: ThrottleError) -> Self {
        Self::Throttle(error)
    }
}

impl From<AuthorizationError> for SecretError {
    fn from(error: AuthorizationError) -> Self {
        Self::Authorization(error)
    }
}

impl From<TlsObjectError> for SecretError {
    fn from(error: TlsObjectError) -> Self {
        Self::Tls(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong with the first of `texts` that is not taken.
    fn refused(texts: &[&str]) -> Option<SecretError> {
        let mut secrets = Secrets::default();
        texts.iter().find_map(|text| secrets.define(text).err())
    }

    #[test]
    fn a_password_is_text() {
        let mut secrets = Secrets::default();
        for (id, bytes) in [("text", &b"p\xc3\xa4ss\n"[..]), ("zero", b"a\0b"), ("bytes", b"\xff\xfe\x01")] {
            secrets.add(id, Secret::new(bytes.to_vec())).unwrap();
        }
        assert_eq!(secrets.password("text").unwrap().bytes(), b"p\xc3\xa4ss\n");
        for id in ["zero", "bytes"] {
            assert_eq!(secrets.password(id).err(), Some(NoSecret::NoText(id.to_owned())));
        }
        assert_eq!(secrets.password("none").err(), Some(NoSecret::Missing("none".to_owned())));
    }

    #[test]
    fn secrets() {
        use SecretError as E;
        assert!(refused(&["secret,id=a-b.c_9,data=x"]).is_none());
        assert!(refused(&["qom-type=secret,id=a,file=/dev/null"]).is_none());
        assert!(refused(&["secret,id=a,data=x", "secret,id=b,data=x"]).is_none());
        assert!(matches!(refused(&["id=a,data=x"]), Some(E::Missing("qom-type"))));
        assert!(matches!(refused(&["secret,data=x"]), Some(E::Missing("id"))));
        assert!(matches!(refused(&["secret,id=-a,data=x"]), Some(E::NotAnIdentifier(_))));
        assert!(matches!(refused(&["foo,id=a"]), Some(E::UnknownType(kind)) if kind == "foo"));
        assert!(matches!(refused(&["secret,id=a"]), Some(E::NoData)));
        assert!(matches!(refused(&["secret,id=a,data=x,file=y"]), Some(E::DataAndFile)));
        assert!(matches!(refused(&["secret,id=a,data=x,foo=y"]), Some(E::Unexpected(key)) if key == "foo"));
        assert!(matches!(refused(&["secret,id=a,data=x,format=hex"]), Some(E::UnknownFormat(_))));
        assert!(matches!(refused(&["secret,id=a,data=x,format=base64"]), Some(E::NotBase64)));
        assert!(matches!(refused(&["secret,id=a,data=x,keyid=k"]), Some(E::NoKey(id)) if id == "k"));
        assert!(matches!(refused(&["secret,id=a,file=/no/such"]), Some(E::Unreadable { .. })));
        assert!(
            matches!(refused(&["secret,id=a,data=x", "secret,id=a,data=y"]), Some(E::Exists(id)) if id == "a")
        );
    }

    #[test]
    fn what_a_secret_is() {
        let mut secrets = Secrets::default();
        secrets.define("secret,id=a,data=YWJj").unwrap();
        secrets.define("secret,id=b,data=YWJj,format=base64").unwrap();
        assert_eq!(secrets.secret("a").unwrap().bytes(), b"YWJj");
        assert_eq!(secrets.secret("b").unwrap().bytes(), b"abc");
        assert!(secrets.secret("c").is_none());
        assert!(!format!("{secrets:?}").contains("YWJj"), "a secret is shown");
    }

    #[test]
    fn every_byte_of_a_secret_file_is_the_secret() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("word");
        for (bytes, format, secret) in [
            (&b"xyzzy\n"[..], "raw", &b"xyzzy\n"[..]),
            (b"xyzzy\r\n", "raw", b"xyzzy\r\n"),
            (b" xy\0zzy ", "raw", b" xy\0zzy "),
            (b"\n", "raw", b"\n"),
            (b"", "raw", b""),
            // Around base64 white space is no part of it.
            (b"eHl6enk=\n", "base64", b"xyzzy"),
        ] {
            fs::write(&path, bytes).unwrap();
            let mut secrets = Secrets::default();
            secrets.define(&format!("secret,id=a,format={format},file={}", path.display())).unwrap();
            assert_eq!(secrets.secret("a").unwrap().bytes(), secret, "{bytes:?}");
        }
    }

    /// Made with OpenSSL: AES-256-CBC over "word", key 32 times 'k', iv 16 times 'i'.
    #[test]
    fn a_wrapped_secret() {
        let mut secrets = Secrets::default();
        secrets.define("secret,id=k,data=a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=").unwrap();
        let wrapped = "secret,id=w,keyid=k,iv=aWlpaWlpaWlpaWlpaWlpaQ==,format=base64,data=@";
        secrets.define(&wrapped.replace('@', WRAPPED)).unwrap();
        assert_eq!(secrets.secret("w").unwrap().bytes(), b"word");
    }

    const WRAPPED: &str = "A6CrpA8+vG6hKuVKhULIxw==";
}
