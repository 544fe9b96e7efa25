//! An open disk: what a machine does with it, and how it is closed.

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

/// An open disk image. All calls take `&self`, and any number of threads may make them at once.
///
/// # Closing
///
/// Call [`close`](Self::close) on a disk opened for writing. It makes everything durable, stores bitmaps,
/// clears the dirty bit, and returns an error if any of that fails.
///
/// Dropping the disk does the same, best effort, so an early return through `?` loses nothing. An error
/// cannot be returned from there. If an earlier call on this disk has failed, its caller knows, and the drop
/// is silent. Otherwise a debug build panics: a program that can lose writes silently should fail in its
/// tests. Release builds do not panic, and neither does a drop during unwinding.
///
/// Data that was [flushed](Self::flush) is safe either way.
pub struct Disk {
    path: PathBuf,
    disk: Arc<dyn GuestDisk>,
    /// What the disk was opened from, for opening its snapshots.
    pub(crate) source: ResolvedSource,
    pub(crate) options: OpenOptions,
    closed: bool,
    /// A call that changes the disk has failed, other than by being refused, and returned its error.
    error_reported: AtomicBool,
    /// Cloned into each open snapshot of this disk, so that the strong count says whether there is one.
    /// Locked while a snapshot is opened or deleted.
    pub(crate) snapshots: Mutex<Arc<()>>,
    /// The token of the disk that this is a snapshot of.
    pub(crate) snapshot_of: Option<Arc<()>>,
}

