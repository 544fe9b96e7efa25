//! An open disk: guest I/O, and how it is closed.

use crate::error::{Error, ErrorKind, Result};
use crate::options::{DiskOptions, OPENING};
use qcow2_core::format::{GuestOffset, GuestRange};
use qcow2_core::{GuestDisk, Image, ImageFormat, OpenOptions, ResolvedSource, ZeroMode, open_disk};
use qcow2_ops::snapshot::SnapshotName;
use qcow2_ops::{NewSize, ResizeOptions, Silent};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// An open disk image. All methods take `&self` and can be called from any number of threads at once.
///
/// # Closing
///
/// Call [`close`](Self::close) on a disk opened for writing. It makes everything durable, stores bitmaps,
/// clears the dirty bit, and returns an error if any of that fails.
///
/// Dropping the disk does the same on a best-effort basis, so an early return through `?` loses nothing. A
/// drop cannot return an error. If an earlier call on this disk has returned one, the caller knows, and the
/// drop is silent. Otherwise a debug build panics: a program that can lose writes silently should fail in its
/// tests. Release builds do not panic, and neither does a drop during unwinding.
///
/// Data that was [flushed](Self::flush) is safe either way.
pub struct Disk {
    path: PathBuf,
    disk: Arc<dyn GuestDisk>,
    /// The opened files, needed to open snapshots of the disk.
    pub(crate) source: ResolvedSource,
    pub(crate) options: OpenOptions,
    closed: bool,
    /// Set when a call that changes the disk failed and returned its error. Refused requests do not count.
    error_reported: AtomicBool,
    /// Each open snapshot of this disk holds a clone, so a strong count above 1 means that one is open.
    /// Locked while a snapshot is opened or deleted.
    pub(crate) snapshots: Mutex<Arc<()>>,
    /// True if this is not what the file shows, but an internal snapshot in it.
    pub(crate) is_snapshot: bool,
    /// The token of the parent disk, if this is a snapshot.
    pub(crate) snapshot_of: Option<Arc<()>>,
}

