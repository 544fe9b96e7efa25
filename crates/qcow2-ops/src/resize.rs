//! Resizes a disk.

use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use qcow2_core::format::Version;
pub use qcow2_core::format::limit::MAX_DISK_SIZE;
use qcow2_core::format::limit::MAX_L1_ENTRIES;
use qcow2_core::{
    GuestDisk, GuestOffset, GuestRange, HostOffset, Image, Length, Piece, Preallocation, Storage,
    StorageErrorKind, ZeroMode,
};
use std::fmt;
use std::ops::ControlFlow;

/// The requested size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This many bytes.
    Exactly(u64),
    /// This many bytes more than now.
    Plus(u64),
    /// This many bytes less than now.
    Minus(u64),
}

/// Options of a resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResizeOptions {
    /// The new size; for a qcow2 image a multiple of 512.
    pub size: NewSize,
    /// Allow shrinking, which loses the data past the new end.
    pub shrink: bool,
    /// How to preallocate the new part of the disk.
    pub preallocation: Preallocation,
}

impl ResizeOptions {
    /// Resizes to `size`, without shrinking and without preallocation.
    pub fn new(size: NewSize) -> Self {
        Self { size, shrink: false, preallocation: Preallocation::Off }
    }

    /// With shrinking allowed, or not.
    #[must_use]
    pub fn with_shrink(self, shrink: bool) -> Self {
        Self { shrink, ..self }
    }

    /// With another preallocation of the new part.
    #[must_use]
    pub fn with_preallocation(self, preallocation: Preallocation) -> Self {
        Self { preallocation, ..self }
    }
}

/// Why a disk cannot be resized as requested. The disk is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// The new size is zero, negative or above 2^63 - 1.
    NotPositive,
    /// Preallocation was requested, but the disk does not grow.
    NothingToPreallocate,
    /// The disk would shrink, which was not allowed.
    WouldShrink,
    /// The size, which is above [`MAX_DISK_SIZE`].
    TooLarge(u64),
    /// The size, which is not a multiple of 512.
    NotSectors(u64),
    /// A version 2 image with snapshots: they may not record their own size.
    Version2Snapshots,
    /// The L1 table would exceed its limit.
    L1TooLarge,
    /// A raw disk has no metadata to preallocate.
    RawMetadata,
    /// A block device has its space: none can be reserved on it.
    PreallocationOnDevice(Preallocation),
    /// A raw disk on a storage that has one length.
    FixedLength(Length),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPositive => f.write_str("the new size is not positive"),
            Self::NothingToPreallocate => f.write_str("preallocation needs a disk that grows"),
            Self::WouldShrink => f.write_str("the disk would shrink, which was not allowed"),
            Self::TooLarge(size) => write!(f, "size is {size}, allowed is up to {MAX_DISK_SIZE}"),
            Self::NotSectors(size) => write!(f, "size {size} is not a multiple of 512"),
            Self::Version2Snapshots => f.write_str("a version 2 image with snapshots cannot be resized"),
            Self::L1TooLarge => write!(f, "the l1 table would have more than {MAX_L1_ENTRIES} entries"),
            Self::RawMetadata => f.write_str("a raw disk has no metadata to preallocate"),
            Self::PreallocationOnDevice(mode) => {
                write!(f, "preallocation is {}, not possible on a block device", mode.name())
            }
            Self::FixedLength(_) => f.write_str("the storage of the disk has a fixed length"),
        }
    }
}

impl std::error::Error for Refusal {}

/// Resizes `disk`, which is open for writing. New bytes read as zeroes, even if a longer backing file or an
/// earlier, larger disk had data there. Disk: for a qcow2 image the tables, then the size, then the
/// preallocation; the caller closes it. A crash leaves the old or the new size. A stop while shrinking leaves
/// a size in between.
///
/// Errors: `InvalidOption` with a [`Refusal`] as source, before anything is written; `Write` with the
/// engine's error; `Preallocate` with it, or `Stopped`. After a failed preallocation a grown disk is shrunk
/// to its old size again, unless that fails too.
pub fn resize(disk: &dyn GuestDisk, options: &ResizeOptions, progress: &dyn Progress) -> Result<()> {
    let size = plan(disk, options).map_err(refused)?;
    apply(disk, size, options.preallocation, progress)
}

/// Resizes `disk` to `size` bytes, which may be fewer than now, and none: for whoever has no questions to
/// ask. A disk that does not grow has nothing to preallocate. Else as [`resize`].
pub fn resize_to(
    disk: &dyn GuestDisk,
    size: u64,
    preallocation: Preallocation,
    progress: &dyn Progress,
) -> Result<()> {
    let grows = size > disk.size();
    // A device takes no preallocation, whatever its size; what becomes smaller needs none.
    let asked = if grows || disk.as_raw().is_some() { preallocation } else { Preallocation::Off };
    let size = check(disk, size, asked).map_err(refused)?;
    let preallocation = if grows { preallocation } else { Preallocation::Off };
    apply(disk, size, preallocation, progress)
}

