//! A backup of a disk in use as it was at one moment: of all of it, or of what a bitmap marks.

use super::begin;
use super::locks::{Mutex, PoisonError};
use super::regions::Regions;
use super::watched::{Watched, Watcher};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use qcow2_core::bitmap::Bits;
use qcow2_core::chain::reads_zero;
use qcow2_core::format::text::bytes_of;
use qcow2_core::{GuestDisk, GuestRange, LiveDisk, ZeroMode};
use std::sync::Arc;

/// The most bytes that are read at a time.
const PIECE: u64 = 1 << 20;

/// What is backed up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BackupOptions {
    /// A bitmap of the top image: only regions with a marked byte are copied. `None`: everything.
    pub bitmap: Option<String>,
    /// Clear the bitmap at the moment of the backup, so that it marks what changes from then on. If the
    /// backup fails the bits are set again.
    pub clear: bool,
}

impl BackupOptions {
    /// A backup of what `bitmap` marks, which is cleared or not.
    pub fn marked(bitmap: impl Into<String>, clear: bool) -> Self {
        Self { bitmap: Some(bitmap.into()), clear }
    }
}

/// Copies `live` as it is at one moment to `target`, a disk of at least the same size, which must read as
/// zeroes, or with a bitmap as the disk did when the bitmap was last cleared.
///
/// Order:
/// 1. Requests are held back for the moment: the bits are copied, and cleared if that is wanted.
/// 2. Requests go on. A change of a region that is not copied yet copies it first, and waits for that; all
///    other regions are copied meanwhile. A region is 64 KiB or more.
/// 3. The target is flushed.
///
/// A failing target is no error of a change: the backup ends then. Nothing is written to the disk's own files
/// except bitmaps when it is closed; after a crash the target is incomplete, and the bitmap inconsistent, as
/// every bitmap that was in use is. Memory: 1 MiB of marks, the bits, 1 MiB in this call and in each request
/// that copies.
///
/// Returns the number of bytes that were copied or zeroed. Errors: `Busy`; `InvalidOption` for a target that
/// is too small; `Unsupported` for a bitmap of a disk that is no image; `NotFound`, `Metadata` for a bitmap
/// that cannot be read; `Extents`, `Read`, `Write`, `Stopped`.
pub fn backup(
    live: &LiveDisk,
    target: &Arc<dyn GuestDisk>,
    options: &BackupOptions,
    progress: &dyn Progress,
) -> Result<u64> {
    let _change = begin(live)?;
    let disk = live.layer();
    if target.size() < disk.size() {
        let text = format!("the target has {} bytes, the disk {}", target.size(), disk.size());
        return Err(Error::new(ErrorKind::InvalidOption, text));
    }
    let (copying, bits) = start(live, &disk, target, options)?;
    let copied = copying.run(progress);
    // A request that copies ends before this goes on.
    live.hold().exchange(&disk);
    let copied = copied.and_then(|()| {
        target.flush().map_err(|e| Error::new(ErrorKind::Write, "flushing the target").with_source(e))?;
        copying.failure().map_or(Ok(copying.copied()), Err)
    });
    if copied.is_err()
        && let (Some(bits), Some(name), true) = (&bits, &options.bitmap, options.clear)
        && let Some(image) = disk.as_image()
    {
        // The error to return is that of the backup. A bitmap that was removed meanwhile is not missed.
        let _ = image.merge_bitmap(&bytes_of(name), bits);
    }
    copied
}

/// The moment of the backup.
fn start(
    live: &LiveDisk,
    disk: &Arc<dyn GuestDisk>,
    target: &Arc<dyn GuestDisk>,
    options: &BackupOptions,
) -> Result<(Arc<Copying>, Option<Bits>)> {
    let mut hold = live.hold();
    let bits = options.bitmap.as_deref().map(|name| take_bits(&**disk, name, options.clear)).transpose()?;
    let regions = match &bits {
        None => Regions::all(disk.size()),
        Some(bits) => marked(disk.size(), bits),
    };
    let copying = Arc::new(Copying {
        disk: Arc::clone(disk),
        target: Arc::clone(target),
        regions,
        state: Mutex::default(),
    });
    let watched: Arc<dyn GuestDisk> =
        Arc::new(Watched { disk: Arc::clone(disk), watcher: Arc::clone(&copying) as Arc<dyn Watcher> });
    hold.exchange(&watched);
    Ok((copying, bits))
}

