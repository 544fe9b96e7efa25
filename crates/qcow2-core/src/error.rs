//! The engine's error type: a kind, a message with the location, and the cause.

use crate::port::codec::CodecError;
use crate::port::resolver::ResolveError;
use crate::port::storage::{StorageError, StorageErrorKind};
use alloc::boxed::Box;
use alloc::string::String;
use core::fmt;
use qcow2_format::FormatError;

/// The result of an engine call.
pub type Result<T, E = Error> = core::result::Result<T, E>;

/// What kind of error it is; enough to decide what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The storage failed; see the source.
    Storage,
    /// The storage is full, or a table, a refcount or the memory for bitmaps is at its limit.
    NoSpace,
    /// Not a qcow2 image, or one with an invalid header.
    Format,
    /// Metadata inside the image is damaged.
    Corrupt,
    /// The corrupt bit is set: the image can be opened for reading or repair only.
    MarkedCorrupt,
    /// The image or the request needs a feature that is not supported, or features that exclude each other.
    Unsupported,
    /// The value of an option or argument is not allowed.
    InvalidOption,
    /// The image has no such snapshot or bitmap.
    NotFound,
    /// A bitmap of that name exists already.
    Exists,
    /// The bitmap's in-use flag was set when the image was opened: it was not stored cleanly, and its bits
    /// are invalid.
    Inconsistent,
    /// The range passes the end of the disk, or a value does not fit.
    OutOfRange,
    /// The image was opened for reading only.
    ReadOnly,
    /// An earlier metadata write failed; the image refuses changes until it is reopened.
    Poisoned,
    /// A backing file or data file was not opened: an error, or the resolver denied it.
    Resolve,
    /// The chain of backing files loops or is too long.
    Chain,
    /// The image is encrypted and could not be unlocked.
    Encrypted,
    /// The caller stopped the procedure; the image is consistent.
    Stopped,
}

/// An engine error. `Display` prints this layer only; follow `source()` for the rest.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn core::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `message` is lower case and says what was seen, where, and what is allowed.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// Adds the underlying error.
    pub fn with_source(mut self, source: impl core::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The storage error among the causes, if any.
    pub fn storage_error(&self) -> Option<&StorageError> {
        let mut at: Option<&(dyn core::error::Error + 'static)> = core::error::Error::source(self);
        while let Some(error) = at {
            if let Some(found) = error.downcast_ref::<StorageError>() {
                return Some(found);
            }
            at = error.source();
        }
        None
    }

    /// The format error among the causes, if any.
    pub fn format_error(&self) -> Option<&FormatError> {
        let mut at: Option<&(dyn core::error::Error + 'static)> = core::error::Error::source(self);
        while let Some(error) = at {
            if let Some(found) = error.downcast_ref::<FormatError>() {
                return Some(found);
            }
            at = error.source();
        }
        None
    }

    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as _)
    }
}

impl From<StorageError> for Error {
    fn from(error: StorageError) -> Self {
        let (kind, message) = match error.kind() {
            StorageErrorKind::NoSpace => (ErrorKind::NoSpace, "no space left"),
            StorageErrorKind::ReadOnly => (ErrorKind::ReadOnly, "storage is read-only"),
            _ => (ErrorKind::Storage, "storage failed"),
        };
        Self::new(kind, message).with_source(error)
    }
}

impl From<ResolveError> for Error {
    fn from(error: ResolveError) -> Self {
        Self::new(ErrorKind::Resolve, "cannot open a file that the image names").with_source(error)
    }
}

impl From<CodecError> for Error {
    fn from(error: CodecError) -> Self {
        Self::new(ErrorKind::Corrupt, "compressed cluster is damaged").with_source(error)
    }
}