impl Disk {
    /// Opens the qcow2 image at `path` for reading, and no file that it names. Use [`options`](Self::options)
    /// for anything else. Errors: as [`DiskOptions::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::options().open(path)
    }

    /// Options for opening: for writing, with backing files, with a password, in another format.
    pub fn options() -> DiskOptions {
        DiskOptions::default()
    }

    /// Creates a qcow2 image of `size` bytes at `path`, which must not exist, and opens it for writing. Use
    /// [`NewDisk`](crate::NewDisk) for anything else. Errors: as [`NewDisk::create`](crate::NewDisk::create).
    pub fn create(path: impl AsRef<Path>, size: u64) -> Result<Self> {
        crate::NewDisk::qcow2().size(size).create(path)
    }

    pub(crate) fn from_source(path: &Path, source: ResolvedSource, options: OpenOptions) -> Result<Self> {
        let disk = open_disk(source.clone(), &options);
        Ok(Self::new(path, disk.map_err(|e| Error::from_cause(path, OPENING, e))?, source, options))
    }

    /// Opens a snapshot as a disk, read-only whatever `options` say.
    pub(crate) fn snapshot_in(
        path: &Path,
        source: ResolvedSource,
        options: &OpenOptions,
        snapshot: &str,
    ) -> Result<Self> {
        let step = || format!("opening snapshot '{}'", snapshot.escape_debug());
        if source.format != ImageFormat::Qcow2 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                path,
                step() + ": only qcow2 images have snapshots",
            ));
        }
        let (name, options) = (SnapshotName::Any(snapshot.to_owned()), read_only(options));
        let image = Image::open_snapshot(source.clone(), &options, |snapshots| name.position(snapshots));
        let image = image.map_err(|e| Error::from_cause(path, step(), e))?;
        let mut disk = Self::new(path, image, source, options);
        disk.is_snapshot = true;
        Ok(disk)
    }

    /// `source`: the files of `disk`.
    pub(crate) fn new(
        path: &Path,
        disk: Arc<dyn GuestDisk>,
        source: ResolvedSource,
        options: OpenOptions,
    ) -> Self {
        Self {
            path: path.to_owned(),
            disk,
            source,
            options,
            closed: false,
            error_reported: AtomicBool::new(false),
            snapshots: Mutex::default(),
            is_snapshot: false,
            snapshot_of: None,
        }
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.disk.size()
    }

    /// The path that the disk was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format of the file.
    pub fn format(&self) -> &ImageFormat {
        &self.source.format
    }

    /// Fills `buf` from byte `offset`; unwritten ranges read as zeroes. Errors: `OutOfRange` past the end of
    /// the disk, `Corrupt`, `Io`.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let read = self.disk.read_at(GuestOffset::new(offset), buf);
        read.map_err(|e| self.failed(format!("reading {} bytes at {offset}", buf.len()), e))
    }

    /// Writes `buf` at byte `offset`; durable after the next [`flush`](Self::flush). Errors: `OutOfRange`,
    /// `ReadOnly`; `NoSpace`, possibly after a first part has been written; `Corrupt`, `Poisoned`, `Io`.
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let written = self.disk.write_at(GuestOffset::new(offset), buf);
        self.changed(written, || format!("writing {} bytes at {offset}", buf.len()))
    }

    /// Makes `range` read as zeroes, and frees its space if possible. Errors: as
    /// [`write_at`](Self::write_at).
    pub fn write_zeroes(&self, range: Range<u64>) -> Result<()> {
        let zeroed = self.disk.write_zeroes(guest_range(&range), ZeroMode::MayUnmap);
        self.changed(zeroed, || format!("zeroing bytes {range:?}"))
    }

    /// Discards `range`: its content is no longer needed, and the space of whole clusters is freed. They read
    /// as zeroes afterwards if the image can record that, otherwise as before. Errors: as
    /// [`write_at`](Self::write_at).
    pub fn discard(&self, range: Range<u64>) -> Result<()> {
        let discarded = self.disk.discard(guest_range(&range));
        self.changed(discarded, || format!("discarding bytes {range:?}"))
    }

    /// Returns when all changes completed before this call are durable. Errors: `NoSpace`, `Poisoned`, `Io`.
    pub fn flush(&self) -> Result<()> {
        let flushed = self.disk.flush();
        self.changed(flushed, || "making changes durable".to_owned())
    }

    /// Grows the disk to `size` bytes; new bytes read as zeroes. Other threads may read and write meanwhile.
    /// Errors: `InvalidOption` for a smaller size or one that is not a multiple of 512; `Unsupported` for a
    /// version 2 image with snapshots; `NoSpace`, `Poisoned`, `Io`.
    pub fn resize(&self, size: u64) -> Result<()> {
        self.resize_as(&ResizeOptions::new(NewSize::Exactly(size)))
    }

    /// Like [`resize`](Self::resize), but may also shrink the disk, which loses the data past the new end.
    /// Errors: the same.
    pub fn shrink(&self, size: u64) -> Result<()> {
        let mut options = ResizeOptions::new(NewSize::Exactly(size));
        options.shrink = true;
        self.resize_as(&options)
    }

    fn resize_as(&self, options: &ResizeOptions) -> Result<()> {
        let resized = qcow2_ops::resize(&*self.disk, options, &Silent);
        self.changed(resized, || "resizing the disk".to_owned())
    }

    /// The disk for the procedures of [`ops`](crate::ops). [`close`](Self::close) closes this handle too.
    pub fn as_guest_disk(&self) -> &Arc<dyn GuestDisk> {
        &self.disk
    }

    /// The engine's image, if the disk is qcow2: for doing the I/O yourself (`prepare_write`, `pin`), and for
    /// everything that `Disk` has no method for. [`close`](Self::close) closes this handle too.
    pub fn as_image(&self) -> Option<&Image> {
        self.disk.as_image()
    }

    /// Like [`as_image`](Self::as_image), for operations that need qcow2. Errors: `Unsupported`.
    pub(crate) fn image(&self, step: &str) -> Result<&Image> {
        let unsupported = || format!("{step}: only possible with a qcow2 image");
        self.as_image().ok_or_else(|| Error::new(ErrorKind::Unsupported, &self.path, unsupported()))
    }

    /// Makes everything durable, stores bitmaps, and marks the image clean. Does nothing for a disk opened
    /// for reading. Behind an [`Arc`], [`Arc::into_inner`] returns the disk once no other thread holds it.
    /// Errors: `NoSpace`, `Poisoned`, `Io`.
    pub fn close(mut self) -> Result<()> {
        self.closed = true;
        self.finish()
    }

    fn finish(&self) -> Result<()> {
        if !self.options.writable {
            return Ok(());
        }
        let done = self.disk.flush().and_then(|()| self.as_image().map_or(Ok(()), Image::close));
        done.map_err(|e| self.failed("closing the image", e))
    }

    /// Drops the disk without closing the image, because the file is about to be deleted.
    pub(crate) fn abandon(mut self) {
        self.closed = true;
    }

    pub(crate) fn failed(
        &self,
        step: impl Into<String>,
        cause: impl std::error::Error + Send + Sync + 'static,
    ) -> Error {
        Error::from_cause(&self.path, step, cause)
    }

    /// Converts the result of a call that changes the disk, and records that an error was reported.
    pub(crate) fn changed<T>(
        &self,
        result: std::result::Result<T, impl std::error::Error + Send + Sync + 'static>,
        step: impl FnOnce() -> String,
    ) -> Result<T> {
        result.map_err(|error| {
            let error = self.failed(step(), error);
            // A refused request is not a report about data that was written before.
            use ErrorKind::{Corrupt, Io, NoSpace, Poisoned};
            let failed = matches!(error.kind(), Io | NoSpace | Poisoned | Corrupt);
            self.error_reported.fetch_or(failed, Ordering::Relaxed);
            error
        })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        if let Err(error) = self.finish() {
            // An earlier call poisoned the image and returned its error.
            let reported = self.error_reported.load(Ordering::Relaxed) || error.kind() == ErrorKind::Poisoned;
            debug_assert!(
                reported || std::thread::panicking(),
                "a disk was dropped, and closing it failed: {error:#}"
            );
        }
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("path", &self.path)
            .field("format", self.format())
            .field("size", &self.size())
            .field("writable", &self.options.writable)
            .finish_non_exhaustive()
    }
}

pub(crate) fn read_only(options: &OpenOptions) -> OpenOptions {
    let mut options = options.clone();
    (options.writable, options.discard_freed) = (false, false);
    options
}

/// The guest range for `range`; empty if it ends before it starts.
fn guest_range(range: &Range<u64>) -> GuestRange {
    GuestRange::between(GuestOffset::new(range.start), GuestOffset::new(range.end))
}