fn refused(refusal: Refusal) -> Error {
    Error::new(ErrorKind::InvalidOption, "resizing").with_source(refusal)
}

fn apply(
    disk: &dyn GuestDisk,
    size: u64,
    preallocation: Preallocation,
    progress: &dyn Progress,
) -> Result<()> {
    let old = disk.size();
    let failed =
        |e: qcow2_core::Error| Error::new(ErrorKind::Write, "could not resize the disk").with_source(e);
    let go_on = || if progress.should_stop() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let resized = match disk.as_image() {
        Some(image) => image.resize_while(size, &mut { go_on }),
        None => disk.resize(size),
    };
    resized.map_err(|error| match error.kind() {
        qcow2_core::ErrorKind::Stopped => Error::new(ErrorKind::Stopped, error.to_string()),
        _ => failed(error),
    })?;
    let preallocation = match (preallocation, length_of(disk)) {
        (Preallocation::Falloc | Preallocation::Full, Length::Export | Length::Window | Length::Fixed) => {
            Preallocation::Metadata
        }
        (mode, _) => mode,
    };
    if preallocation != Preallocation::Off {
        let new = GuestRange::between(GuestOffset::new(old), GuestOffset::new(size));
        if let Err(error) = fill(disk, new, preallocation, progress) {
            // Report the preallocation error, even if shrinking fails as well.
            let _ = disk.resize(old);
            return Err(match error.kind() {
                qcow2_core::ErrorKind::Stopped => Error::new(ErrorKind::Stopped, "resizing was stopped"),
                _ => Error::new(ErrorKind::Preallocate, "could not preallocate the new part of the disk")
                    .with_source(error),
            });
        }
    }
    disk.flush().map_err(failed)
}

/// Preallocates the new part of a disk, durably.
fn fill(
    disk: &dyn GuestDisk,
    new: GuestRange,
    mode: Preallocation,
    progress: &dyn Progress,
) -> qcow2_core::Result<()> {
    match (disk.as_image(), disk.as_raw()) {
        (Some(image), _) => preallocate(image, new, mode, progress)?,
        (_, Some(raw)) => {
            reserve(&**raw.storage(), HostOffset::new(new.start().value()), new.len(), mode, progress)?
        }
        _ => {}
    }
    disk.flush()
}

/// What the storage of a disk's data says of its length.
fn length_of(disk: &dyn GuestDisk) -> Length {
    let limits = match (disk.as_image(), disk.as_raw()) {
        (Some(image), _) => image.data_storage().map(|storage| storage.limits()),
        (_, Some(raw)) => Some(raw.storage().limits()),
        _ => None,
    };
    limits.unwrap_or_default().length
}

/// The new size in bytes, if it is allowed.
pub(crate) fn plan(disk: &dyn GuestDisk, options: &ResizeOptions) -> Result<u64, Refusal> {
    // A raw disk counts in whole sectors.
    let old = disk.size().checked_next_multiple_of(512).unwrap_or_else(|| disk.size());
    let size = match options.size {
        NewSize::Exactly(size) => Some(size),
        NewSize::Plus(bytes) => old.checked_add(bytes),
        NewSize::Minus(bytes) => old.checked_sub(bytes),
    };
    let size = size.filter(|&size| size > 0 && i64::try_from(size).is_ok()).ok_or(Refusal::NotPositive)?;
    if size <= old && options.preallocation != Preallocation::Off {
        return Err(Refusal::NothingToPreallocate);
    }
    if size < old && !options.shrink {
        return Err(Refusal::WouldShrink);
    }
    check(disk, size, options.preallocation)
}

/// `size`, if the disk can have it.
fn check(disk: &dyn GuestDisk, size: u64, preallocation: Preallocation) -> Result<u64, Refusal> {
    if size > MAX_DISK_SIZE {
        return Err(Refusal::TooLarge(size));
    }
    let length = length_of(disk);
    let Some(image) = disk.as_image() else {
        return match (length, preallocation) {
            (Length::Window | Length::Fixed, _) => Err(Refusal::FixedLength(length)),
            (Length::Device, mode) if mode != Preallocation::Off => Err(Refusal::PreallocationOnDevice(mode)),
            (Length::Grows, Preallocation::Metadata) => Err(Refusal::RawMetadata),
            _ => Ok(size),
        };
    };
    if let (Length::Device, mode @ (Preallocation::Falloc | Preallocation::Full)) = (length, preallocation) {
        return Err(Refusal::PreallocationOnDevice(mode));
    }
    let header = image.header();
    if !size.is_multiple_of(512) {
        return Err(Refusal::NotSectors(size));
    }
    if header.version < Version::V3 && header.nb_snapshots > 0 {
        return Err(Refusal::Version2Snapshots);
    }
    if image.geometry().l1_entries_for(size) > MAX_L1_ENTRIES {
        return Err(Refusal::L1TooLarge);
    }
    Ok(size)
}

