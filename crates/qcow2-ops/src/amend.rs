//! Changing what an image is: its version, its features, its size.

use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::resize::{NewSize, ResizeOptions, plan as plan_size};
use qcow2_core::format::Version;
use qcow2_core::format::feature::{AutoclearFeatures, CompatibleFeatures, IncompatibleFeatures};
use qcow2_core::{GuestDisk, HeaderChange, Image};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Mutex;

/// What is to be different; `None` leaves a thing as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AmendOptions {
    /// The version of the format.
    pub version: Option<Version>,
    /// Whether refcounts may be brought up to date later.
    pub lazy_refcounts: Option<bool>,
    /// Bits of a refcount.
    pub refcount_bits: Option<u64>,
    /// Bytes of the disk; it may get shorter.
    pub size: Option<u64>,
    /// The external data file's name; empty: none is recorded.
    pub data_file: Option<String>,
    /// Whether the external data file is the guest disk byte for byte; can be given up only.
    pub data_file_raw: Option<bool>,
    /// The backing file's name; must be the one there is.
    pub backing_file: Option<String>,
    /// The backing file's format; must be the one there is.
    pub backing_format: Option<String>,
}

/// Why an image cannot be amended as asked; it is as before.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// No power of two up to 64.
    RefcountBits(u64),
    /// Other refcounts than those of 16 bits are for version 3.
    RefcountBitsNeedVersion3,
    /// A data file's name for an image without one.
    NoDataFile,
    /// An existing data file is not made raw.
    DataFileRaw,
    /// Another backing file: that is a rebase.
    BackingFile,
    /// Lazy refcounts are for version 3.
    LazyRefcountsNeedVersion3,
    /// Version 2 has no data files.
    DowngradeDataFile,
    /// Version 2 has none of these incompatible features.
    DowngradeFeatures(u64),
    /// Version 2 has refcounts of 16 bits.
    DowngradeRefcountBits,
    /// A snapshot does not fit into version 2.
    DowngradeSnapshots,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RefcountBits(bits) => {
                write!(f, "refcount width {bits}, allowed are powers of two up to 64")
            }
            Self::RefcountBitsNeedVersion3 => f.write_str("refcounts of version 2 have 16 bits"),
            Self::NoDataFile => f.write_str("the image has no external data file"),
            Self::DataFileRaw => f.write_str("an existing data file cannot be made raw"),
            Self::BackingFile => f.write_str("the backing file is changed by a rebase"),
            Self::LazyRefcountsNeedVersion3 => f.write_str("lazy refcounts are for version 3"),
            Self::DowngradeDataFile => f.write_str("version 2 has no external data files"),
            Self::DowngradeFeatures(bits) => {
                write!(f, "version 2 has no incompatible features, these are {bits:#x}")
            }
            Self::DowngradeRefcountBits => f.write_str("version 2 has refcounts of 16 bits"),
            Self::DowngradeSnapshots => f.write_str("a snapshot does not fit into version 2"),
        }
    }
}

impl std::error::Error for Refusal {}

/// Whether all is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amended {
    /// Everything is as asked for; the image may be closed.
    Done,
    /// The image is another now and takes no further changes: open it anew and amend again.
    Again,
}

/// Brings `image`, which is open for writing with its chain, a step nearer to `options`; the caller repeats
/// it as it says. What is impossible is refused before anything changes. Disk: see the engine's calls; every
/// step is durable when it returns, and a power cut leaves the image between two steps. `progress` counts
/// refcount blocks and tables, in no unit that means bytes.
///
/// Errors: `InvalidOption` with a [`Refusal`] or a [`resize::Refusal`](crate::resize::Refusal) below; `Write`
/// with the engine's error; `Stopped`, the image being before or between two steps, to be closed as ever.
pub fn amend(image: &Image, options: &AmendOptions, progress: &dyn Progress) -> Result<Amended> {
    check(image, options)?;
    step(image, options, progress).map_err(|e| match e.kind() {
        qcow2_core::ErrorKind::Stopped => Error::new(ErrorKind::Stopped, "amending was stopped"),
        _ => Error::new(ErrorKind::Write, "could not amend the image").with_source(e),
    })
}

/// Whether `image` can be amended so; changes nothing. Errors: `InvalidOption` as [`amend`]'s.
pub fn check(image: &Image, options: &AmendOptions) -> Result<()> {
    let refused = |refusal| Error::new(ErrorKind::InvalidOption, "amending").with_source(refusal);
    check_features(image, options).map_err(refused)?;
    check_downgrade(image, options).map_err(refused)?;
    if let Some(size) = options.size {
        let refused = |refusal| Error::new(ErrorKind::InvalidOption, "resizing").with_source(refusal);
        plan_size(image, &resize_to(size)).map_err(refused)?;
    }
    Ok(())
}

