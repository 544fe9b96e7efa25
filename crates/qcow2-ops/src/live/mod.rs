//! Procedures on a disk that is used meanwhile: each changes the layers of a
//! [`LiveDisk`].
//!
//! | you want to | take | requests are held back for |
//! |---|---|---|
//! | go on in a new file, and keep the old one as it is | [`external_snapshot`] | a flush of the old top |
//! | merge the top into the layer below it | [`commit_top`] | the last few regions, a flush of the base |
//! | merge a layer further down | [`commit_middle`] | a flush of the overlay above, and its new link |
//! | copy the disk as it is now to another one | [`backup`] | the copy of a bitmap's bits |
//! | take an internal snapshot, change bitmaps | [`on_image`] | the change itself |
//!
//! Where the top becomes another file, your [`RecordTop`](crate::RecordTop) is called meanwhile too.
//!
//! One of them runs at a time: a second one is refused with `Busy`. None returns an error to the guest that
//! is not the guest's own: where a procedure fails, the chain goes on as it was. All that reads like the
//! chain may stay in the files of lower layers then.

mod backup;
mod commit;
mod layer;
mod locks;
mod middle;
mod regions;
mod snapshot;
mod track;
mod watched;

pub use backup::{BackupOptions, backup};
pub use commit::{LiveCommitReport, commit_top};
pub use middle::{MiddleLayer, MiddleReport, commit_middle};
pub use snapshot::{LiveSnapshot, LiveSnapshotOptions, external_snapshot};

use crate::chain::close;
use crate::error::{Error, ErrorKind, Result};
use crate::port::OpenLayer;
use qcow2_core::live::LayerChange;
use qcow2_core::{GuestDisk, Image, LiveDisk};
use std::sync::Arc;

/// Runs `act` on the image that is the top, with requests held back: internal snapshots
/// ([`snapshot`](crate::snapshot)) and bitmaps ([`bitmap`](crate::bitmap)) of a disk in use. Flushes before
/// it holds requests back, so that little is left to write then.
///
/// Disk: as `act`. Errors: `Busy`; `Unsupported` if the top is no qcow2 image; `Write` if it cannot be
/// flushed; those of `act`.
pub fn on_image<T>(live: &LiveDisk, act: impl FnOnce(&Image) -> Result<T>) -> Result<T> {
    let _change = begin(live)?;
    live.layer().flush().map_err(|e| Error::new(ErrorKind::Write, "flushing the disk").with_source(e))?;
    let hold = live.hold();
    let image = hold.disk().as_image();
    act(image.ok_or_else(|| Error::new(ErrorKind::Unsupported, "the top layer is no qcow2 image"))?)
}

/// Excludes other changes of the layers.
fn begin(live: &LiveDisk) -> Result<LayerChange<'_>> {
    live.begin_change().map_err(|e| Error::new(ErrorKind::Busy, "changing the layers").with_source(e))
}

/// The disk below `disk`, if it can be exchanged.
fn below(disk: &dyn GuestDisk) -> Result<&LiveDisk> {
    let node = disk.backing().ok_or_else(|| Error::new(ErrorKind::NotFound, "there is no layer below"))?;
    node.as_live().ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, "the chain was not opened with layers that can be exchanged")
    })
}

/// A layer that was opened again for writing, in the place where it was open for reading. When it is dropped
/// it is closed, and goes on being read.
struct Reopened {
    disk: Arc<dyn GuestDisk>,
    closed: bool,
}

impl Reopened {
    /// Opens the layer in `node`. Before anything is written: tables that the other opening keeps in memory
    /// would be outdated then.
    fn exchange(node: &LiveDisk, layer: &dyn OpenLayer) -> Result<Self> {
        let failed = |e| Error::new(ErrorKind::Open, "opening a layer for writing").with_boxed_source(e);
        let disk = layer.open(node.layer().backing()).map_err(failed)?;
        drop(node.hold().exchange(&disk));
        Ok(Self { disk, closed: false })
    }

    /// Closes the layer, which takes no changes any more.
    fn close(mut self) -> Result<()> {
        self.closed = true;
        close(&*self.disk)
    }

    /// The layer, which stays open for writing.
    fn keep(mut self) -> Arc<dyn GuestDisk> {
        self.closed = true;
        Arc::clone(&self.disk)
    }
}

impl Drop for Reopened {
    fn drop(&mut self) {
        if !self.closed {
            // The procedure has failed, and its error is the one to return.
            let _ = close(&*self.disk);
        }
    }
}
