//! An external snapshot of a disk in use.

use super::begin;
use crate::chain::close;
use crate::error::{Error, ErrorKind, Result};
use crate::port::{NewStorage, RecordTop};
use qcow2_core::{
    CreateOptions, GuestDisk, Image, ImageFormat, LiveDisk, OpenOptions, ResolvedSource, Storage,
};
use std::sync::Arc;

/// Options of a live external snapshot.
#[derive(Clone)]
#[non_exhaustive]
pub struct LiveSnapshotOptions {
    /// The properties of the overlay, with the name and the format of the old top as its backing file. The
    /// size is that of the disk, whatever is here.
    pub overlay: CreateOptions,
    /// How the overlay is opened; always for writing.
    pub open: OpenOptions,
}

impl LiveSnapshotOptions {
    /// An overlay of the default kind that records the old top as `backing_file` of the format
    /// `backing_format`.
    pub fn new(backing_file: impl Into<String>, backing_format: impl Into<String>) -> Self {
        let overlay = CreateOptions::new(0).with_backing(backing_file, backing_format);
        Self { overlay, open: OpenOptions::writable() }
    }

    /// These options with the overlay opened like this.
    #[must_use]
    pub fn with_open(self, open: OpenOptions) -> Self {
        Self { open, ..self }
    }
}

/// The result of a live external snapshot.
pub struct LiveSnapshot {
    /// The old top, now the layer below the new one.
    pub old: Arc<dyn GuestDisk>,
    /// Why the old top could not be closed. It is complete and is read all the same; but its bitmaps are not
    /// stored, and an unclean shutdown is recorded in it if its refcounts are updated lazily.
    pub unclean: Option<Error>,
}

/// Makes a new overlay the top of `live`; what was the top is only read from then on. `new`: makes the
/// overlay's file. `record`: records it as the one to open.
///
/// Order:
/// 1. The overlay is created and made durable, and opened on the old top. The old top is flushed.
/// 2. Requests are held back.
/// 3. The old top is flushed: what was written before the snapshot is never lost, however soon it is followed
///    by a flush of the overlay alone.
/// 4. `record`.
/// 5. The overlay becomes the top, and requests go on.
/// 6. The old top is closed: its bitmaps are stored, its dirty bit is cleared.
///
/// A crash leaves the old top or, after step 4, the chain with the overlay; both read alike until the guest
/// writes again. An error in steps 1 to 4 leaves the old top in use, and the new file is discarded.
///
/// Errors: `Busy`; `InvalidOption` for a disk whose size is no multiple of 512 bytes, or with a
/// [`Refusal`](qcow2_core::Refusal) as source; `Create` with the caller's or the engine's error; `Write` if
/// the old top cannot be flushed; `Metadata` with the error of `record`.
pub fn external_snapshot(
    live: &LiveDisk,
    new: &dyn NewStorage,
    record: &dyn RecordTop,
    options: &LiveSnapshotOptions,
) -> Result<LiveSnapshot> {
    let _change = begin(live)?;
    let old = live.layer();
    let create = checked(options, old.size())?;
    let storage =
        new.make().map_err(|e| Error::new(ErrorKind::Create, "making the file").with_boxed_source(e))?;
    let overlay = make_overlay(storage, &create, options, &old);
    if let Err(error) = overlay.and_then(|overlay| switch(live, &overlay, record)) {
        new.discard();
        return Err(error);
    }
    let unclean = close(&*old).err();
    Ok(LiveSnapshot { old, unclean })
}

/// The options of an overlay of `size` bytes.
fn checked(options: &LiveSnapshotOptions, size: u64) -> Result<CreateOptions> {
    let invalid = |text: String| Error::new(ErrorKind::InvalidOption, text);
    if !size.is_multiple_of(512) {
        return Err(invalid(format!("the disk has {size} bytes, allowed are multiples of 512")));
    }
    let mut create = options.overlay.clone();
    create.size = size;
    if create.backing_file.is_none() || create.data_file.is_some() {
        return Err(invalid("an overlay needs a backing file, and has no external data file".to_owned()));
    }
    create.check().map_err(|e| invalid("creating the image".to_owned()).with_source(e))?;
    Ok(create)
}

fn make_overlay(
    storage: Arc<dyn Storage>,
    create: &CreateOptions,
    options: &LiveSnapshotOptions,
    old: &Arc<dyn GuestDisk>,
) -> Result<Arc<dyn GuestDisk>> {
    let failed = |e| Error::new(ErrorKind::Create, "creating the image").with_source(e);
    qcow2_core::create(&storage, None, create).map_err(failed)?;
    let source = ResolvedSource::new(storage, ImageFormat::Qcow2, "overlay");
    let mut open = options.open.clone();
    open.writable = true;
    let below = Arc::new(LiveDisk::frozen(Arc::clone(old)));
    Ok(Image::open_on(&source, &open, below).map_err(failed)?)
}

/// Puts `overlay` in the place of the top.
fn switch(live: &LiveDisk, overlay: &Arc<dyn GuestDisk>, record: &dyn RecordTop) -> Result<()> {
    let unflushed = |e| Error::new(ErrorKind::Write, "flushing the old top").with_source(e);
    // Most of what is not durable yet, before requests are held back.
    live.layer().flush().map_err(unflushed)?;
    let mut hold = live.hold();
    hold.disk().flush().map_err(unflushed)?;
    record
        .record()
        .map_err(|e| Error::new(ErrorKind::Metadata, "recording the new top").with_boxed_source(e))?;
    hold.exchange(overlay);
    Ok(())
}
