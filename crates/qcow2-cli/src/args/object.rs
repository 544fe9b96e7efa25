//! `--object`: secrets, by identifier.

use crate::failure::Failure;
use crate::optlist::OptList;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use qcow2_crypt::{Secret, wrap};
use std::collections::BTreeMap;
use std::fs;

/// The objects defined on the command line. Secrets are wiped from memory when they go.
#[derive(Clone, Debug, Default)]
pub(crate) struct Objects {
    secrets: BTreeMap<String, Secret>,
}

/// By identifiers alone: nothing should ever be told from comparing secrets.
impl PartialEq for Objects {
    fn eq(&self, other: &Self) -> bool {
        self.secrets.keys().eq(other.secrets.keys())
    }
}

impl Eq for Objects {}

impl Objects {
    /// Adds the object that `text` (`secret,id=NAME,data=TEXT` or `...,file=PATH`) defines. Reads the file,
    /// all of whose bytes count.
    pub(crate) fn add(&mut self, text: &str) -> Result<(), Failure> {
        let list = OptList::parse_object(text).map_err(Failure::new)?;
        let kind = list.last("qom-type").ok_or_else(|| Failure::new("Parameter 'qom-type' is missing"))?;
        if kind != "secret" {
            return Err(Failure::new(format!("Parameter 'qom-type' does not accept value '{kind}'")));
        }
        let id = list.last("id").ok_or_else(|| Failure::new("Parameter 'id' is missing"))?;
        if !is_identifier(id) {
            return Err(Failure::new("Parameter 'id' expects an identifier").hint(IDENTIFIER_HINT));
        }
        if let Some(pair) = list.pairs().iter().find(|pair| !KNOWN.contains(&&*pair.key)) {
            return Err(Failure::new(format!("Parameter '{}' is unexpected", pair.key)));
        }
        let base64 = match list.last("format") {
            None | Some("raw") => false,
            Some("base64") => true,
            Some(other) => {
                return Err(Failure::new(format!("Parameter 'format' does not accept value '{other}'")));
            }
        };
        let bytes = match (list.last("data"), list.last("file")) {
            (Some(_), Some(_)) => return Err(Failure::new("'file' and 'data' are mutually exclusive")),
            (None, None) => return Err(Failure::new("Either 'file' or 'data' must be provided")),
            (Some(data), None) => Secret::new(data.as_bytes().to_vec()),
            (None, Some(path)) => read_file(path)?,
        };
        let secret = match list.last("keyid") {
            Some(key) => self.unwrapped(key, list.last("iv"), base64, &bytes)?,
            None if base64 => decode(&bytes)?,
            None => bytes,
        };
        if self.secrets.contains_key(id) {
            return Err(Failure::new(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        self.secrets.insert(id.to_owned(), secret);
        Ok(())
    }

    /// The secret called `id`. Errors: the message.
    pub(crate) fn secret(&self, id: &str) -> Result<Secret, String> {
        self.secrets.get(id).cloned().ok_or_else(|| format!("No secret with id '{id}'"))
    }

    /// A secret that is encrypted under another one, `key`.
    fn unwrapped(
        &self,
        key: &str,
        iv: Option<&str>,
        base64: bool,
        bytes: &Secret,
    ) -> Result<Secret, Failure> {
        let key = decode(&self.secret(key).map_err(Failure::new)?)?;
        let iv = iv.ok_or_else(|| Failure::new("IV is required to decrypt secret"))?;
        let iv = decode(&Secret::new(iv.as_bytes().to_vec()))?;
        let bytes = if base64 { decode(bytes)? } else { bytes.clone() };
        wrap::unwrap(&key, iv.bytes(), &bytes).map_err(|error| Failure::new(crate::crypt::reason(&error)))
    }
}

fn read_file(path: &str) -> Result<Secret, Failure> {
    fs::read(path).map(Secret::new).map_err(|error| {
        let reason = error.raw_os_error().map_or_else(|| error.to_string(), qcow2_io::os_error_text);
        Failure::new(format!("Unable to read {path}: Failed to open file \u{201c}{path}\u{201d}: {reason}"))
    })
}

/// The message never has the text.
fn decode(text: &Secret) -> Result<Secret, Failure> {
    let packed =
        Secret::new(text.bytes().iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect());
    let bad = |_| Failure::new("The secret is not valid base64 data");
    STANDARD.decode(packed.bytes()).map(Secret::new).map_err(bad)
}

fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

const KNOWN: [&str; 7] = ["qom-type", "id", "data", "file", "format", "keyid", "iv"];
const IDENTIFIER_HINT: &str =
    "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.";

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(texts: &[&str], expected: &str) {
        let mut objects = Objects::default();
        let failure = texts.iter().find_map(|text| objects.add(text).err());
        assert_eq!(failure.map(|f| f.to_string()).unwrap_or_default(), expected);
    }

    #[test]
    fn secrets() {
        check(&["secret,id=a-b.c_9,data=x"], "");
        check(&["qom-type=secret,id=a,file=/dev/null"], "");
        check(&["secret,id=a,data=x", "secret,id=b,data=x"], "");
        check(&["secret,data=x"], "Parameter 'id' is missing");
        check(&["secret,id=-a,data=x"], "Parameter 'id' expects an identifier");
        check(&["foo,id=a"], "Parameter 'qom-type' does not accept value 'foo'");
        check(&["secret,id=a"], "Either 'file' or 'data' must be provided");
        check(&["secret,id=a,data=x,foo=y"], "Parameter 'foo' is unexpected");
        check(&["secret,id=a,data=x,format=hex"], "Parameter 'format' does not accept value 'hex'");
        check(&["secret,id=a,data=x,format=base64"], "The secret is not valid base64 data");
        check(&["secret,id=a,data=x,keyid=k"], "No secret with id 'k'");
        check(
            &["secret,id=a,data=x", "secret,id=a,data=y"],
            "attempt to add duplicate property 'a' to object (type 'container')",
        );
    }

    #[test]
    fn what_a_secret_is() {
        let mut objects = Objects::default();
        objects.add("secret,id=a,data=YWJj").unwrap();
        objects.add("secret,id=b,data=YWJj,format=base64").unwrap();
        assert_eq!(objects.secret("a").unwrap().bytes(), b"YWJj");
        assert_eq!(objects.secret("b").unwrap().bytes(), b"abc");
        assert_eq!(objects.secret("c").unwrap_err(), "No secret with id 'c'");
        assert!(!format!("{objects:?}").contains("YWJj"), "a secret is shown");
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
            let mut objects = Objects::default();
            objects.add(&format!("secret,id=a,format={format},file={}", path.display())).unwrap();
            assert_eq!(objects.secret("a").unwrap().bytes(), secret, "{bytes:?}");
        }
    }

    /// Made with OpenSSL: AES-256-CBC over "word", key 32 times 'k', iv 16 times 'i'.
    #[test]
    fn a_wrapped_secret() {
        let mut objects = Objects::default();
        objects.add("secret,id=k,data=a2tra2tra2tra2tra2tra2tra2tra2tra2tra2tra2s=").unwrap();
        let wrapped = "secret,id=w,keyid=k,iv=aWlpaWlpaWlpaWlpaWlpaQ==,format=base64,data=@";
        objects.add(&wrapped.replace('@', WRAPPED)).unwrap();
        assert_eq!(objects.secret("w").unwrap().bytes(), b"word");
    }

    const WRAPPED: &str = "A6CrpA8+vG6hKuVKhULIxw==";
}
