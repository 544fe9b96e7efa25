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
    /// A key slot is not changed as asked for.
    KeySlot(SlotRefusal),
    /// The storage failed; see the source.
    Storage,
    /// No random bytes could be had.
    Random,
}

/// Why key slots are not changed; they are as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlotRefusal {
    /// There are eight.
    NoSuchSlot(u64),
    /// The slot to fill holds a key.
    InUse(usize),
    /// No slot is free.
    AllInUse,
    /// The slot to erase does not open with the password that was given.
    OtherPassword(usize),
    /// The slot to erase holds no key.
    Erased(usize),
    /// The slot to erase is the only one with a key.
    LastOne(usize),
    /// No slot opens with the password that was given.
    NoneOpens,
    /// All slots that hold a key open with the password that was given.
    AllOpen,
}

impl fmt::Display for SlotRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchSlot(index) => write!(f, "key slot {index}: allowed are 0 to 7"),
            Self::InUse(index) => write!(f, "key slot {index} is in use"),
            Self::AllInUse => f.write_str("all key slots are in use"),
            Self::OtherPassword(index) => write!(f, "the password does not open key slot {index}"),
            Self::Erased(index) => write!(f, "key slot {index} holds no key"),
            Self::LastOne(index) => write!(f, "key slot {index} is the only one with a key"),
            Self::NoneOpens => f.write_str("the password opens no key slot"),
            Self::AllOpen => f.write_str("the password opens every key slot that is left"),
        }
    }
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

impl From<SlotRefusal> for CryptError {
    fn from(refusal: SlotRefusal) -> Self {
        Self::new(CryptErrorKind::KeySlot(refusal), refusal.to_string())
    }
}

impl From<StorageError> for CryptError {
    fn from(error: StorageError) -> Self {
        Self::new(CryptErrorKind::Storage, "encryption header cannot be read or written").with_source(error)
    }
}
