//! Amends an image: format version, features, refcount width, size, key slots.

use crate::error::{Error, ErrorKind, Result};
use crate::port::{KeySlots, Reopen};
use crate::progress::Progress;
use crate::resize::{NewSize, ResizeOptions, plan as plan_size};
use qcow2_core::format::Version;
use qcow2_core::format::feature::{AutoclearFeatures, CompatibleFeatures, IncompatibleFeatures};
use qcow2_core::format::header::CryptMethod;
use qcow2_core::{GuestDisk, HeaderChange, HostOffset, Image};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

/// The changes to make; `None` leaves a property unchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AmendOptions {
    /// The format version.
    pub version: Option<Version>,
    /// Allow refcount updates to be postponed while the image is open (lazy refcounts).
    pub lazy_refcounts: Option<bool>,
    /// Refcount width in bits.
    pub refcount_bits: Option<u64>,
    /// Virtual size in bytes; may shrink the disk.
    pub size: Option<u64>,
    /// Name of the external data file; empty removes the recorded name.
    pub data_file: Option<String>,
    /// Set to `false` to record that the external data file is no longer a raw copy of the guest disk. It
    /// cannot be declared one.
    pub data_file_raw: Option<bool>,
    /// Name of the backing file; must equal the current one.
    pub backing_file: Option<String>,
    /// Format of the backing file; must equal the current one.
    pub backing_format: Option<String>,
}

impl AmendOptions {
    /// With another format version.
    #[must_use]
    pub fn with_version(self, version: Version) -> Self {
        Self { version: Some(version), ..self }
    }

    /// With lazy refcounts, or without.
    #[must_use]
    pub fn with_lazy_refcounts(self, lazy_refcounts: bool) -> Self {
        Self { lazy_refcounts: Some(lazy_refcounts), ..self }
    }

    /// With refcounts of another width.
    #[must_use]
    pub fn with_refcount_bits(self, refcount_bits: u64) -> Self {
        Self { refcount_bits: Some(refcount_bits), ..self }
    }

    /// With another virtual size in bytes.
    #[must_use]
    pub fn with_size(self, size: u64) -> Self {
        Self { size: Some(size), ..self }
    }

    /// With another name of the external data file; empty removes the recorded one.
    #[must_use]
    pub fn with_data_file(self, data_file: impl Into<String>) -> Self {
        Self { data_file: Some(data_file.into()), ..self }
    }

    /// With a data file that is a raw copy of the guest disk, or not.
    #[must_use]
    pub fn with_data_file_raw(self, data_file_raw: bool) -> Self {
        Self { data_file_raw: Some(data_file_raw), ..self }
    }

    /// With this backing file, which must be the current one.
    #[must_use]
    pub fn with_backing_file(self, backing_file: impl Into<String>) -> Self {
        Self { backing_file: Some(backing_file.into()), ..self }
    }

    /// With this format of the backing file, which must be the current one.
    #[must_use]
    pub fn with_backing_format(self, backing_format: impl Into<String>) -> Self {
        Self { backing_format: Some(backing_format.into()), ..self }
    }
}

/// Why an image cannot be amended as requested. The image is unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// The refcount width is not a power of two up to 64.
    RefcountBits(u64),
    /// Refcount widths other than 16 bits need version 3.
    RefcountBitsNeedVersion3,
    /// A data file name was given for an image without a data file.
    NoDataFile,
    /// An existing data file cannot be declared raw.
    DataFileRaw,
    /// The backing file differs from the current one; use rebase.
    BackingFile,
    /// Lazy refcounts need version 3.
    LazyRefcountsNeedVersion3,
    /// Version 2 has no external data file.
    DowngradeDataFile,
    /// Version 2 has no incompatible features; the bits that are set.
    DowngradeFeatures(u64),
    /// Version 2 only has 16-bit refcounts.
    DowngradeRefcountBits,
    /// A snapshot cannot be represented in version 2.
    DowngradeSnapshots,
    /// The image is not encrypted, so it has no key slots.
    NotEncrypted,
    /// The encryption method has no key slots.
    NoKeySlots,
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
            Self::NotEncrypted => f.write_str("the image is not encrypted"),
            Self::NoKeySlots => f.write_str("only LUKS encryption has key slots"),
        }
    }
}

