//! One error for the engine: a small kind, where it happened, and the cause.

use crate::port::codec::CodecError;
use crate::port::resolver::ResolveError;
use crate::port::storage::{StorageError, StorageErrorKind};
use alloc::boxed::Box;
use alloc::string::String;
use core::fmt;
use qcow2_format::FormatError;

/// The result of an engine call.
pub type Result<T, E = Error> = core::result::Result<T, E>;

/// What kind of trouble it is; enough to decide what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The storage failed; see the source.
    Storage,
    /// There is no room: in the storage, or in a table at its limit.
    NoSpace,
    /// The bytes of the image are not valid qcow2 from the start (not an image, bad header).
    Format,
    /// Metadata inside the image is damaged.
    Corrupt,
    /// The image is marked as damaged, and so is opened for reading or repair only.
    MarkedCorrupt,
    /// The image or the request needs something that is not supported, or not allowed together.
    Unsupported,
    /// An option's value is not allowed.
    InvalidOption,
    /// There is no snapshot or bitmap of that name.
    NotFound,
    /// There is a bitmap of that name already.
    Exists,
    /// A bitmap was in use when the image was last closed: its bits mean nothing.
    Inconsistent,
    /// The range passes the end of the disk.
    OutOfRange,
    /// The image was opened for reading only.
    ReadOnly,
    /// An earlier metadata write failed; the image refuses changes until it is reopened.
    Poisoned,
    /// A backing file or data file could not be opened, or may not be.
    Resolve,
    /// The chain of backing files loops or is too long.
    Chain,
    /// The image is encrypted and no key was given.
    Encrypted,
    /// The caller asked to stop; the image is whole.
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

    /// What kind of trouble it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The storage error underneath, where there is one.
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

    /// The format error underneath, where there is one.
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
