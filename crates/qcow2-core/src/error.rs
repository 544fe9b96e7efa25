//! The engine's error type: a kind, a message with the location, and the cause.

use crate::damage::Damage;
use crate::port::codec::CodecError;
use crate::port::resolver::ResolveError;
use crate::port::storage::{StorageError, StorageErrorKind};
use alloc::boxed::Box;
use alloc::string::String;
use core::fmt;
use qcow2_format::{FormatError, GuestOffset, HostOffset};

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
    /// The layers of a live disk are being changed already.
    Busy,
}

/// A kind of table inside an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TableKind {
    /// An L1 table, the active one or that of a snapshot.
    L1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    Snapshots,
    /// The bitmap directory.
    BitmapDirectory,
    /// The table of one bitmap.
    BitmapTable,
}

/// Where it happened, as far as that is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// The byte of the guest disk.
    pub guest: Option<GuestOffset>,
    /// The byte of the image file: the start of the table or of the data at fault.
    pub host: Option<HostOffset>,
    /// The table at fault.
    pub table: Option<TableKind>,
}

/// An engine error. `Display` prints this layer only; follow `source()` for the rest.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    /// In a box of its own, which most errors do not need: errors are returned by value everywhere.
    details: Option<Box<Details>>,
    source: Option<Box<dyn core::error::Error + Send + Sync>>,
}

#[derive(Debug, Default)]
struct Details {
    place: Place,
    damage: Option<Damage>,
    bitmap: Option<String>,
}

impl Error {
    /// An error of `kind`; `message` is lower case and says what was seen, where, and what is allowed.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), details: None, source: None }
    }

    /// Adds the underlying error.
    pub fn with_source(mut self, source: impl core::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// Adds the byte of the guest disk that it is about.
    #[must_use]
    pub fn at_guest(mut self, offset: GuestOffset) -> Self {
        self.details.get_or_insert_default().place.guest = Some(offset);
        self
    }

    /// Adds the byte of the image file that it is about.
    #[must_use]
    pub fn at_host(mut self, offset: HostOffset) -> Self {
        self.details.get_or_insert_default().place.host = Some(offset);
        self
    }

    /// Adds the kind of table that it is about.
    #[must_use]
    pub fn in_table(mut self, table: TableKind) -> Self {
        self.details.get_or_insert_default().place.table = Some(table);
        self
    }

    /// Where it happened, as far as that is known: for callers that act on it. `Display` says it too.
    pub fn place(&self) -> Place {
        self.details.as_deref().map(|details| details.place).unwrap_or_default()
    }

    /// Adds what is wrong with the image.
    #[must_use]
    pub fn with_damage(mut self, damage: Damage) -> Self {
        self.details.get_or_insert_default().damage = Some(damage);
        self
    }

    /// What is wrong with the image, where that can be said by a value.
    pub fn damage(&self) -> Option<Damage> {
        self.details.as_deref().and_then(|details| details.damage)
    }

    /// Adds the name of the bitmap that is lost by it.
    #[must_use]
    pub fn losing_bitmap(mut self, name: &str) -> Self {
        self.details.get_or_insert_default().bitmap = Some(name.into());
        self
    }

    /// The changed bitmap that could not be stored when the image was closed: the first one, if it is about
    /// that.
    pub fn lost_bitmap(&self) -> Option<&str> {
        self.details.as_deref().and_then(|details| details.bitmap.as_deref())
    }

    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The storage error among the causes, if any.
    pub fn storage_error(&self) -> Option<&StorageError> {
        find_cause(self)
    }

    /// The format error among the causes, if any.
    pub fn format_error(&self) -> Option<&FormatError> {
        find_cause(self)
    }

    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }
}

/// The first error of type `T` in `error` and its sources.
///
/// ```
/// use qcow2_core::{Error, StorageError, StorageErrorKind, find_cause};
///
/// let error = Error::from(StorageError::new(StorageErrorKind::Io, "the cable is out"));
/// assert_eq!(find_cause(&error).map(StorageError::kind), Some(StorageErrorKind::Io));
/// ```
pub fn find_cause<'a, T: core::error::Error + 'static>(
    error: &'a (dyn core::error::Error + 'static),
) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        next = error.source();
    }
    None
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
