//! The error of this crate: a kind, the file, the failed step, and the cause.

use qcow2_core::{ErrorKind as CoreKind, Place, ResolveError, StorageError, StorageErrorKind, find_cause};
use qcow2_crypt::{CryptError, CryptErrorKind};
use qcow2_io::{OpenError, OpenErrorKind, SourceError};
use qcow2_ops::{ChainError, ErrorKind as OpsKind};
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of all calls in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of error; enough to decide what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file does not exist, or no snapshot or bitmap has that name.
    NotFound,
    /// The file to create already exists, or a bitmap with that name does.
    Exists,
    /// The operating system denies access.
    PermissionDenied,
    /// The image is open in another program or as another [`Disk`](crate::Disk), or a snapshot to be deleted
    /// is open.
    InUse,
    /// The file is not an image of the expected format.
    NotAnImage,
    /// The image names another file, and the options do not allow opening it.
    NameDenied,
    /// A file that the image names cannot be opened, or the backing chain is circular or too long.
    BrokenChain,
    /// The image is encrypted, and the password is missing or wrong.
    Password,
    /// The image is damaged.
    Corrupt,
    /// This image, or this kind of disk, does not support the operation.
    Unsupported,
    /// An option's value is invalid, or excludes another option.
    InvalidOption,
    /// The range extends past the end of the disk.
    OutOfRange,
    /// The disk was opened read-only.
    ReadOnly,
    /// The file system is full. Nothing else is lost: the disk remains usable, and the same write succeeds
    /// once there is space.
    NoSpace,
    /// An earlier write to the image's metadata failed. Reads still work; changes are refused until the image
    /// is opened again.
    Poisoned,
    /// The caller asked to stop.
    Stopped,
    /// The file or the device failed.
    Io,
}