fn step(image: &Image, options: &AmendOptions, progress: &dyn Progress) -> qcow2_core::Result<Amended> {
    let header = image.header();
    let counted = Mutex::new(0);
    let mut count = |done: u64, of: u64| {
        progress.set_total(of);
        if let Ok(mut last) = counted.lock() {
            progress.advance(done.saturating_sub(*last));
            *last = done;
        }
        match progress.should_stop() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let wanted = options.version.unwrap_or(header.version);
    if wanted > header.version {
        image.upgrade()?;
        return Ok(Amended::Again);
    }
    let bits = image.geometry().refcount_width().bits();
    if let Some(new) =
        options.refcount_bits.and_then(|new| u32::try_from(new).ok()).filter(|&new| new != bits)
    {
        image.set_refcount_bits(new, &mut count)?;
        return Ok(Amended::Again);
    }
    let mut change = HeaderChange::default();
    change.lazy_refcounts = options.lazy_refcounts.filter(|_| wanted >= Version::V3);
    change.data_file = options.data_file.clone();
    change.forget_raw_data_file = options.data_file_raw == Some(false);
    image.change_header(&change)?;
    if let Some(size) = options.size.filter(|&size| size != image.size()) {
        image.resize(size)?;
        image.flush()?;
    }
    if wanted < header.version {
        image.downgrade(&mut count)?;
        return Ok(Amended::Again);
    }
    Ok(Amended::Done)
}

fn resize_to(size: u64) -> ResizeOptions {
    ResizeOptions { shrink: true, ..ResizeOptions::new(NewSize::Exactly(size)) }
}

fn check_features(image: &Image, options: &AmendOptions) -> Result<(), Refusal> {
    let header = image.header();
    let wanted = options.version.unwrap_or(header.version);
    if options.data_file.is_some() && !header.has_data_file() {
        return Err(Refusal::NoDataFile);
    }
    let raw = header.autoclear_features.contains(AutoclearFeatures::RAW_DATA_FILE);
    if options.data_file_raw == Some(true) && !raw {
        return Err(Refusal::DataFileRaw);
    }
    if let Some(bits) = options.refcount_bits.filter(|&bits| !bits.is_power_of_two() || bits > 64) {
        return Err(Refusal::RefcountBits(bits));
    }
    let width = u64::from(image.geometry().refcount_width().bits());
    if options.refcount_bits.is_some_and(|bits| bits != width) && wanted < Version::V3 {
        return Err(Refusal::RefcountBitsNeedVersion3);
    }
    let differs = |new: &Option<String>, old: Option<String>| new.is_some() && *new != old;
    let named = options.backing_file.is_some() || options.backing_format.is_some();
    let other = differs(&options.backing_file, header.backing_file_name())
        || differs(&options.backing_format, header.extensions.backing_format_name());
    let half = options.backing_file.is_some() != options.backing_format.is_some();
    if named && (other || half) {
        return Err(Refusal::BackingFile);
    }
    let lazy = header.compatible_features.contains(CompatibleFeatures::LAZY_REFCOUNTS);
    if options.lazy_refcounts == Some(true) && !lazy && wanted < Version::V3 {
        return Err(Refusal::LazyRefcountsNeedVersion3);
    }
    Ok(())
}

/// What version 2 cannot say.
fn check_downgrade(image: &Image, options: &AmendOptions) -> Result<(), Refusal> {
    let header = image.header();
    if options.version.is_none_or(|wanted| wanted >= header.version) {
        return Ok(());
    }
    if header.has_data_file() {
        return Err(Refusal::DowngradeDataFile);
    }
    // The compression type may go where nothing is compressed, which the engine looks for.
    let may_go = IncompatibleFeatures::DIRTY.bits() | IncompatibleFeatures::COMPRESSION_TYPE.bits();
    let features = IncompatibleFeatures::from_bits(header.incompatible_features.bits() & !may_go);
    if !features.is_empty() {
        return Err(Refusal::DowngradeFeatures(features.bits()));
    }
    if image.geometry().refcount_width().bits() != 16 {
        return Err(Refusal::DowngradeRefcountBits);
    }
    let size = options.size.unwrap_or(image.size());
    let snapshots = image.snapshots().unwrap_or_default();
    match snapshots.iter().all(|s| s.disk_size == size && s.vm_state_size <= u64::from(u32::MAX)) {
        true => Ok(()),
        false => Err(Refusal::DowngradeSnapshots),
    }
}
