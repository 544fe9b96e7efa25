//! How to open a file as a storage: for reading or writing, new or not, through the page cache or around it.

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

/// Whether a missing file is made, and what happens to one that exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Create {
    /// The file must exist.
    #[default]
    Never,
    /// A missing file is made; an existing one keeps its content.
    IfMissing,
    /// A missing file is made; an existing one is emptied (devices keep their size).
    Truncate,
    /// The file is made and must not exist yet.
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
    /// Whether block devices may be opened besides regular files. Pipes, sockets and character devices never
    /// are.
    pub allow_devices: bool,
    /// Whether the page cache is used, and when changes are made durable.
    pub cache: CacheMode,
    /// Whether other programs are kept from changing the image meanwhile.
    pub locking: Locking,
    /// Whether the length of a writable file is going to change although others may write to it. (Where they
    /// may not, it may change without saying so here.)
    pub resizes: bool,
    /// Whether only metadata is read, which needs no content that stays as it is: other programs are not told
    /// of reading then.
    pub metadata_only: bool,
    /// The files that are open together with this one, none of which may be written to and open a second
    /// time; `None`: nobody looks.
    pub open_files: Option<OpenFiles>,
    /// Whether a symbolic link is followed where the name ends (Linux; elsewhere links always are).
    pub follow_links: bool,
}

