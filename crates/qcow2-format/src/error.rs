//! What was wrong with the bytes: which field, where, what was seen and what is allowed.

use alloc::string::String;
use core::fmt;

/// What kind of trouble the bytes hold. Carries the numbers a caller needs to word its own message.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatErrorKind {
    /// The cluster size exponent is outside 9..=21 (or below 14 with extended L2 entries).
    ClusterBits(u32),
    /// The refcount width exponent is above 6.
    RefcountOrder(u32),
    /// An offset that must be cluster aligned is not.
    Misaligned(u64),
    /// A standard L2 entry has its zero flag set in a version 2 image.
    ZeroFlagInVersion2,
    /// A subcluster is both allocated and zero, or allocated in a cluster without a host offset.
    SubclusterBitmap(u64),
    /// A compressed cluster has a subcluster bitmap.
    CompressedWithBitmap(u64),
    /// A compressed cluster starts past the largest host offset that the format allows.
    CompressedOffset(u64),
}

/// Bytes that do not follow the format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError {
    kind: FormatErrorKind,
    message: String,
}

impl FormatError {
    /// An error of `kind`; `message` is lower case and says what was seen, where, and what is allowed.
    pub fn new(kind: FormatErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// What kind of trouble it is.
    pub fn kind(&self) -> &FormatErrorKind {
        &self.kind
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl core::error::Error for FormatError {}