/// Allocates every cluster of `range`, which reads as zeroes.
fn preallocate(
    image: &Image,
    range: GuestRange,
    mode: Preallocation,
    progress: &dyn Progress,
) -> qcow2_core::Result<()> {
    let Some(storage) = image.data_storage() else { return Ok(()) };
    let mut at = range.start();
    while at < range.end() {
        check_stop(progress)?;
        let ticket = image.prepare_write(GuestRange::between(at, range.end()))?;
        for piece in ticket.pieces() {
            match piece {
                Piece::Guest { host } => reserve(&**storage, host, ticket.range().len(), mode, progress)?,
                Piece::Bytes { host, bytes } => storage.write_at(host, bytes)?,
                Piece::Zeroes { host, len } => storage.write_zeroes(host, len, ZeroMode::MayUnmap)?,
                _ => {}
            }
        }
        at = ticket.range().end();
        ticket.commit()?;
    }
    Ok(())
}

/// Makes `len` bytes of a storage read as zeroes, with disk space allocated according to `mode`.
fn reserve(
    storage: &dyn Storage,
    start: HostOffset,
    len: u64,
    mode: Preallocation,
    progress: &dyn Progress,
) -> qcow2_core::Result<()> {
    match mode {
        Preallocation::Falloc => {
            // Zeroed first: `allocate` keeps the content.
            storage.write_zeroes(start, len, ZeroMode::KeepAllocated)?;
            match storage.allocate(start, len) {
                // Some file systems cannot reserve; what is written has its space as well.
                Err(error) if error.kind() == StorageErrorKind::Unsupported => {
                    reserve(storage, start, len, Preallocation::Full, progress)?;
                }
                done => done?,
            }
        }
        Preallocation::Full => {
            let zeroes = vec![0; usize::try_from(len.min(PIECE)).unwrap_or(0)];
            let mut done = 0;
            while done < len {
                check_stop(progress)?;
                let piece = (len - done).min(PIECE);
                storage.write_at(
                    HostOffset::new(start.value() + done),
                    &zeroes[..usize::try_from(piece).unwrap_or(0)],
                )?;
                done += piece;
            }
        }
        _ => storage.write_zeroes(start, len, ZeroMode::MayUnmap)?,
    }
    Ok(())
}

fn check_stop(progress: &dyn Progress) -> qcow2_core::Result<()> {
    match progress.should_stop() {
        true => Err(qcow2_core::Error::new(qcow2_core::ErrorKind::Stopped, "preallocation was stopped")),
        false => Ok(()),
    }
}

/// Bytes of zeroes per write.
const PIECE: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDisk;

    #[track_caller]
    fn check(size: NewSize, change: impl FnOnce(&mut ResizeOptions), expected: Result<u64, Refusal>) {
        let mut options = ResizeOptions::new(size);
        change(&mut options);
        assert_eq!(plan(&TestDisk::empty(1 << 20, 0), &options), expected);
    }

    #[test]
    fn sizes_are_checked() {
        use NewSize::*;
        check(Exactly(5), |o| o.shrink = true, Ok(5));
        check(Exactly(5), |_| {}, Err(Refusal::WouldShrink));
        check(Exactly(1 << 20), |_| {}, Ok(1 << 20));
        check(Plus(1), |_| {}, Ok((1 << 20) + 1));
        check(Minus(1 << 20), |o| o.shrink = true, Err(Refusal::NotPositive));
        check(Minus(u64::MAX), |o| o.shrink = true, Err(Refusal::NotPositive));
        check(Plus(i64::MAX as u64), |_| {}, Err(Refusal::NotPositive));
        check(Plus(u64::MAX), |_| {}, Err(Refusal::NotPositive));
        check(Exactly(1 << 63), |_| {}, Err(Refusal::NotPositive));
        check(Exactly(i64::MAX as u64), |_| {}, Err(Refusal::TooLarge(i64::MAX as u64)));
        check(Exactly(MAX_DISK_SIZE), |_| {}, Ok(MAX_DISK_SIZE));
        let full = |o: &mut ResizeOptions| (o.preallocation, o.shrink) = (Preallocation::Full, true);
        check(Exactly(1 << 20), full, Err(Refusal::NothingToPreallocate));
        check(Exactly(5), full, Err(Refusal::NothingToPreallocate));
        check(Plus(5), |o| o.preallocation = Preallocation::Metadata, Err(Refusal::RawMetadata));
    }
}