impl Default for OpenFile {
    fn default() -> Self {
        Self {
            writable: false,
            create: Create::Never,
            allow_devices: false,
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

    /// These options with another way to create.
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

    /// These options with another way to lock.
    #[must_use]
    pub fn with_locking(mut self, locking: Locking) -> Self {
        self.locking = locking;
        self
    }

    /// These options with the files that are open together with this one.
    #[must_use]
    pub fn among(mut self, open_files: &OpenFiles) -> Self {
        self.open_files = Some(open_files.clone());
        self
    }

    /// Opens `path`. Never waits for another program: a pipe is refused, not opened.
    pub fn open(&self, path: &Path) -> Result<Arc<dyn Storage>, OpenError> {
        Ok(self.cache.wrap(Arc::new(self.open_file(path)?)))
    }

    /// Opens `path` as the file adapter itself, for callers that need its identity. It bypasses the page
    /// cache where the cache mode says so; the mode's way to flush is left to [`CacheMode::wrap`].
    pub fn open_file(&self, path: &Path) -> Result<FileStorage, OpenError> {
        let fail = |error: io::Error| {
            if !self.follow_links && sys::is_link_refusal(&error) {
                return OpenError::new(OpenErrorKind::NotRegular, path);
            }
            OpenError::system(path, error)
        };
        // Opening alone may do something to a device, so look before, and again at what was really opened.
        let seen = if self.follow_links { path.metadata() } else { path.symlink_metadata() };
        if let Ok(data) = seen {
            self.allow(&data, path)?;
        }
        let file = self.options().open(path).map_err(fail)?;
        let data = file.metadata().map_err(fail)?;
        let kind = self.allow(&data, path)?;
        // Both before anything is done to the content: this opening may be the one that empties it.
        lock(&file, path, self)?;
        let held = self.register(&data, path)?;
        let direct = match self.cache.is_direct() {
            true => Some(DirectIo::new(sys::direct_alignment(&file).map_err(fail)?)),
            false => None,
        };
        let mut storage = FileStorage::with_direct(file, self.writable, direct).map_err(fail)?;
        storage.keep(held);
        if self.locking != Locking::Off {
            storage.note_locked();
        }
        if self.create == Create::Truncate && kind == FileKind::Regular {
            storage.set_len(0).map_err(|error| OpenError::system(path, os_io(error.os_code())))?;
        }
        Ok(storage)
    }

    /// What kind of thing `data` is about, unless that kind is refused.
    fn allow(&self, data: &Metadata, path: &Path) -> Result<FileKind, OpenError> {
        match file_kind(data) {
            FileKind::Other => Err(OpenError {
                directory_to_write: data.is_dir() && self.writable,
                ..OpenError::new(OpenErrorKind::NotRegular, path)
            }),
            FileKind::BlockDevice if !self.allow_devices => {
                Err(OpenError::new(OpenErrorKind::NotRegular, path))
            }
            kind => Ok(kind),
        }
    }

    /// Locks and compares, as these options say, a file that was opened without either.
    pub(crate) fn settle(&self, storage: &mut FileStorage, path: &Path) -> Result<(), OpenError> {
        lock(storage.file(), path, self)?;
        storage.note_locked();
        let data = storage.file().metadata().map_err(|error| OpenError::system(path, error))?;
        storage.keep(self.register(&data, path)?);
        Ok(())
    }

    fn register(&self, data: &Metadata, path: &Path) -> Result<Option<HeldFile>, OpenError> {
        let Some(open_files) = &self.open_files else { return Ok(None) };
        open_files.register(data, self.writable, path).map_err(|same| OpenError {
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

/// Locks `file` as `options` say.
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

/// What kind of thing a name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileKind {
    Regular,
    BlockDevice,
    Other,
}

pub(crate) fn file_kind(data: &Metadata) -> FileKind {
    #[cfg(unix)]
    if std::os::unix::fs::FileTypeExt::is_block_device(&data.file_type()) {
        return FileKind::BlockDevice;
    }
    if data.is_file() { FileKind::Regular } else { FileKind::Other }
}

/// Why a file was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenErrorKind {
    /// There is no such file.
    NotFound,
    /// The file exists already and had to be new.
    Exists,
    /// The system does not let this user.
    Denied,
    /// Neither a regular file nor an allowed device: a directory, a pipe, a socket.
    NotRegular,
    /// Another program uses the image.
    Locked,
    /// The same file is open here already, and one of the two openings writes.
    SameFile,
    /// Any other answer of the system.
    System,
}

/// A file that was not opened. `Display` names the file only; the reason is [`reason`](Self::reason) and
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

    /// What kind of trouble it was.
    pub fn kind(&self) -> OpenErrorKind {
        self.kind
    }

    /// The name that was opened, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a directory that was to be written to, which systems refuse in words of their own.
    pub fn is_directory_to_write(&self) -> bool {
        self.directory_to_write
    }

    /// The operating system's error number, where there was one.
    pub fn os_code(&self) -> Option<i32> {
        match &self.cause {
            Some(Cause::System(error)) => error.code(),
            _ => None,
        }
    }

    /// Which lock was not to be had, for [`OpenErrorKind::Locked`].
    pub fn lock_conflict(&self) -> Option<LockConflict> {
        match self.cause {
            Some(Cause::Lock(conflict)) => Some(conflict),
            _ => None,
        }
    }

    /// The reason alone, for example "No such file or directory".
    pub fn reason(&self) -> String {
        match &self.cause {
            Some(Cause::System(error)) => error.to_string(),
            Some(Cause::Lock(conflict)) => conflict.to_string(),
            Some(Cause::SameFile(same)) => same.to_string(),
            None => format!("'file' driver requires '{}' to be a regular file", self.path.display()),
        }
    }

    /// The whole in QEMU's words, for programs that stand in for its tools: two lines for a lock, one for the
    /// rest.
    ///
    /// ```
    /// use qcow2_io::OpenFile;
    /// use std::path::Path;
    ///
    /// let error = OpenFile::read_only().open(Path::new("nofile")).err().ok_or("it exists")?;
    /// assert_eq!(error.qemu_message(), "Could not open 'nofile': No such file or directory");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn qemu_message(&self) -> String {
        let path = self.path.display();
        match &self.cause {
            Some(Cause::System(error)) => format!("Could not open '{path}': {error}"),
            Some(Cause::SameFile(same)) => same.to_string(),
            Some(Cause::Lock(conflict)) => {
                format!("{conflict}\nIs another process using the image [{path}]?")
            }
            None => self.reason(),
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause {
            Some(_) => write!(f, "could not open '{}'", self.path.display()),
            None => f.write_str(&self.reason()),
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
    fn create_modes_do_what_they_say() {
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
    fn a_missing_file_gives_the_systems_text() {
        let error = OpenFile::read_only().open_file(Path::new("no/such/file")).map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), "could not open 'no/such/file'");
        assert_eq!(error.reason(), "No such file or directory");
        assert_eq!(error.os_code(), Some(2));
    }

    /// As if a child process were just being started by another thread.
    #[cfg(target_os = "linux")]
    #[test]
    fn locks_end_with_the_storage_although_a_copy_of_the_descriptor_lives() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || OpenFile::writable().open_file(file.path());
        let storage = open().unwrap();
        let copy = storage.file().try_clone().unwrap();
        assert_eq!(kind(open()), OpenErrorKind::Locked);
        drop(storage);
        open().unwrap();
        // An attempt that fails leaves nothing behind either.
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
    fn a_pipe_is_refused_at_once() {
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
