//! Options for opening a file as a storage: access, creation, cache mode, locking.

use crate::direct::DirectIo;
use crate::error::OsError;
use crate::file::FileStorage;
use crate::layer::CacheMode;
use crate::lock::{Access, LockConflict, LockError, Locking, lock_image};
use crate::open_files::{HeldFile, OpenFiles, SameFile};
use crate::sys;
use qcow2_core::Storage;
use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What opening does if the file is missing or exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Create {
    /// Opens an existing file; a missing one is an error.
    #[default]
    Never,
    /// Creates a missing file; an existing one keeps its content.
    IfMissing,
    /// Creates a missing file; truncates an existing one (devices keep their size).
    Truncate,
    /// Creates the file; an existing one is an error.
    New,
}

/// Options for opening a file; `Default` opens an existing file for reading.
///
/// ```
/// use qcow2_core::{HostOffset, Storage};
/// use qcow2_io::{Create, OpenFile};
///
/// let path = std::env::temp_dir().join(format!("qcow2-io-open-{}", std::process::id()));
/// let storage = OpenFile::writable().with_create(Create::Truncate).open(&path)?;
/// storage.write_at(HostOffset::new(0), b"hello")?;
/// storage.flush()?;
/// assert_eq!(storage.len()?, 5);
/// # drop(storage);
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OpenFile {
    /// Open for writing too.
    pub writable: bool,
    /// What to do with a missing or existing file; everything but [`Create::Never`] needs `writable`.
    pub create: Create,
    /// Accept block devices besides regular files. Pipes and sockets are always refused.
    pub allow_devices: bool,
    /// Accept character devices too, which are disks of their length: most have none.
    pub allow_characters: bool,
    /// How the page cache is used and when changes are flushed.
    pub cache: CacheMode,
    /// Which accesses by other programs are kept out while the file is open.
    pub locking: Locking,
    /// Set if the length of a writable file will change under a locking that lets others write. (Under the
    /// other lockings a writer may always resize.)
    pub resizes: bool,
    /// Set if only metadata is read: the opening then does not take the "consistent read" permission.
    pub metadata_only: bool,
    /// The set of files this program has open, none of which may be written to and opened a second time;
    /// `None`: no check.
    pub open_files: Option<OpenFiles>,
    /// Follow a symbolic link as the last component of the path (Linux; other systems always follow).
    pub follow_links: bool,
}

impl Default for OpenFile {
    fn default() -> Self {
        Self {
            writable: false,
            create: Create::Never,
            allow_devices: false,
            allow_characters: false,
            cache: CacheMode::default(),
            locking: Locking::default(),
            resizes: false,
            metadata_only: false,
            open_files: None,
            follow_links: true,
        }
    }
}

impl OpenFile {
    /// Opens an existing file or block device for reading.
    pub fn read_only() -> Self {
        Self { allow_devices: true, ..Self::default() }
    }

    /// Opens an existing file or block device for reading and writing.
    pub fn writable() -> Self {
        Self { writable: true, allow_devices: true, ..Self::default() }
    }

    /// These options with another creation mode.
    #[must_use]
    pub fn with_create(mut self, create: Create) -> Self {
        self.create = create;
        self
    }

    /// These options with another cache mode.
    #[must_use]
    pub fn with_cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// These options with another locking.
    #[must_use]
    pub fn with_locking(mut self, locking: Locking) -> Self {
        self.locking = locking;
        self
    }

    /// These options with a set of open files to check against and join.
    #[must_use]
    pub fn among(mut self, open_files: &OpenFiles) -> Self {
        self.open_files = Some(open_files.clone());
        self
    }

    /// Opens `path`. Never blocks on another program: a pipe is refused without opening it for I/O.
    pub fn open(&self, path: &Path) -> Result<Arc<dyn Storage>, OpenError> {
        Ok(self.cache.wrap(Arc::new(self.open_file(path)?)))
    }

    /// Like [`open`](Self::open), but returns the file adapter itself, for callers that need its identity.
    /// Uses direct I/O if the cache mode asks for it; the mode's flush behaviour is left to
    /// [`CacheMode::wrap`].
    pub fn open_file(&self, path: &Path) -> Result<FileStorage, OpenError> {
        let fail = |error: io::Error| {
            if !self.follow_links && sys::is_link_refusal(&error) {
                return OpenError::new(OpenErrorKind::NotRegular, path);
            }
            OpenError::system(path, error)
        };
        // Opening alone can have side effects on a device, so check the type first, and again on the opened
        // file.
        let seen = if self.follow_links { path.metadata() } else { path.symlink_metadata() };
        if let Ok(data) = seen {
            self.allow(&data, path)?;
        }
        let file = self.options().open(path).map_err(fail)?;
        let data = file.metadata().map_err(fail)?;
        let kind = self.allow(&data, path)?;
        // Lock and register before anything changes the content: this opening may be the one that truncates
        // it.
        lock(&file, path, self)?;
        let held = self.register(&file, &data, path)?;
        let direct = match self.cache.is_direct() {
            true => Some(DirectIo::new(sys::direct_alignment(&file).map_err(fail)?)),
            false => None,
        };
        let mut storage = FileStorage::with_direct(file, self.writable, direct).map_err(fail)?;
        if kind == FileKind::Character {
            storage = storage.into_device().map_err(fail)?;
        }
        if self.writable && self.cache == CacheMode::Writeback {
            storage.write_back_early();
        }
        storage.keep(held);
        if self.locking != Locking::Off {
            storage.note_locked();
        }
        if self.create == Create::Truncate && kind == FileKind::Regular {
            storage.set_len(0).map_err(|error| OpenError::system(path, os_io(error.os_code())))?;
        }
        Ok(storage)
    }