impl std::error::Error for Refusal {}

/// Amends an image, from the first check to the close. `disk`: the image, opened for writing with its backing
/// chain. Some steps (version, refcount width) rewrite so much that the image must be opened again; `amend`
/// then drops `disk` and calls `reopen`. `slots`: key slots to change as well. Impossible requests are
/// refused before anything changes.
///
/// Disk: writes the key slots, then the steps in the only order that works: upgrade, refcount width, header
/// fields, size, downgrade; see the engine's methods. Each step is durable before the next begins, so a power
/// cut leaves the image between two steps. The image is closed at the end, also after an error. `progress`
/// counts refcount blocks and tables, not bytes.
///
/// Errors: `Unsupported` for a disk that is not a qcow2 image; `InvalidOption` with a [`Refusal`] or a
/// [`resize::Refusal`](crate::resize::Refusal) as source; `Open` with the error of `reopen`; `Write` with the
/// engine's error or, for key slots, that of `slots`; `Stopped`, with the image before or between two steps.
pub fn amend(
    mut disk: Arc<dyn GuestDisk>,
    reopen: &dyn Reopen,
    options: &AmendOptions,
    mut slots: Option<&dyn KeySlots>,
    progress: &dyn Progress,
) -> Result<()> {
    let mut checked = false;
    loop {
        let image = disk
            .as_image()
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, "only a qcow2 image can be amended"))?;
        // Once: what a later step finds is what an earlier one has made.
        let stepped = if checked { Ok(()) } else { check(image, options) };
        checked = true;
        let stepped = stepped
            .and_then(|()| slots.take().map_or(Ok(()), |slots| change_slots(image, slots)))
            .and_then(|()| step(image, options, progress).map_err(step_failed));
        match stepped {
            Ok(Amended::Done) => return close(image).map_err(step_failed),
            // The image must be opened again. Drop it first, so that its file locks are free.
            Ok(Amended::Again) => drop(disk),
            Err(error) => {
                let _ = close(image);
                return Err(error);
            }
        }
        disk = reopen
            .reopen()
            .map_err(|e| Error::new(ErrorKind::Open, "opening the amended image").with_boxed_source(e))?;
    }
}

/// What is left to do after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Amended {
    /// Nothing: the image can be closed.
    Done,
    /// The step changed the image so much that it must be opened again for the rest.
    Again,
}

fn step_failed(error: qcow2_core::Error) -> Error {
    match error.kind() {
        qcow2_core::ErrorKind::Stopped => Error::new(ErrorKind::Stopped, "amending was stopped"),
        _ => Error::new(ErrorKind::Write, "could not amend the image").with_source(error),
    }
}

fn close(image: &Image) -> qcow2_core::Result<()> {
    image.flush()?;
    image.close()
}

fn change_slots(image: &Image, slots: &dyn KeySlots) -> Result<()> {
    let at = volume(image)
        .map_err(|refusal| Error::new(ErrorKind::InvalidOption, "changing key slots").with_source(refusal))?;
    slots
        .change(&**image.storage(), at)
        .map_err(|e| Error::new(ErrorKind::Write, "changing key slots").with_boxed_source(e))
}

/// Host offset of the encryption header with the key slots of `image`.
fn volume(image: &Image) -> Result<HostOffset, Refusal> {
    let header = image.header();
    match (header.crypt_method, header.extensions.luks) {
        (CryptMethod::None, _) => Err(Refusal::NotEncrypted),
        (CryptMethod::Luks, Some(luks)) => Ok(luks.offset),
        _ => Err(Refusal::NoKeySlots),
    }
}

