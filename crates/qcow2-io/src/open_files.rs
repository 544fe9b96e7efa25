//! The set of files one program has open, so that it never writes to a file that it also reads.
//!
//! Image locks do not ensure this: they are not taken with forced sharing, with locking off, or on file
//! systems without locks, and a raw disk is shared with its writers. A program that opens several files for
//! one job therefore opens them through the same [`OpenFiles`]. Each opening is compared with the earlier
//! ones by what it reaches, not by name: the bytes of a file or block device.

use crate::open::{FileKind, file_kind};
use crate::reach::{Reach, is_overlay, is_overlay_at};
use std::fmt;
use std::fs::{File, Metadata};
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
    open: Mutex<Vec<Opening>>,
    /// The file standard output is redirected to, if any.
    output: Option<Reach>,
}

#[derive(Debug)]
struct Opening {
    number: u64,
    reach: Reach,
    writable: bool,
    /// For messages.
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
        let output = stream_reach(std::io::stdout());
        #[cfg(not(unix))]
        let output = None;
        Self { shared: Arc::new(Shared { output, ..Shared::default() }) }
    }

    /// Registers the file behind standard input as read. `None`: standard input is not a file. Errors: the
    /// file is open for writing.
    pub fn hold_input(&self) -> Result<Option<HeldFile>, SameFile> {
        #[cfg(unix)]
        {
            self.hold(stream_reach(std::io::stdin()), false, || "standard input".to_owned())
        }
        #[cfg(not(unix))]
        Ok(None)
    }

    /// Registers the file at `path` as read, without opening it; messages call it `name`. `None`: there is no
    /// such file. Errors: the file is open for writing.
    pub fn hold_path(&self, path: &Path, name: &str) -> Result<Option<HeldFile>, SameFile> {
        let reach = path.metadata().ok().and_then(|data| image_reach(&data, is_overlay_at(path)));
        self.hold(reach, false, || name.to_owned())
    }

    /// Registers the open `file` with this `metadata`. `None`: the system does not identify the file.
    pub(crate) fn register(
        &self,
        file: &File,
        metadata: &Metadata,
        writable: bool,
        path: &Path,
    ) -> Result<Option<HeldFile>, SameFile> {
        self.hold(Reach::of(metadata, is_overlay(file)), writable, || quoted(path))
    }

    fn hold(
        &self,
        reach: Option<Reach>,
        writable: bool,
        name: impl Fn() -> String,
    ) -> Result<Option<HeldFile>, SameFile> {
        let Some(reach) = reach else { return Ok(None) };
        if !writable && self.shared.output.as_ref().is_some_and(|output| output.meets(&reach)) {
            return Err(SameFile { name: name(), first: "standard output".to_owned(), first_writes: true });
        }
        // Check and insert under one lock: of two threads that open the same file, one must see the other.
        let mut open = self.shared.lock();
        let first = open.iter().find(|one| (writable || one.writable) && one.reach.meets(&reach));
        if let Some(Opening { name: first, writable, .. }) = first {
            return Err(SameFile { name: name(), first: first.clone(), first_writes: *writable });
        }
        let number = open.last().map_or(0, |last| last.number + 1);
        open.push(Opening { number, reach, writable, name: name() });
        Ok(Some(HeldFile { shared: Arc::clone(&self.shared), number }))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Opening>> {
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
    number: u64,
}

impl Drop for HeldFile {
    fn drop(&mut self) {
        self.shared.lock().retain(|one| one.number != self.number);
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

/// What is reached, for file types that can hold an image.
fn image_reach(metadata: &Metadata, is_overlay: bool) -> Option<Reach> {
    Reach::of(metadata, is_overlay)
        .filter(|_| matches!(file_kind(metadata), FileKind::Regular | FileKind::BlockDevice))
}

/// What a standard stream reaches.
#[cfg(unix)]
fn stream_reach(stream: impl std::os::fd::AsFd) -> Option<Reach> {
    let file = File::from(stream.as_fd().try_clone_to_owned().ok()?);
    image_reach(&file.metadata().ok()?, is_overlay(&file))
}