/// The bits of a bitmap, which is cleared if `clear`.
fn take_bits(disk: &dyn GuestDisk, name: &str, clear: bool) -> Result<Bits> {
    let image = disk
        .as_image()
        .ok_or_else(|| Error::new(ErrorKind::Unsupported, "only a qcow2 image has bitmaps"))?;
    let name = &*bytes_of(name);
    let bits = image.bitmap_bits(name).and_then(|bits| match clear {
        true => image.clear_bitmap(name).map(|()| bits),
        false => Ok(bits),
    });
    bits.map_err(|error| {
        let kind = match error.kind() {
            qcow2_core::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::Metadata,
        };
        Error::new(kind, "reading the bitmap").with_source(error)
    })
}

/// The regions with a marked byte.
fn marked(size: u64, bits: &Bits) -> Regions {
    let regions = Regions::none(size);
    for (start, len) in bits.marked_runs() {
        regions.mark(super::layer::range(start.min(size), size.min(start.saturating_add(len))));
    }
    regions
}

/// A backup while it runs.
struct Copying {
    disk: Arc<dyn GuestDisk>,
    target: Arc<dyn GuestDisk>,
    /// The regions that are as they were at the moment, and are not copied yet.
    regions: Regions,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    copied: u64,
    /// Why a change could not copy: regions have changed that are not in the target.
    failure: Option<Error>,
    failed: bool,
}

impl Copying {
    fn run(&self, progress: &dyn Progress) -> Result<()> {
        progress.set_total(self.regions.left() * self.regions.len());
        let mut buffer = Vec::new();
        loop {
            if let Some(failure) = self.failure() {
                return Err(failure);
            }
            if progress.should_stop() {
                return Err(Error::new(ErrorKind::Stopped, "stopped"));
            }
            let Some(region) = self.regions.take(0) else { return Ok(()) };
            self.copy(region, &mut buffer)?;
            progress.advance(self.regions.len());
        }
    }

    /// Copies a region that was taken, and gives it back.
    fn copy(&self, region: u64, buffer: &mut Vec<u8>) -> Result<()> {
        let bytes = self.regions.bytes(region);
        let mut at = bytes.start().value();
        let mut copied = Ok(());
        while at < bytes.end().value() && copied.is_ok() {
            let end = bytes.end().value().min(at + PIECE);
            copied = self.copy_piece(super::layer::range(at, end), buffer);
            at = end;
        }
        self.regions.give(region);
        copied.map(|()| self.state.lock().unwrap_or_else(PoisonError::into_inner).copied += bytes.len())
    }

    fn copy_piece(&self, bytes: GuestRange, buffer: &mut Vec<u8>) -> Result<()> {
        let failed = |kind, step: &str| {
            let text = format!("{step} at byte {}", bytes.start().value());
            move |e| Error::new(kind, text).with_source(e)
        };
        if reads_zero(&*self.disk, bytes).map_err(failed(ErrorKind::Extents, "reading the block status"))? {
            let zeroed = self.target.write_zeroes(bytes, ZeroMode::MayUnmap);
            return zeroed.map_err(failed(ErrorKind::Write, "writing zeroes"));
        }
        buffer.resize(bytes.len() as usize, 0);
        self.disk.read_at(bytes.start(), buffer).map_err(failed(ErrorKind::Read, "reading"))?;
        self.target.write_at(bytes.start(), buffer).map_err(failed(ErrorKind::Write, "writing"))
    }

    fn copied(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).copied
    }

    /// Why a change could not copy; told once.
    fn failure(&self) -> Option<Error> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).failure.take()
    }
}

impl Watcher for Copying {
    fn before(&self, bytes: GuestRange) {
        let mut buffer = Vec::new();
        for region in self.regions.touched(bytes) {
            if !self.regions.take_this(region) {
                continue;
            }
            if self.state.lock().unwrap_or_else(PoisonError::into_inner).failed {
                // The backup is lost already; no reason to hold changes up.
                self.regions.give(region);
            } else if let Err(error) = self.copy(region, &mut buffer) {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                (state.failed, state.failure) = (true, Some(error));
            }
        }
    }
}
