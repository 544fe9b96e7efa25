//! Commit of a layer below the top into the layer below it, while the disk is used.

use super::layer::{copy_layer, range};
use super::{Reopened, begin, below};
use crate::error::{Error, ErrorKind, Result};
use crate::port::OpenLayer;
use crate::progress::Progress;
use qcow2_core::{BackingName, GuestDisk, LiveDisk, ZeroMode};
use std::sync::Arc;

/// Bytes between two looks at whether to stop.
const STEP: u64 = 1 << 20;

/// Which layer is committed, and what its neighbours need.
pub struct MiddleLayer<'a> {
    /// How many layers are above it, at least 1.
    pub depth: usize,
    /// The base as the overlay above records it: name and format.
    pub link: BackingName,
    /// Opens the base for writing.
    pub base: &'a dyn OpenLayer,
    /// Opens the overlay above for writing; not called for depth 1, where that is the top.
    pub overlay: &'a dyn OpenLayer,
}

/// The result of a live commit of a middle layer.
pub struct MiddleReport {
    /// The layer that was committed. Nothing reads it any more.
    pub middle: Arc<dyn GuestDisk>,
    /// Why the base or the overlay above could not be closed for changes. They are complete and are read all
    /// the same.
    pub unclean: Option<Error>,
}

/// Writes what one layer below the top allocates into the layer below it, the base, and makes the overlay
/// above it an overlay of the base. The file of the committed layer is not needed any more.
///
/// Order:
/// 1. The base is opened for writing and takes the place of its opening for reading; it grows if the merged
///    layer is larger. What it has behind the end of a smaller one becomes zeroes, as the chain reads there.
/// 2. What the committed layer allocates is copied; the layer does not change meanwhile. The base is flushed.
/// 3. The overlay above is flushed. If it is the top, requests are held back.
/// 4. The overlay's link is rewritten: a first flush of what it has, then its header in steps of which the
///    last is one sector. The base takes the place of the committed layer, and requests go on.
/// 5. The base is closed for changes, and the overlay too unless it is the top.
///
/// A crash leaves the old link or the new one, and the base has everything before the link changes. After an
/// error and a stop the old chain goes on. Memory: 1 MiB.
///
/// Errors: `Busy`; `NotFound` if there is no such layer or none below it; `Unsupported` if layers cannot be
/// exchanged, or the overlay is no qcow2 image; `Open` with the caller's error; `Extents`, `Read`, `Write`;
/// `Metadata` if the link cannot be written; `Stopped`.
pub fn commit_middle(
    live: &LiveDisk,
    layer: &MiddleLayer<'_>,
    progress: &dyn Progress,
) -> Result<MiddleReport> {
    let _change = begin(live)?;
    let (mut overlay, mut parent) = (live.layer(), None);
    for _ in 1..layer.depth.max(1) {
        let next = below(&*overlay)?.layer();
        parent = Some(overlay);
        overlay = next;
    }
    let middle = below(&*overlay)?.layer();
    let base = Reopened::exchange(below(&*middle)?, layer.base)?;
    merge(&*middle, &*base.disk, progress)?;
    let reopened = match &parent {
        Some(parent) => Some(Reopened::exchange(below(&**parent)?, layer.overlay)?),
        None => None,
    };
    let overlay = reopened.as_ref().map_or(overlay, |reopened| Arc::clone(&reopened.disk));
    relink(live, &*overlay, &base.disk, &layer.link)?;
    let closed = reopened.map_or(Ok(()), Reopened::close);
    let unclean = base.close().and(closed).err();
    Ok(MiddleReport { middle, unclean })
}

/// Makes the base read like the chain of the middle layer, and durable.
fn merge(middle: &dyn GuestDisk, base: &dyn GuestDisk, progress: &dyn Progress) -> Result<()> {
    let failed = |step: &'static str| move |e| Error::new(ErrorKind::Write, step).with_source(e);
    let size = middle.size();
    if base.size() < size {
        base.resize(size).map_err(failed("growing the base"))?;
    }
    progress.set_total(size);
    let (mut at, mut buffer) = (0, Vec::new());
    while at < size {
        if progress.should_stop() {
            return Err(Error::new(ErrorKind::Stopped, format!("stopped at byte {at} of {size}")));
        }
        let end = size.min(at + STEP);
        copy_layer(middle, base, range(at, end), &mut buffer)?;
        progress.advance(end - at);
        at = end;
    }
    if base.size() > size {
        base.write_zeroes(range(size, base.size()), ZeroMode::MayUnmap)
            .map_err(failed("writing zeroes behind the end of the committed layer"))?;
    }
    base.flush().map_err(failed("making the base durable"))
}

/// Makes `overlay` an overlay of `base`, on disk and in memory.
fn relink(
    live: &LiveDisk,
    overlay: &dyn GuestDisk,
    base: &Arc<dyn GuestDisk>,
    link: &BackingName,
) -> Result<()> {
    let node = below(overlay)?;
    let image = overlay
        .as_image()
        .ok_or_else(|| Error::new(ErrorKind::Unsupported, "only a qcow2 image has a backing file"))?;
    image.flush().map_err(|e| Error::new(ErrorKind::Write, "flushing the overlay").with_source(e))?;
    // Also for an overlay further down, whose readers would only wait elsewhere.
    let _hold = live.hold();
    image
        .change_backing(Some(link))
        .map_err(|e| Error::new(ErrorKind::Metadata, "recording the new backing file").with_source(e))?;
    node.hold().exchange(base);
    Ok(())
}
