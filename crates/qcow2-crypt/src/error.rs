//! Errors of keys and LUKS headers.

use qcow2_core::StorageError;
use std::error::Error;
use std::fmt;

/// The kind of error, for matching.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CryptErrorKind {
    /// The password does not unlock any key slot.
    WrongPassword,
    /// The header or a key slot is damaged, or the bytes are no LUKS header.
    Damaged,
    /// Not implemented: the cipher, the hash, or LUKS version 2.
    Unsupported,
    /// The header demands more key derivation rounds than the limit allows.
    TooManyIterations,
    /// Incompatible options, or a value out of range.
    InvalidOption,
    /// The requested change of a key slot is refused.
    KeySlot(SlotRefusal),
    /// The storage failed; see the source.
    Storage,
    /// The random source failed.
    Random,
}

/// Why a change of key slots is refused. Nothing has been written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlotRefusal {
    /// The slot number is above 7.
    NoSuchSlot(u64),
    /// The slot to fill already holds a key.
    InUse(usize),
    /// All slots hold a key.
    AllInUse,
    /// The password given does not unlock the slot to erase.
    OtherPassword(usize),
    /// The slot to erase holds no key.
    Erased(usize),
    /// The slot to erase is the last one that holds a key.
    LastOne(usize),
    /// The password given does not unlock any slot.
    NoneOpens,
    /// The password given unlocks every slot that holds a key, so erasing them would leave none.
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

/// A failed operation on keys. `Display` prints this error without its source.
#[derive(Debug)]
pub struct CryptError {
    kind: CryptErrorKind,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
}

impl CryptError {
    /// An error of `kind`. `message` must not contain a secret.
    pub fn new(kind: CryptErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// Adds the underlying error.
    pub fn with_source(mut self, source: impl Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// The kind of error, for matching.
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