impl Disk {
    /// Opens the qcow2 image at `path` for reading, and no file that it names. [`options`](Self::options)
    /// does the rest. Errors: as [`DiskOptions::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::options().open(path)
    }

    /// How to open: for writing, along the backing chain, with a password, as another format.
    pub fn options() -> DiskOptions {
        DiskOptions::default()
    }

    /// Makes a qcow2 image of `size` bytes at `path`, where nothing is yet, and opens it for writing.
    /// [`NewDisk`](crate::NewDisk) does the rest. Errors: as [`NewDisk::create`](crate::NewDisk::create).
    pub fn create(path: impl AsRef<Path>, size: u64) -> Result<Self> {
        crate::NewDisk::qcow2().size(size).create(path)
    }

    pub(crate) fn from_source(path: &Path, source: ResolvedSource, options: OpenOptions) -> Result<Self> {
        let disk = open_disk(source.clone(), &options);
        Ok(Self::new(path, disk.map_err(|e| Error::from_cause(path, OPENING, e))?, source, options))
    }

    /// The disk of a snapshot; the options are for reading.
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
        Ok(Self::new(path, image.map_err(|e| Error::from_cause(path, step(), e))?, source, options))
    }

    fn new(path: &Path, disk: Arc<dyn GuestDisk>, source: ResolvedSource, options: OpenOptions) -> Self {
        Self {
            path: path.to_owned(),
            disk,
            source,
            options,
            closed: false,
            error_reported: AtomicBool::new(false),
            snapshots: Mutex::default(),
            snapshot_of: None,
        }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.disk.size()
    }

    /// The name that the disk was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format of the file.
    pub fn format(&self) -> &ImageFormat {
        &self.source.format
    }

    /// Fills `buf` with the bytes from `offset` on; what nobody wrote reads as zeroes. Errors: `OutOfRange`
    /// past the end of the disk, `Corrupt`, `Io`.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let read = self.disk.read_at(GuestOffset::new(offset), buf);
        read.map_err(|e| self.failed(format!("reading {} bytes at {offset}", buf.len()), e))
    }

    /// Writes `buf` from `offset` on; durable after the next [`flush`](Self::flush). Errors: `OutOfRange`,
    /// `ReadOnly`; `NoSpace`, a first part having been written; `Corrupt`, `Poisoned`, `Io`.
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let written = self.disk.write_at(GuestOffset::new(offset), buf);
        self.changed(written, || format!("writing {} bytes at {offset}", buf.len()))
    }

    /// Makes `range` read as zeroes, and gives its space back where it can. Errors: as
    /// [`write_at`](Self::write_at).
    pub fn write_zeroes(&self, range: Range<u64>) -> Result<()> {
        let zeroed = self.disk.write_zeroes(guest_range(&range), ZeroMode::MayUnmap);
        self.changed(zeroed, || format!("zeroing bytes {range:?}"))
    }

    /// Says that what is in `range` no longer matters, and gives the space of whole clusters back. They read
    /// as zeroes then where that can be recorded, as before elsewhere. Errors: as
    /// [`write_at`](Self::write_at).
    pub fn discard(&self, range: Range<u64>) -> Result<()> {
        let discarded = self.disk.discard(guest_range(&range));
        self.changed(discarded, || format!("discarding bytes {range:?}"))
    }

    /// Returns when every change that was done before this call is durable. Errors: `NoSpace`, `Poisoned`,
    /// `Io`.
    pub fn flush(&self) -> Result<()> {
        let flushed = self.disk.flush();
        self.changed(flushed, || "making changes durable".to_owned())
    }

    /// Makes the disk `size` bytes, not fewer than it has; what is new reads as zeroes. May be called while
    /// other threads read and write. Errors: `InvalidOption` for a smaller size or one that is no multiple of
    /// 512; `Unsupported` for a version 2 image with snapshots; `NoSpace`, `Poisoned`, `Io`.
    pub fn resize(&self, size: u64) -> Result<()> {
        self.resize_as(&ResizeOptions::new(NewSize::Exactly(size)))
    }

    /// Makes the disk `size` bytes even where that loses what lies behind the new end. Errors: as
    /// [`resize`](Self::resize).
    pub fn shrink(&self, size: u64) -> Result<()> {
        let mut options = ResizeOptions::new(NewSize::Exactly(size));
        options.shrink = true;
        self.resize_as(&options)
    }

    fn resize_as(&self, options: &ResizeOptions) -> Result<()> {
        let resized = qcow2_ops::resize(&*self.disk, options, &Silent);
        self.changed(resized, || "resizing the disk".to_owned())
    }

    /// The disk as the procedures of [`ops`](crate::ops) take it. [`close`](Self::close) ends this one too.
    pub fn as_guest_disk(&self) -> &Arc<dyn GuestDisk> {
        &self.disk
    }

    /// The disk as the engine's image, where it is one: for moving bytes oneself (`prepare_write`, `pin`),
    /// and for all that is not here. [`close`](Self::close) ends this one too.
    pub fn as_image(&self) -> Option<&Image> {
        self.disk.as_image()
    }

    /// The same, for what only qcow2 images can. Errors: `Unsupported`.
    pub(crate) fn image(&self, step: &str) -> Result<&Image> {
        let unsupported = || format!("{step}: only qcow2 images can have that");
        self.as_image().ok_or_else(|| Error::new(ErrorKind::Unsupported, &self.path, unsupported()))
    }

    /// Makes everything durable, stores bitmaps, and leaves the image clean; what is opened for reading has
    /// nothing to do. Behind an [`Arc`], [`Arc::into_inner`] gives the disk back once no other thread has it.
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

    /// Drops the disk without closing the image, which is about to be deleted.
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

    /// The result of a call that changes the disk. Remembers that an error was reported.
    pub(crate) fn changed<T>(
        &self,
        result: std::result::Result<T, impl std::error::Error + Send + Sync + 'static>,
        step: impl FnOnce() -> String,
    ) -> Result<T> {
        result.map_err(|error| {
            let error = self.failed(step(), error);
            // A refused request says nothing about what was written before it.
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
            // An image is poisoned by an earlier call, which returned its error.
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

/// A range that ends before it begins has no bytes.
fn guest_range(range: &Range<u64>) -> GuestRange {
    GuestRange::between(GuestOffset::new(range.start), GuestOffset::new(range.end))
}
