//! What can go wrong with keys and their headers.

use qcow2_core::StorageError;
use std::error::Error;
use std::fmt;

/// What kind of trouble it is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CryptErrorKind {
    /// No key slot opens with this password.
    WrongPassword,
    /// The header or a key slot is damaged, or is none.
    Damaged,
    /// Something that this crate does not know: a cipher, a hash, LUKS version 2.
    Unsupported,
    /// The header asks for more key derivation rounds than the limit allows.
    TooManyIterations,
    /// Options that do not go together, or a value out of range.
    InvalidOption,
    /// A key slot is not in the state that the change needs.
    KeySlot,
    /// The storage failed; see the source.
    Storage,
    /// No random bytes could be had.
    Random,
}

/// A failed operation on keys. `Display` prints this layer only.
#[derive(Debug)]
pub struct CryptError {
    kind: CryptErrorKind,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl CryptError {
    /// An error of `kind`; `message` never holds a secret.
    pub fn new(kind: CryptErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// Adds the underlying error.
    pub fn with_source(mut self, source: impl Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// What kind of trouble it is.
    pub fn kind(&self) -> &CryptErrorKind {
        &self.kind
    }

    pub(crate) fn damaged(message: impl Into<String>) -> Self {
        Self::new(CryptErrorKind::Damaged, message)
    }

    pub(crate) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(CryptErrorKind::Unsupported, message)
    }

    pub(crate) fn option(message: impl Into<String>) -> Self {
        Self::new(CryptErrorKind::InvalidOption, message)
    }
}

impl fmt::Display for CryptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for CryptError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_ref().map(|s| &**s as _)
    }
}

impl From<StorageError> for CryptError {
    fn from(error: StorageError) -> Self {
        Self::new(CryptErrorKind::Storage, "encryption header cannot be read or written").with_source(error)
    }
}
