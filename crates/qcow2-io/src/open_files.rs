//! The set of files one program has open, so that it never writes to a file that it also reads.
//!
//! Image locks do not ensure this: they are not taken with forced sharing, with locking off, or on file
//! systems without locks, and a raw disk is shared with its writers. A program that opens several files for
//! one job therefore opens them through the same [`OpenFiles`]. Each opening is compared with the earlier
//! ones by what was opened, not by name: device and inode, or block device.

use crate::open::{FileKind, file_kind};
use qcow2_core::SourceId;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::fs::Metadata;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A set of open files. Each may be open any number of times for reading, or once for writing. A clone is the
/// same set.
///
/// ```
/// use qcow2_io::{Create, OpenErrorKind, OpenFile, OpenFiles};
///
/// let path = std::env::temp_dir().join(format!("qcow2-io-open-files-{}", std::process::id()));
/// std::fs::write(&path, b"precious")?;
/// let together = OpenFiles::new();
/// let source = OpenFile::read_only().among(&together).open(&path)?;
/// let target = OpenFile::writable().with_create(Create::Truncate).among(&together).open(&path);
/// assert!(target.is_err());
/// assert_eq!(source.len()?, 8);
/// drop(source);
/// OpenFile::writable().among(&together).open(&path)?;
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct OpenFiles {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    open: Mutex<BTreeMap<SourceId, Openings>>,
    /// The file standard output is redirected to, if any.
    output: Option<SourceId>,
}

/// The openings of one file.
#[derive(Debug)]
struct Openings {
    count: u32,
    writable: bool,
    /// Name of the first opening, for messages.
    name: String,
}

impl OpenFiles {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty set that knows the file behind standard output: that file may be opened for writing (as
    /// `/dev/stdout`) but not for reading. The same as [`new`](Self::new) if standard output is a pipe or a
    /// terminal.
    pub fn with_output() -> Self {
        #[cfg(unix)]
        let output = stream_metadata(std::io::stdout()).as_ref().and_then(image_id);
        #[cfg(not(unix))]
        let output = None;
        Self { shared: Arc::new(Shared { output, ..Shared::default() }) }
    }

    /// Registers the file behind standard input as read. `None`: standard input is not a file. Errors: the
    /// file is open for writing.
    pub fn hold_input(&self) -> Result<Option<HeldFile>, SameFile> {
        #[cfg(unix)]
        {
            let id = stream_metadata(std::io::stdin()).as_ref().and_then(image_id);
            self.hold(id, false, || "standard input".to_owned())
        }
        #[cfg(not(unix))]
        Ok(None)
    }

    /// Registers the file at `path` as read, without opening it; messages call it `name`. `None`: there is no
    /// such file. Errors: the file is open for writing.
    pub fn hold_path(&self, path: &Path, name: &str) -> Result<Option<HeldFile>, SameFile> {
        let id = path.metadata().ok().as_ref().and_then(image_id);
        self.hold(id, false, || name.to_owned())
    }

    /// Registers the open file with this `metadata`. `None`: the system does not identify the file.
    pub(crate) fn register(
        &self,
        metadata: &Metadata,
        writable: bool,
        path: &Path,
    ) -> Result<Option<HeldFile>, SameFile> {
        self.hold(source_id(metadata), writable, || quoted(path))
    }

    fn hold(
        &self,
        id: Option<SourceId>,
        writable: bool,
        name: impl Fn() -> String,
    ) -> Result<Option<HeldFile>, SameFile> {
        let Some(id) = id else { return Ok(None) };
        if !writable && self.shared.output == Some(id) {
            return Err(SameFile { name: name(), first: "standard output".to_owned(), first_writes: true });
        }
        // Check and insert under one lock: of two threads that open the same file, one must see the other.
        match self.shared.lock().entry(id) {
            Entry::Vacant(entry) => {
                entry.insert(Openings { count: 1, writable, name: name() });
            }
            Entry::Occupied(entry) if writable || entry.get().writable => {
                let Openings { name: first, writable, .. } = entry.get();
                return Err(SameFile { name: name(), first: first.clone(), first_writes: *writable });
            }
            Entry::Occupied(mut entry) => entry.get_mut().count += 1,
        }
        Ok(Some(HeldFile { shared: Arc::clone(&self.shared), id }))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SourceId, Openings>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.display())
}

/// A registration of one opening; dropping it ends the registration.
#[derive(Debug)]
#[must_use = "the file counts as open only as long as this is kept"]
pub struct HeldFile {
    shared: Arc<Shared>,
    id: SourceId,
}

impl Drop for HeldFile {
    fn drop(&mut self) {
        if let Entry::Occupied(mut entry) = self.shared.lock().entry(self.id) {
            entry.get_mut().count -= 1;
            if entry.get().count == 0 {
                entry.remove();
            }
        }
    }
}

/// This program has the same file open already, and one of the two openings writes.
///
/// `Display` names both openings: `'link' is the same file as 'disk', which is being read and cannot be
/// written to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SameFile {
    name: String,
    /// The name of the first opening.
    first: String,
    first_writes: bool,
}

impl fmt::Display for SameFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if self.first != self.name {
            write!(f, " is the same file as {}, which", self.first)?;
        }
        f.write_str(match self.first_writes {
            true => " is being written to and cannot be opened again",
            false => " is being read and cannot be written to",
        })
    }
}

impl std::error::Error for SameFile {}

/// Identifies a file, for comparing two openings; `None` where the system does not tell.
pub(crate) fn source_id(metadata: &Metadata) -> Option<SourceId> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        // A loop device aliases the bytes of its backing file.
        if let Some(behind) = behind_loop(metadata) {
            return source_id(&behind);
        }
        // Two device nodes of one device have different inodes but the same content.
        Some(match file_kind(metadata) {
            FileKind::BlockDevice => SourceId { device: u64::MAX, file: metadata.rdev() },
            FileKind::Regular | FileKind::Character | FileKind::Other => {
                SourceId { device: metadata.dev(), file: metadata.ino() }
            }
        })
    }
    #[cfg(not(unix))]
    {
        let _ = metadata;
        None
    }
}

/// Metadata of the file behind a loop device.
#[cfg(target_os = "linux")]
fn behind_loop(metadata: &Metadata) -> Option<Metadata> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::MetadataExt;
    if file_kind(metadata) != FileKind::BlockDevice {
        return None;
    }
    let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    let name = std::fs::read(format!("/sys/dev/block/{major}:{minor}/loop/backing_file")).ok()?;
    // One step down; `source_id` recurses, and ends because the kernel refuses cycles of loop devices.
    std::fs::metadata(OsStr::from_bytes(name.strip_suffix(b"\n")?)).ok()
}

#[cfg(all(unix, not(target_os = "linux")))]
fn behind_loop(_metadata: &Metadata) -> Option<Metadata> {
    None
}

/// The identity, for file types that can hold an image.
fn image_id(metadata: &Metadata) -> Option<SourceId> {
    source_id(metadata).filter(|_| matches!(file_kind(metadata), FileKind::Regular | FileKind::BlockDevice))
}

/// Metadata of a standard stream.
#[cfg(unix)]
fn stream_metadata(stream: impl std::os::fd::AsFd) -> Option<Metadata> {
    std::fs::File::from(stream.as_fd().try_clone_to_owned().ok()?).metadata().ok()
}
