//! Commit of the top layer into the layer below it, while the disk is used.

use super::track::{FEW, Tracking};
use super::watched::Watched;
use super::{Reopened, begin, below};
use crate::chain::close;
use crate::error::{Error, ErrorKind, Result};
use crate::port::{OpenLayer, RecordTop};
use crate::progress::Progress;
use qcow2_core::{GuestDisk, LiveDisk};
use std::sync::Arc;

/// So often the whole disk is looked through for changes before the changes themselves have to help.
const SWEEPS: usize = 3;

/// The result of a live commit.
pub struct LiveCommitReport {
    /// Regions that were copied, some of them several times.
    pub copied_regions: u64,
    /// Bytes in a region.
    pub region: u64,
    /// Regions that were copied while requests were held back; at most 8.
    pub held_regions: u64,
    /// Why the old top could not be closed. Nothing needs it any more.
    pub unclean: Option<Error>,
}

/// Writes what the top of `live` allocates into the layer below it, which then becomes the top. `base`: opens
/// that layer for writing. `record`: records it as the one to open. The old top's file is not needed any
/// more. Its bitmaps and internal snapshots stay in it.
///
/// Order:
/// 1. The base is opened for writing and takes the place of its opening for reading; it grows if the disk is
///    larger.
/// 2. The regions that the top allocates are copied, in up to three passes, while requests go on in the top.
///    A region that changes is marked in memory, 1 MiB at most, and copied again. If too many change, each
///    change copies regions too before it returns, until few are left.
/// 3. The base is flushed, and requests are held back.
/// 4. The last regions are copied, 8 at most; the base is flushed; `record`.
/// 5. The base becomes the top, and requests go on. The old top is closed.
///
/// All that is written to the base before step 5 is hidden by the top, which reads the same. So a crash
/// leaves the chain as it was or, once it is recorded, the base with everything. After an error and a stop
/// the old chain goes on; the base is closed for changes.
///
/// Memory: 1 MiB of marks, 1 MiB for a copy in this call and in each request that helps. Errors: `Busy`;
/// `NotFound` without a layer below; `Unsupported` if it cannot be exchanged; `Open` with the error of
/// `base`; `InvalidOption` if the base is larger than the disk; `Extents`, `Read`, `Write`; `Metadata` with
/// the error of `record`; `Stopped`.
pub fn commit_top(
    live: &LiveDisk,
    base: &dyn OpenLayer,
    record: &dyn RecordTop,
    progress: &dyn Progress,
) -> Result<LiveCommitReport> {
    let _change = begin(live)?;
    let top = live.layer();
    let base = Reopened::exchange(below(&*top)?, base)?;
    fit(&*base.disk, top.size())?;
    let tracking = Arc::new(Tracking::new(Arc::clone(&top), Arc::clone(&base.disk)));
    let watched: Arc<dyn GuestDisk> = Arc::new(Watched { disk: Arc::clone(&top), watcher: tracking.clone() });
    live.hold().exchange(&watched);
    progress.set_total(top.size());
    let committed = Copying { tracking: &tracking, copied: 0, progress }.run(live, &base.disk, record);
    if committed.is_err() {
        tracking.set_helping(false);
        live.hold().exchange(&top);
    }
    let (copied_regions, held_regions) = committed?;
    base.keep();
    let unclean = close(&*top).err();
    Ok(LiveCommitReport { copied_regions, region: tracking.regions.len(), held_regions, unclean })
}

/// Makes the base as long as the disk.
fn fit(base: &dyn GuestDisk, size: u64) -> Result<()> {
    if base.size() > size {
        let text = format!("the base has {} bytes, more than the {size} of the disk", base.size());
        return Err(Error::new(ErrorKind::InvalidOption, text));
    }
    if base.size() < size {
        base.resize(size).map_err(|e| Error::new(ErrorKind::Write, "growing the base").with_source(e))?;
    }
    Ok(())
}

struct Copying<'a> {
    tracking: &'a Tracking,
    copied: u64,
    progress: &'a dyn Progress,
}

impl Copying<'_> {
    /// Copies everything and makes the base the top. Returns how many regions were copied, and how many of
    /// them while requests were held back.
    fn run(
        mut self,
        live: &LiveDisk,
        base: &Arc<dyn GuestDisk>,
        record: &dyn RecordTop,
    ) -> Result<(u64, u64)> {
        let regions = &self.tracking.regions;
        let mut buffer = Vec::new();
        for sweep in 0..SWEEPS {
            if sweep == 0 || regions.left() > FEW {
                self.sweep(sweep == 0, &mut buffer)?;
            }
        }
        self.tracking.set_helping(true);
        while regions.left() > FEW {
            self.go_on()?;
            // `None`: requests copy all that is left, and mark nothing new before they have.
            self.copied += u64::from(self.tracking.copy_one(0, &mut buffer)?.is_some());
        }
        let unflushed = |e| Error::new(ErrorKind::Write, "making the base durable").with_source(e);
        base.flush().map_err(unflushed)?;
        self.go_on()?;
        let mut hold = live.hold();
        let before = self.copied;
        while self.tracking.copy_one(0, &mut buffer)?.is_some() {
            self.copied += 1;
        }
        self.go_on()?;
        base.flush().map_err(unflushed)?;
        record
            .record()
            .map_err(|e| Error::new(ErrorKind::Metadata, "recording the new top").with_boxed_source(e))?;
        hold.exchange(base);
        Ok((self.copied, self.copied - before))
    }

    /// Copies every marked region once, from the first to the last.
    fn sweep(&mut self, first: bool, buffer: &mut Vec<u8>) -> Result<()> {
        let mut next = 0;
        loop {
            self.go_on()?;
            let Some(region) = self.tracking.copy_one(next, buffer)? else { return Ok(()) };
            next = region + 1;
            self.copied += 1;
            if first {
                self.progress.advance(self.tracking.regions.len());
            }
        }
    }

    fn go_on(&self) -> Result<()> {
        match self.tracking.failure() {
            Some(failure) => Err(failure),
            None if self.progress.should_stop() => Err(Error::new(ErrorKind::Stopped, "stopped")),
            None => Ok(()),
        }
    }
}