/// A failed call. `{}` prints the file and the step, `{:#}` also the causes, on one line;
/// [`source`](StdError::source) returns them one by one.
///
/// ```
/// use qcow2_image::{Disk, ErrorKind};
///
/// let error = Disk::open("no/such.qcow2").unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::NotFound);
/// assert_eq!(error.to_string(), "no/such.qcow2: opening the image");
/// # #[cfg(unix)]
/// assert!(format!("{error:#}").ends_with(": No such file or directory"));
/// ```
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    path: PathBuf,
    step: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error without a cause. `step` says what was being done and why it is not possible.
    pub(crate) fn new(kind: ErrorKind, path: &Path, step: impl Into<String>) -> Self {
        Self { kind, path: path.to_owned(), step: step.into(), source: None }
    }

    /// An error in `step` because of `cause`. The kind is derived from the cause.
    pub(crate) fn from_cause(
        path: &Path,
        step: impl Into<String>,
        cause: impl StdError + Send + Sync + 'static,
    ) -> Self {
        let kind = kind_of(&cause);
        Self { source: Some(Box::new(cause)), ..Self::new(kind, path, step) }
    }

    /// The same for a request that was refused because of one of its values, whatever the cause says about
    /// it.
    pub(crate) fn refused(
        path: &Path,
        step: impl Into<String>,
        cause: impl StdError + Send + Sync + 'static,
    ) -> Self {
        Self { kind: ErrorKind::InvalidOption, ..Self::from_cause(path, step, cause) }
    }

    /// The kind of error, for matching.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The path of the image concerned, as the caller gave it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where in the image it happened, as far as that is known.
    pub fn place(&self) -> Place {
        find_cause::<qcow2_core::Error>(self).map(qcow2_core::Error::place).unwrap_or_default()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.step)?;
        if f.alternate() {
            let mut cause = self.source();
            while let Some(error) = cause {
                write!(f, ": {error}")?;
                cause = next(error);
            }
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| &**source as _)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind {
            ErrorKind::NotFound => io::ErrorKind::NotFound,
            ErrorKind::Exists => io::ErrorKind::AlreadyExists,
            ErrorKind::PermissionDenied | ErrorKind::NameDenied => io::ErrorKind::PermissionDenied,
            ErrorKind::NotAnImage | ErrorKind::Corrupt => io::ErrorKind::InvalidData,
            ErrorKind::InvalidOption | ErrorKind::OutOfRange => io::ErrorKind::InvalidInput,
            ErrorKind::NoSpace => io::ErrorKind::StorageFull,
            ErrorKind::Unsupported => io::ErrorKind::Unsupported,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// The next cause. The chain ends at the operating system's error: its own source is the same error again,
/// with its number.
fn next<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a (dyn StdError + 'static)> {
    error.source().filter(|_| !error.is::<qcow2_io::OsError>())
}

/// The most specific kind in the chain of causes. The lowest layer that knows one wins.
fn kind_of(error: &(dyn StdError + 'static)) -> ErrorKind {
    let (mut kind, mut at) = (ErrorKind::Io, Some(error));
    while let Some(error) = at {
        if is_about_a_named_file(error) {
            return if is_denied(error) { ErrorKind::NameDenied } else { ErrorKind::BrokenChain };
        }
        kind = kind_here(error).unwrap_or(kind);
        at = error.source();
    }
    kind
}

/// True if this error and its causes concern another file that the image names.
fn is_about_a_named_file(error: &(dyn StdError + 'static)) -> bool {
    let core = error.downcast_ref::<qcow2_core::Error>().map(qcow2_core::Error::kind);
    matches!(core, Some(CoreKind::Resolve | CoreKind::Chain))
}

fn is_denied(error: &(dyn StdError + 'static)) -> bool {
    let below = error.source().and_then(|error| error.downcast_ref::<ResolveError>());
    below.is_some_and(ResolveError::is_denied)
}

/// The kind for this error alone, if there is one.
fn kind_here(error: &(dyn StdError + 'static)) -> Option<ErrorKind> {
    if let Some(error) = error.downcast_ref::<qcow2_ops::Error>() {
        return of_procedure(error.kind());
    }
    if let Some(error) = error.downcast_ref::<qcow2_core::Error>() {
        return Some(of_engine(error.kind()));
    }
    if let Some(error) = error.downcast_ref::<StorageError>() {
        return Some(of_storage(error.kind()));
    }
    if let Some(error) = error.downcast_ref::<SourceError>() {
        return match error {
            SourceError::Open(error) => Some(of_file(error.kind())),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref::<OpenError>() {
        return Some(of_file(error.kind()));
    }
    if let Some(error) = error.downcast_ref::<Error>() {
        return Some(error.kind);
    }
    if let Some(error) = error.downcast_ref::<ChainError>() {
        return Some(match error {
            ChainError::NoBase(Some(_)) => ErrorKind::NotFound,
            ChainError::NoBase(None) => ErrorKind::Unsupported,
            _ => ErrorKind::BrokenChain,
        });
    }
    if error.is::<qcow2_core::Refusal>() {
        return Some(ErrorKind::InvalidOption);
    }
    error.downcast_ref::<CryptError>().and_then(|error| of_keys(error.kind()))
}

fn of_procedure(kind: OpsKind) -> Option<ErrorKind> {
    Some(match kind {
        OpsKind::NotFound => ErrorKind::NotFound,
        OpsKind::InvalidOption => ErrorKind::InvalidOption,
        OpsKind::Unsupported => ErrorKind::Unsupported,
        OpsKind::Stopped => ErrorKind::Stopped,
        OpsKind::Metadata => ErrorKind::Corrupt,
        _ => return None,
    })
}

fn of_engine(kind: CoreKind) -> ErrorKind {
    match kind {
        CoreKind::NoSpace => ErrorKind::NoSpace,
        CoreKind::Format => ErrorKind::NotAnImage,
        CoreKind::Corrupt | CoreKind::MarkedCorrupt | CoreKind::Inconsistent => ErrorKind::Corrupt,
        CoreKind::Unsupported => ErrorKind::Unsupported,
        CoreKind::InvalidOption => ErrorKind::InvalidOption,
        CoreKind::NotFound => ErrorKind::NotFound,
        CoreKind::Exists => ErrorKind::Exists,
        CoreKind::OutOfRange => ErrorKind::OutOfRange,
        CoreKind::ReadOnly => ErrorKind::ReadOnly,
        CoreKind::Poisoned => ErrorKind::Poisoned,
        CoreKind::Encrypted => ErrorKind::Password,
        CoreKind::Stopped => ErrorKind::Stopped,
        _ => ErrorKind::Io,
    }
}

fn of_storage(kind: StorageErrorKind) -> ErrorKind {
    match kind {
        StorageErrorKind::NoSpace => ErrorKind::NoSpace,
        StorageErrorKind::ReadOnly => ErrorKind::ReadOnly,
        StorageErrorKind::Unsupported | StorageErrorKind::FixedLength(_) => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    }
}

fn of_file(kind: OpenErrorKind) -> ErrorKind {
    match kind {
        OpenErrorKind::NotFound => ErrorKind::NotFound,
        OpenErrorKind::Exists => ErrorKind::Exists,
        OpenErrorKind::Denied => ErrorKind::PermissionDenied,
        OpenErrorKind::Locked => ErrorKind::InUse,
        OpenErrorKind::NotRegular => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    }
}

fn of_keys(kind: &CryptErrorKind) -> Option<ErrorKind> {
    Some(match kind {
        CryptErrorKind::WrongPassword => ErrorKind::Password,
        CryptErrorKind::Damaged => ErrorKind::Corrupt,
        CryptErrorKind::Unsupported | CryptErrorKind::TooManyIterations => ErrorKind::Unsupported,
        CryptErrorKind::InvalidOption => ErrorKind::InvalidOption,
        CryptErrorKind::Storage | CryptErrorKind::Random => ErrorKind::Io,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn core(kind: CoreKind) -> qcow2_core::Error {
        qcow2_core::Error::new(kind, "engine")
    }

    fn check(cause: impl StdError + Send + Sync + 'static, kind: ErrorKind) {
        let error = Error::from_cause(Path::new("x"), "trying", cause);
        assert_eq!(error.kind(), kind, "{error:#}");
    }

    #[test]
    fn lowest_layer_decides_the_kind() {
        check(core(CoreKind::Poisoned), ErrorKind::Poisoned);
        let full = StorageError::new(StorageErrorKind::NoSpace, "full");
        check(core(CoreKind::Storage).with_source(full), ErrorKind::NoSpace);
        let exists =
            qcow2_ops::Error::new(OpsKind::InvalidOption, "bitmap").with_source(core(CoreKind::Exists));
        check(exists, ErrorKind::Exists);
        check(qcow2_ops::Error::new(OpsKind::Stopped, "stopped"), ErrorKind::Stopped);
        check(qcow2_ops::Error::new(OpsKind::Read, "reading"), ErrorKind::Io);
        let wrong = CryptError::new(CryptErrorKind::WrongPassword, "wrong");
        let locked = qcow2_core::UnlockError::new("locked").with_source(wrong);
        check(core(CoreKind::Encrypted).with_source(locked), ErrorKind::Password);
        let damaged = qcow2_core::UnlockError::new("locked")
            .with_source(CryptError::new(CryptErrorKind::Damaged, "damaged"));
        check(core(CoreKind::Encrypted).with_source(damaged), ErrorKind::Corrupt);
    }

    #[test]
    fn errors_of_named_files_have_their_own_kinds() {
        let missing =
            || qcow2_io::OpenFile::read_only().open(Path::new("no/such/file")).map(|_| ()).unwrap_err();
        check(missing(), ErrorKind::NotFound);
        check(SourceError::Open(missing()), ErrorKind::NotFound);
        let named = |error: ResolveError| core(CoreKind::Resolve).with_source(error);
        check(named(ResolveError::failed("base").with_source(missing())), ErrorKind::BrokenChain);
        check(named(ResolveError::denied("base")), ErrorKind::NameDenied);
        check(core(CoreKind::Chain), ErrorKind::BrokenChain);
    }
}