    /// Returns the file type of `data`. Errors: the type is not allowed.
    fn allow(&self, data: &Metadata, path: &Path) -> Result<FileKind, OpenError> {
        match file_kind(data) {
            FileKind::Other => Err(OpenError {
                directory_to_write: data.is_dir() && self.writable,
                ..OpenError::new(OpenErrorKind::NotRegular, path)
            }),
            FileKind::BlockDevice if self.allow_devices => Ok(FileKind::BlockDevice),
            FileKind::Character if self.allow_characters => Ok(FileKind::Character),
            FileKind::BlockDevice | FileKind::Character => {
                Err(OpenError::new(OpenErrorKind::NotRegular, path))
            }
            kind => Ok(kind),
        }
    }

    /// Locks and registers, as these options say, a file that was opened without either.
    pub(crate) fn settle(&self, storage: &mut FileStorage, path: &Path) -> Result<(), OpenError> {
        lock(storage.file(), path, self)?;
        storage.note_locked();
        let data = storage.file().metadata().map_err(|error| OpenError::system(path, error))?;
        let held = self.register(storage.file(), &data, path)?;
        storage.keep(held);
        Ok(())
    }

    fn register(&self, file: &File, data: &Metadata, path: &Path) -> Result<Option<HeldFile>, OpenError> {
        let Some(open_files) = &self.open_files else { return Ok(None) };
        open_files.register(file, data, self.writable, path).map_err(|same| OpenError {
            cause: Some(Cause::SameFile(same)),
            ..OpenError::new(OpenErrorKind::SameFile, path)
        })
    }

    fn options(&self) -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(true).write(self.writable);
        if self.writable {
            match self.create {
                Create::Never => {}
                Create::IfMissing | Create::Truncate => {
                    options.create(true);
                }
                Create::New => {
                    options.create_new(true);
                }
            }
        }
        sys::set_open_flags(&mut options, self.cache.is_direct(), self.follow_links);
        options
    }
}

/// Takes the image locks on `file` that `options` ask for.
fn lock(file: &File, path: &Path, options: &OpenFile) -> Result<(), OpenError> {
    let access = Access {
        consistent: !options.metadata_only || options.writable,
        writable: options.writable,
        resizes: options.resizes,
    };
    lock_image(file, options.locking, access).map_err(|error| match error {
        LockError::System(error) => OpenError::system(path, error),
        LockError::Conflict(conflict) => {
            OpenError { cause: Some(Cause::Lock(conflict)), ..OpenError::new(OpenErrorKind::Locked, path) }
        }
    })
}

fn os_io(code: Option<i32>) -> io::Error {
    code.map_or_else(|| io::ErrorKind::Other.into(), io::Error::from_raw_os_error)
}

/// Type of an opened file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Regular,
    BlockDevice,
    Character,
    Other,
}

pub(crate) fn file_kind(data: &Metadata) -> FileKind {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        match data.file_type() {
            kind if kind.is_block_device() => return FileKind::BlockDevice,
            kind if kind.is_char_device() => return FileKind::Character,
            _ => {}
        }
    }
    if data.is_file() { FileKind::Regular } else { FileKind::Other }
}

/// Why opening failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenErrorKind {
    /// The file does not exist.
    NotFound,
    /// The file exists and [`Create::New`] was asked for.
    Exists,
    /// Permission denied.
    Denied,
    /// Neither a regular file nor an allowed block device: a directory, a pipe, a socket.
    NotRegular,
    /// Another program holds a conflicting image lock.
    Locked,
    /// This program has the same file open already, and one of the two openings writes.
    SameFile,
    /// Any other error of the operating system.
    System,
}

/// Opening a file failed. `Display` names the file only; the reason is in [`reason`](Self::reason) and
/// `source()`.
#[derive(Debug)]
pub struct OpenError {
    kind: OpenErrorKind,
    path: PathBuf,
    cause: Option<Cause>,
    directory_to_write: bool,
}

#[derive(Debug)]
enum Cause {
    System(OsError),
    Lock(LockConflict),
    SameFile(SameFile),
}

impl OpenError {
    pub(crate) fn new(kind: OpenErrorKind, path: &Path) -> Self {
        Self { kind, path: path.to_owned(), cause: None, directory_to_write: false }
    }

