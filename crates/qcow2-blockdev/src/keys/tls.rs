//! Credentials of TLS by identifier: `tls-creds-x509,id=NAME,dir=FOLDER`.

use super::secrets::{SecretError, Secrets};
use crate::keyvalue::KeyValues;
use crate::scalar::parse_switch;
use qcow2_io::{NbdTls, OsError, TlsCredentials, TlsCredentialsError, TlsIdentity, path_of};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};

/// The end of a connection that credentials are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsEndpoint {
    /// Whoever connects.
    Client,
    /// Whoever is connected to.
    Server,
}

impl TlsEndpoint {
    fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// Credentials of TLS, and whom they are for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TlsObject {
    /// The end of the connection.
    pub endpoint: TlsEndpoint,
    /// Certificates and key.
    pub credentials: TlsCredentials,
    /// Which algorithms are allowed, in GnuTLS's language; none but `NORMAL` can be kept.
    priority: Option<String>,
}

/// Why there are no credentials. `Display` uses QEMU's text where QEMU has one.
#[derive(Debug)]
#[non_exhaustive]
pub enum TlsObjectError {
    /// The folder of the certificates is not named.
    NoFolder,
    /// A file that there must be cannot be read.
    NoAccess {
        /// The file.
        path: String,
        /// The system's answer.
        error: OsError,
    },
    /// The file has no authority's certificate.
    Authorities(String),
    /// Certificate and key cannot be used.
    Identity {
        /// Whose they are.
        endpoint: TlsEndpoint,
        /// The file of the certificate.
        certificate: String,
        /// The file of the key.
        key: String,
        /// What is wrong with them.
        error: TlsCredentialsError,
    },
    /// An encrypted private key.
    EncryptedKey(String),
    /// Anything else that is wrong with them.
    Credentials(TlsCredentialsError),
    /// A value that is neither on nor off.
    NotASwitch(&'static str),
    /// An endpoint that is neither client nor server.
    UnknownEndpoint(String),
    /// Credentials that are no certificates: the library for TLS has no others.
    OtherKind(String),
}

impl fmt::Display for TlsObjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoFolder => f.write_str("Missing 'dir' property value"),
            Self::NoAccess { path, error } => write!(f, "Unable to access credentials {path}: {error}"),
            Self::Authorities(path) => write!(f, "Unable to import CA certificate list {path}"),
            Self::Identity { endpoint, certificate, error: TlsCredentialsError::Certificate, .. } => {
                let end = endpoint.name();
                write!(f, "Unable to import {end} certificate {certificate}: {NO_CERTIFICATE}")
            }
            Self::Identity { certificate, key, error, .. } => {
                write!(f, "Cannot load certificate '{certificate}' & key '{key}': ")?;
                match error {
                    TlsCredentialsError::KeyMismatch => f.write_str(MISMATCH),
                    TlsCredentialsError::Key => f.write_str("The requested data were not available."),
                    error => error.fmt(f),
                }
            }
            Self::EncryptedKey(path) => {
                write!(f, "The private key in '{path}' is encrypted, which is not supported")
            }
            Self::Credentials(error) => error.fmt(f),
            Self::NotASwitch(key) => write!(f, "Parameter '{key}' expects 'on' or 'off'"),
            Self::UnknownEndpoint(value) => write!(f, "Parameter 'endpoint' does not accept value '{value}'"),
            Self::OtherKind(kind) => {
                write!(
                    f,
                    "{kind} is not supported: connections are encrypted by certificates (tls-creds-x509)"
                )
            }
        }
    }
}

impl std::error::Error for TlsObjectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NoAccess { error, .. } => Some(error),
            _ => None,
        }
    }
}