/// Checks that `image` can be amended as requested. Changes nothing. Errors: as [`amend`]'s `InvalidOption`.
fn check(image: &Image, options: &AmendOptions) -> Result<()> {
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
    // Only version 3 has other refcount widths and the header fields, so the upgrade comes first. The
    // downgrade comes last: it needs an image that version 2 can represent already.
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
    let raw = header.features.autoclear.contains(AutoclearFeatures::RAW_DATA_FILE);
    if options.data_file_raw == Some(true) && !raw {
        return Err(Refusal::DataFileRaw);
    }
    if let Some(bits) = options.refcount_bits.filter(|&bits| !bits.is_power_of_two() || bits > 64) {
        return Err(Refusal::RefcountBits(bits));
    }
    let width = u64::from(image.geometry().refcount_width().bits());
    let needs_version_3 = |&bits: &u64| bits != width && bits != VERSION_2_REFCOUNT_BITS;
    if options.refcount_bits.as_ref().is_some_and(needs_version_3) && wanted < Version::V3 {
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
    let lazy = header.features.compatible.contains(CompatibleFeatures::LAZY_REFCOUNTS);
    if options.lazy_refcounts == Some(true) && !lazy && wanted < Version::V3 {
        return Err(Refusal::LazyRefcountsNeedVersion3);
    }
    Ok(())
}

/// Checks that version 2 can represent the image.
fn check_downgrade(image: &Image, options: &AmendOptions) -> Result<(), Refusal> {
    let header = image.header();
    if options.version.is_none_or(|wanted| wanted >= header.version) {
        return Ok(());
    }
    if header.has_data_file() {
        return Err(Refusal::DowngradeDataFile);
    }
    // The compression type bit may be set if no cluster is compressed; the engine checks that.
    let may_go = IncompatibleFeatures::DIRTY.bits() | IncompatibleFeatures::COMPRESSION_TYPE.bits();
    let features = IncompatibleFeatures::from_bits(header.features.incompatible.bits() & !may_go);
    if !features.is_empty() {
        return Err(Refusal::DowngradeFeatures(features.bits()));
    }
    // Another width comes before the downgrade.
    let width = u64::from(image.geometry().refcount_width().bits());
    if options.refcount_bits.unwrap_or(width) != VERSION_2_REFCOUNT_BITS {
        return Err(Refusal::DowngradeRefcountBits);
    }
    let size = options.size.unwrap_or(image.size());
    let snapshots = image.snapshots().unwrap_or_default();
    match snapshots.iter().all(|s| s.disk_size == size && s.vm_state_size <= u64::from(u32::MAX)) {
        true => Ok(()),
        false => Err(Refusal::DowngradeSnapshots),
    }
}

/// The only width of version 2.
const VERSION_2_REFCOUNT_BITS: u64 = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::CallerError;
    use crate::progress::Silent;
    use qcow2_core::{ImageFormat, NoResolver, OpenOptions, ResolvedSource, Storage};
    use qcow2_testkit::builder::{Builder, Cluster};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn image() -> Arc<dyn Storage> {
        Arc::new(Builder::new(16, 1 << 20).cluster(0, Cluster::Data(vec![7; 65_536])).build().storage())
    }

    fn open(storage: &Arc<dyn Storage>) -> Arc<dyn GuestDisk> {
        let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
        let storage = Arc::clone(storage);
        let source = ResolvedSource { storage, format, name: "image".into(), id: None, resolver };
        Image::open(source, &OpenOptions::writable()).unwrap()
    }

    struct Refuse;

    impl KeySlots for Refuse {
        fn change(&self, _: &dyn Storage, _: HostOffset) -> Result<(), CallerError> {
            panic!("key slots changed in an image without encryption");
        }
    }

    #[test]
    fn version_and_width_changes_reopen_the_image() {
        let storage = image();
        let opened = AtomicUsize::new(0);
        let reopen = || {
            opened.fetch_add(1, Ordering::Relaxed);
            Ok(open(&storage))
        };
        let mut options = AmendOptions { refcount_bits: Some(64), ..AmendOptions::default() };
        options.size = Some(2 << 20);
        amend(open(&storage), &reopen, &options, None, &Silent).unwrap();
        assert_eq!(opened.load(Ordering::Relaxed), 1);
        let disk = open(&storage);
        let image = disk.as_image().unwrap();
        assert_eq!((image.size(), image.geometry().refcount_width().bits()), (2 << 20, 64));
        assert!(!image.header().is_dirty(), "the image was closed");
        let back = AmendOptions { version: Some(Version::V2), ..AmendOptions::default() };
        let refused = amend(disk, &reopen, &back, None, &Silent).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidOption);
        let width = AmendOptions { refcount_bits: Some(16), ..AmendOptions::default() };
        amend(open(&storage), &reopen, &width, None, &Silent).unwrap();
        amend(open(&storage), &reopen, &back, None, &Silent).unwrap();
        assert_eq!(open(&storage).as_image().unwrap().header().version, Version::V2);
    }

    /// Changes that exclude each other at the end, but not in their order, are made together.
    #[test]
    fn a_downgrade_comes_after_the_changes_that_allow_it() {
        let storage = image();
        let reopen = || Ok(open(&storage));
        let header = || open(&storage).as_image().unwrap().header();
        let wide = AmendOptions::default().with_refcount_bits(1).with_lazy_refcounts(true);
        amend(open(&storage), &reopen, &wide, None, &Silent).unwrap();
        assert!(header().extensions.feature_names.is_none(), "the builder leaves them out");
        let down = AmendOptions::default().with_version(Version::V2).with_refcount_bits(16);
        amend(open(&storage), &reopen, &down.with_lazy_refcounts(true), None, &Silent).unwrap();
        assert_eq!((header().version, header().features.compatible.bits()), (Version::V2, 0));
        let up = AmendOptions::default().with_version(Version::V3).with_refcount_bits(64).with_size(2 << 20);
        amend(open(&storage), &reopen, &up.with_lazy_refcounts(true), None, &Silent).unwrap();
        assert_eq!((header().version, header().size, header().refcount_order), (Version::V3, 2 << 20, 6));
        assert!(header().extensions.feature_names.is_some_and(|names| !names.is_empty()));
        let back = AmendOptions::default().with_version(Version::V2);
        let narrow = back.clone().with_refcount_bits(16);
        assert!(amend(open(&storage), &reopen, &back, None, &Silent).is_err());
        amend(open(&storage), &reopen, &narrow, None, &Silent).unwrap();
        assert!(header().extensions.feature_names.is_none());
    }

    #[test]
    fn failed_reopen_keeps_the_callers_error() {
        let storage = image();
        let reopen = || Err(std::io::Error::other("locked").into());
        let options = AmendOptions { refcount_bits: Some(1), ..AmendOptions::default() };
        let error = amend(open(&storage), &reopen, &options, None, &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Open);
        assert_eq!(error.caller_error::<std::io::Error>().unwrap().to_string(), "locked");
        // The step before the failed reopen is complete and stays.
        let disk = open(&storage);
        assert_eq!(disk.as_image().unwrap().geometry().refcount_width().bits(), 1);
    }

    #[test]
    fn key_slots_without_encryption_are_refused_before_any_change() {
        let storage = image();
        let reopen = || -> Result<Arc<dyn GuestDisk>, CallerError> { panic!("must not reopen") };
        let options = AmendOptions { size: Some(2 << 20), ..AmendOptions::default() };
        let error = amend(open(&storage), &reopen, &options, Some(&Refuse), &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidOption);
        assert_eq!(error.caller_error::<Refusal>().ok(), Some(Refusal::NotEncrypted));
        assert_eq!(open(&storage).size(), 1 << 20);
    }
}
