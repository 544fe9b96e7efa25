//! How to open a file as a storage: for reading or writing, new or not, through the page cache or around it.

use crate::direct::DirectIo;
use crate::error::OsError;
use crate::file::FileStorage;
use crate::layer::CacheMode;
use crate::sys;
use qcow2_core::Storage;
use std::fmt;
use std::fs::{File, OpenOptions};
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
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct OpenFile {
    /// Open for writing too.
    pub writable: bool,
    /// What to do with a missing or existing file; everything but [`Create::Never`] needs `writable`.
    pub create: Create,
    /// Whether block devices may be opened besides regular files. Pipes, sockets and character devices never are.
    pub allow_devices: bool,
    /// Whether the page cache is used, and when changes are made durable.
    pub cache: CacheMode,
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

    /// Opens `path`. Never waits for another program: a pipe is refused, not opened.
    pub fn open(&self, path: &Path) -> Result<Arc<dyn Storage>, OpenError> {
        Ok(self.cache.wrap(Arc::new(self.open_file(path)?)))
    }

    /// Opens `path` as the file adapter itself, for callers that need its identity. It bypasses the page cache where
    /// the cache mode says so; the mode's way to flush is left to [`CacheMode::wrap`].
    pub fn open_file(&self, path: &Path) -> Result<FileStorage, OpenError> {
        let fail = |error| OpenError::system(path, error);
        let file = self.options().open(path).map_err(fail)?;
        let kind = file_kind(&file).map_err(fail)?;
        match kind {
            FileKind::Regular => {}
            FileKind::BlockDevice if self.allow_devices => {}
            _ => return Err(OpenError::new(OpenErrorKind::NotRegular, path)),
        }
        let direct = match self.cache.is_direct() {
            true => Some(DirectIo::new(sys::direct_alignment(&file).map_err(fail)?)),
            false => None,
        };
        let storage = FileStorage::with_direct(file, self.writable, direct).map_err(fail)?;
        if self.create == Create::Truncate && kind == FileKind::Regular {
            storage.set_len(0).map_err(|error| OpenError::system(path, os_io(error.os_code())))?;
        }
        Ok(storage)
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
        sys::set_open_flags(&mut options, self.cache.is_direct());
        options
    }
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

pub(crate) fn file_kind(file: &File) -> io::Result<FileKind> {
    let file_type = file.metadata()?.file_type();
    #[cfg(unix)]
    if std::os::unix::fs::FileTypeExt::is_block_device(&file_type) {
        return Ok(FileKind::BlockDevice);
    }
    Ok(if file_type.is_file() { FileKind::Regular } else { FileKind::Other })
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
    /// Any other answer of the system.
    System,
}

/// A file that was not opened. `Display` names the file only; the reason is [`reason`](Self::reason) and `source()`.
#[derive(Debug)]
pub struct OpenError {
    kind: OpenErrorKind,
    path: PathBuf,
    source: Option<OsError>,
}

impl OpenError {
    pub(crate) fn new(kind: OpenErrorKind, path: &Path) -> Self {
        Self { kind, path: path.to_owned(), source: None }
    }

    pub(crate) fn system(path: &Path, error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => OpenErrorKind::NotFound,
            io::ErrorKind::AlreadyExists => OpenErrorKind::Exists,
            io::ErrorKind::PermissionDenied => OpenErrorKind::Denied,
            _ => OpenErrorKind::System,
        };
        Self { kind, path: path.to_owned(), source: Some(OsError::new(error)) }
    }

    /// What kind of trouble it was.
    pub fn kind(&self) -> OpenErrorKind {
        self.kind
    }

    /// The name that was opened, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The operating system's error number, where there was one.
    pub fn os_code(&self) -> Option<i32> {
        self.source.as_ref().and_then(OsError::code)
    }

    /// The reason alone, for example "No such file or directory".
    pub fn reason(&self) -> String {
        match (&self.source, self.kind) {
            (Some(source), _) => source.to_string(),
            (None, OpenErrorKind::NotRegular) => {
                format!("'file' driver requires '{}' to be a regular file", self.path.display())
            }
            (None, _) => "unknown".to_owned(),
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source {
            Some(_) => write!(f, "could not open '{}'", self.path.display()),
            None => f.write_str(&self.reason()),
        }
    }
}

impl std::error::Error for OpenError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source as _)
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