    pub(crate) fn system(path: &Path, error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => OpenErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => OpenErrorKind::Exists,
            io::ErrorKind::PermissionDenied => OpenErrorKind::Denied,
            _ => OpenErrorKind::System,
        };
        Self { cause: Some(Cause::System(OsError::new(error))), ..Self::new(kind, path) }
    }

    /// The kind of failure.
    pub fn kind(&self) -> OpenErrorKind {
        self.kind
    }

    /// The path as the caller gave it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// True if a directory was to be opened for writing, for which the systems have an error text of their
    /// own.
    pub fn is_directory_to_write(&self) -> bool {
        self.directory_to_write
    }

    /// The operating system's error number, if there was one.
    pub fn os_code(&self) -> Option<i32> {
        match &self.cause {
            Some(Cause::System(error)) => error.code(),
            _ => None,
        }
    }

    /// The conflicting lock, for [`OpenErrorKind::Locked`].
    pub fn lock_conflict(&self) -> Option<LockConflict> {
        match self.cause {
            Some(Cause::Lock(conflict)) => Some(conflict),
            _ => None,
        }
    }

    /// The reason alone, for example "No such file or directory".
    ///
    /// ```
    /// use qcow2_io::OpenFile;
    /// use std::path::Path;
    ///
    /// let error = OpenFile::read_only().open(Path::new("nofile")).err().ok_or("it exists")?;
    /// assert_eq!(error.to_string(), "could not open 'nofile'");
    /// assert_eq!(error.reason(), "No such file or directory");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reason(&self) -> String {
        match &self.cause {
            Some(Cause::System(error)) => error.to_string(),
            Some(Cause::Lock(conflict)) => conflict.to_string(),
            Some(Cause::SameFile(same)) => same.to_string(),
            None => "it is not a regular file".to_owned(),
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "could not open '{}'", self.path.display())?;
        match self.cause {
            Some(_) => Ok(()),
            None => write!(f, ": {}", self.reason()),
        }
    }
}

impl std::error::Error for OpenError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_ref().map(|cause| match cause {
            Cause::System(error) => error as _,
            Cause::Lock(conflict) => conflict as _,
            Cause::SameFile(same) => same as _,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::HostOffset;

    fn kind(result: Result<FileStorage, OpenError>) -> OpenErrorKind {
        result.map(|_| ()).unwrap_err().kind()
    }

    #[test]
    fn create_modes_handle_missing_and_existing_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let open = |create| OpenFile::writable().with_create(create).open_file(&path);
        assert_eq!(kind(open(Create::Never)), OpenErrorKind::NotFound);
        let storage = open(Create::New).unwrap();
        storage.write_at(HostOffset::new(0), b"abc").unwrap();
        drop(storage);
        assert_eq!(kind(open(Create::New)), OpenErrorKind::Exists);
        assert_eq!(open(Create::IfMissing).unwrap().len().unwrap(), 3);
        assert_eq!(open(Create::Truncate).unwrap().len().unwrap(), 0);
    }

    #[test]
    fn a_missing_file_reports_the_system_error_text() {
        let error = OpenFile::read_only().open_file(Path::new("no/such/file")).map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), "could not open 'no/such/file'");
        assert_eq!(error.reason(), "No such file or directory");
        assert_eq!(error.os_code(), Some(2));
    }

    /// Simulates another thread that is starting a child process, which has a copy of the descriptor.
    #[cfg(target_os = "linux")]
    #[test]
    fn dropping_the_storage_releases_locks_despite_a_copied_descriptor() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenFile::writable().open_file(file.path());
        let storage = open().unwrap();
        let copy = storage.file().try_clone().unwrap();
        assert_eq!(kind(open()), OpenErrorKind::Locked);
        drop(storage);
        open().unwrap();
        // A failed opening leaves no lock behind either.
        let (other, storage) = (file.reopen().unwrap(), open().unwrap());
        let reading = crate::lock::Access { consistent: true, writable: false, resizes: false };
        assert!(crate::lock::lock_image(&other, Locking::Auto, reading).is_err());
        drop(storage);
        open().unwrap();
        let mut unlocked = OpenFile::writable().with_locking(Locking::Off).open_file(file.path()).unwrap();
        OpenFile::writable().settle(&mut unlocked, file.path()).unwrap();
        let second_copy = unlocked.file().try_clone().unwrap();
        drop(unlocked);
        open().unwrap();
        drop((copy, second_copy));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_pipe_is_refused_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert_eq!(kind(OpenFile::read_only().open_file(&path)), OpenErrorKind::NotRegular);
        assert_eq!(kind(OpenFile::writable().open_file(&path)), OpenErrorKind::NotRegular);
        assert_eq!(kind(OpenFile::read_only().open_file(dir.path())), OpenErrorKind::NotRegular);
        assert_eq!(kind(OpenFile::read_only().open_file(Path::new("/dev/zero"))), OpenErrorKind::NotRegular);
    }
}