impl TlsObject {
    /// The object that `list` defines, whose `qom-type` begins with `tls-creds-`. Disk: reads the files of
    /// the certificates.
    pub(super) fn define(kind: &str, list: &KeyValues, secrets: &Secrets) -> Result<Self, SecretError> {
        let own: &[&str] = match kind {
            "tls-creds-x509" => &["sanity-check", "passwordid"],
            "tls-creds-psk" => &["username"],
            "tls-creds-anon" => &[],
            _ => return Err(SecretError::UnknownType(kind.to_owned())),
        };
        let knows = |key: &str| COMMON.contains(&key) || own.contains(&key);
        if let Some(pair) = list.pairs().iter().find(|pair| !knows(&pair.key)) {
            return Err(SecretError::Unexpected(pair.key.clone()));
        }
        let switch = |key: &'static str| match list.last(key).map(parse_switch) {
            None => Ok(true),
            Some(Some(value)) => Ok(value),
            Some(None) => Err(TlsObjectError::NotASwitch(key)),
        };
        let verify_peer = switch("verify-peer")?;
        switch("sanity-check")?;
        let endpoint = match list.last("endpoint") {
            None | Some("client") => TlsEndpoint::Client,
            Some("server") => TlsEndpoint::Server,
            Some(other) => return Err(TlsObjectError::UnknownEndpoint(other.to_owned()).into()),
        };
        if kind != "tls-creds-x509" {
            return Err(TlsObjectError::OtherKind(kind.to_owned()).into());
        }
        let folder = list.last("dir").ok_or(TlsObjectError::NoFolder)?;
        let mut credentials = read_folder(folder, endpoint)?;
        credentials.verify_peer = verify_peer;
        if let (Some(id), Some(_)) = (list.last("passwordid"), &credentials.identity)
            && secrets.secret(id).is_none()
        {
            return Err(SecretError::NoKey(id.to_owned()));
        }
        NbdTls::check(&credentials).map_err(|error| unusable(folder, endpoint, &credentials, error))?;
        Ok(Self { endpoint, credentials, priority: list.last("priority").map(str::to_owned) })
    }

    /// The algorithms that were asked for, where they cannot be chosen.
    pub fn other_priority(&self) -> Option<&str> {
        self.priority.as_deref().filter(|priority| *priority != "NORMAL")
    }
}

fn unusable(
    folder: &str,
    endpoint: TlsEndpoint,
    credentials: &TlsCredentials,
    error: TlsCredentialsError,
) -> TlsObjectError {
    let (certificate, key) = identity_files(folder, endpoint);
    let encrypted = |identity: &TlsIdentity| ENCRYPTED.iter().any(|mark| contains(&identity.key, mark));
    match error {
        TlsCredentialsError::Authorities => TlsObjectError::Authorities(format!("{folder}/{AUTHORITIES}")),
        TlsCredentialsError::Key if credentials.identity.as_ref().is_some_and(encrypted) => {
            TlsObjectError::EncryptedKey(key)
        }
        error @ (TlsCredentialsError::Certificate
        | TlsCredentialsError::Key
        | TlsCredentialsError::KeyMismatch) => TlsObjectError::Identity { endpoint, certificate, key, error },
        error => TlsObjectError::Credentials(error),
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

fn identity_files(folder: &str, endpoint: TlsEndpoint) -> (String, String) {
    let end = endpoint.name();
    (format!("{folder}/{end}-cert.pem"), format!("{folder}/{end}-key.pem"))
}

/// A client may do without a certificate of its own, a server may not.
fn read_folder(folder: &str, endpoint: TlsEndpoint) -> Result<TlsCredentials, TlsObjectError> {
    let mut credentials = TlsCredentials::new(read_file(&format!("{folder}/{AUTHORITIES}"))?);
    let (certificate, key) = identity_files(folder, endpoint);
    let missing = |path: &str| !path_of(path).exists();
    if endpoint == TlsEndpoint::Client && (missing(&certificate) || missing(&key)) {
        return Ok(credentials);
    }
    let (certificate, key) = (read_file(&certificate)?, read_file(&key)?);
    credentials.identity = Some(TlsIdentity { certificate, key });
    Ok(credentials)
}

fn read_file(path: &str) -> Result<Vec<u8>, TlsObjectError> {
    let mut bytes = Vec::new();
    let read = File::open(path_of(path)).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes));
    let read = match read {
        Ok(len) if len as u64 > MAX_FILE => Err(io::ErrorKind::FileTooLarge.into()),
        read => read,
    };
    match read {
        Ok(_) => Ok(bytes),
        Err(error) => Err(TlsObjectError::NoAccess { path: path.to_owned(), error: OsError::new(error) }),
    }
}

const AUTHORITIES: &str = "ca-cert.pem";
const COMMON: [&str; 6] = ["qom-type", "id", "dir", "endpoint", "verify-peer", "priority"];
/// The most that is read of a file. Origin: ours; an operating system's authorities have a quarter of it.
const MAX_FILE: u64 = 1 << 20;
/// Marks of an encrypted key.
const ENCRYPTED: [&[u8]; 2] = [b"BEGIN ENCRYPTED PRIVATE KEY", b"Proc-Type: 4,ENCRYPTED"];
const NO_CERTIFICATE: &str = "Base64 unexpected header error.";
const MISMATCH: &str = "The certificate and the given key do not match.";
