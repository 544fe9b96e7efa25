//! Writeback of metadata, in an order that makes a crash harmless.
//!
//! One round, whatever its size:
//! 1. close the gate, copy the changed mapping sectors, open the gate;
//! 2. write the changed refcount blocks (and, after a barrier, the refcount table entries of new blocks);
//! 3. barrier: refcounts, new tables and guest data are durable;
//! 4. write the copied mapping sectors; barrier: links and unlinks are durable;
//! 5. free what was unlinked before step 1, once no running operation can still use it.
//!
//! So a single write needs no barrier, and at every moment no refcount on disk is below the number of
//! references (I1), no entry points to bytes that are not written (I2), and no entry points to a freed
//! cluster (I3).
//!
//! If a table cannot be written, the changes of the round wait for the next one, which writes them again. If
//! a barrier fails, nobody knows what is on disk: the image is poisoned.

use super::file::ImageFile;
use super::mapping::{Mapping, MappingChanges};
use super::overlap::OverlapChecks;
use super::pending::Unlinked;
use super::refcount::RefcountStore;
use super::tables::Tables;
use crate::error::{Error, ErrorKind, Result};
use crate::inflight::{Operation, Operations};
use crate::invariant;
use crate::port::event::Event;
use crate::rules::OrderingRule;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, Rank, lock};
use ::alloc::sync::Arc;
use ::alloc::vec::Vec;

/// Writes back the changes of mapping and refcounts, and frees unlinked clusters.
///
/// It owns the mapping instead of sharing it: nothing else uses the mapping, and a read saves a pointer.
pub(crate) struct Flusher {
    file: Arc<ImageFile>,
    tables: Arc<Tables>,
    refcounts: Arc<RefcountStore>,
    mapping: Mapping,
    operations: Operations,
    /// Held during a round.
    flushing: Mutex<()>,
    /// Number of rounds that have started.
    rounds: AtomicU64,
    /// True if the last round failed and its changes wait for the next one.
    failed: AtomicBool,
}

/// What one round writes and frees after the barrier of step 3.
struct Links {
    changes: MappingChanges,
    unlinked: Vec<Unlinked>,
}

impl Flusher {
    /// `mapping` was made with the same `refcounts`.
    pub(crate) fn new(refcounts: Arc<RefcountStore>, mapping: Mapping) -> Self {
        let tables = Arc::clone(refcounts.tables());
        Self {
            file: Arc::clone(tables.file()),
            tables,
            refcounts,
            mapping,
            operations: Operations::default(),
            flushing: Mutex::new(Rank::Flushing, ()),
            rounds: AtomicU64::new(0),
            failed: AtomicBool::new(false),
        }
    }

    /// The mapping of guest offsets to host offsets.
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Starts an operation: until it is dropped, no cluster is freed whose mapping it has looked up.
    pub(crate) fn enter(&self) -> Operation<'_> {
        self.operations.enter()
    }

    /// Makes all changes durable whose calls returned before this one. Errors: `Storage`, `NoSpace` if a
    /// table could not be written: the next flush tries it again. After any other error, and after a failed
    /// barrier, the image is poisoned.
    pub(crate) fn flush(&self) -> Result<()> {
        // Read before waiting for the lock: a round that starts later includes all changes of this caller.
        let seen = self.rounds.load(Ordering::SeqCst);
        let _flushing = lock(&self.flushing);
        if self.rounds.load(Ordering::SeqCst) > seen && !self.failed.load(Ordering::SeqCst) {
            // Another thread's round started after this call and has ended: it included this caller's
            // changes.
            return self.file.check_writable();
        }
        self.rounds.fetch_add(1, Ordering::SeqCst);
        let result = self.round();
        self.failed.store(result.is_err(), Ordering::SeqCst);
        let again = |error: &Error| matches!(error.kind(), ErrorKind::Storage | ErrorKind::NoSpace);
        if result.as_ref().is_err_and(|error| !again(error)) {
            self.file.poison();
        }
        result
    }

    /// Flushes if many changes are waiting, so that memory stays bounded.
    pub(crate) fn flush_if_pressed(&self) -> Result<()> {
        let pressed = self.mapping.is_pressed() || self.refcounts.is_pressed();
        if pressed { self.flush() } else { Ok(()) }
    }

    /// Before a change: if flushes fail and many changes are waiting already, no more are made.
    pub(crate) fn check_room(&self) -> Result<()> {
        if self.failed.load(Ordering::Relaxed) { self.flush_if_pressed() } else { Ok(()) }
    }

    /// Flushes until nothing waits to be freed and every refcount on disk is exact. The caller makes sure
    /// that no operation is running.
    pub(crate) fn settle(&self) -> Result<()> {
        // The first round writes the unlinks and lowers the refcounts in memory, the second one writes those.
        self.flush()?;
        self.flush()
    }

    /// Keeps rounds from starting until the guard is dropped.
    pub(crate) fn hold(&self) -> MutexGuard<'_, ()> {
        lock(&self.flushing)
    }

    fn round(&self) -> Result<()> {
        invariant::may_write(self.file.is_writable());
        self.file.event(Event::FlushToOs);
        let links = self.take_links();
        if !self.file.keeps(OrderingRule::UnlinkBeforeFree) {
            self.free(&links.unlinked)?;
        }
        if let Err(error) = self.refcounts.write_back().and_then(|()| self.write_links(&links.changes)) {
            self.mapping.put_back(&links.changes, &links.unlinked);
            return Err(error);
        }
        // Only after the links are durable: a freed cluster could otherwise be reused while an entry on disk
        // still points to it (I3).
        if self.file.keeps(OrderingRule::UnlinkBeforeFree) {
            self.file.poison_on_error(self.free_unlinked(links.unlinked))?;
        }
        Ok(())
    }

    /// Step 1: copies the mapping changes of one moment, and takes what was unlinked up to then.
    fn take_links(&self) -> Links {
        let _closed = self.mapping.close_gate();
        Links { changes: self.mapping.take_changes(), unlinked: self.refcounts.take_unlinked() }
    }

    /// Step 3: makes everything durable that was written so far, guest data included.
    fn barrier(&self, links_follow: bool) -> Result<()> {
        // The data file too: the entries that are written next point to bytes in it (I2).
        if let Some(data) = self.file.data_file() {
            self.file.poison_on_error(data.flush().map_err(Error::from))?;
        }
        match !links_follow || self.file.keeps(OrderingRule::RefcountsBeforeLinks) {
            true => self.flush_file(),
            false => Ok(()),
        }
    }

    fn flush_file(&self) -> Result<()> {
        self.file.event(Event::FlushToDisk);
        self.file.poison_on_error(self.file.flush())
    }

    /// Steps 3 and 4: the barrier, then L2 entries, then L1 entries, and a barrier after them.
    fn write_links(&self, changes: &MappingChanges) -> Result<()> {
        let links_follow = !changes.l2.is_empty() || !changes.l1.is_empty();
        self.barrier(links_follow)?;
        let both = [
            (&changes.l2, OverlapChecks::ACTIVE_L2, Event::L2Update),
            (&changes.l1, OverlapChecks::ACTIVE_L1, Event::L1Update),
        ];
        for (runs, kind, event) in both {
            for run in runs {
                self.file.event(event);
                self.tables.write(kind, run.offset, &run.bytes)?;
            }
        }
        match links_follow && self.file.keeps(OrderingRule::LinksBeforeFlushReturns) {
            true => self.flush_file(),
            false => Ok(()),
        }
    }

    /// Step 5: frees the unlinked clusters that no running operation can use.
    fn free_unlinked(&self, unlinked: Vec<Unlinked>) -> Result<()> {
        let reusable = self.refcounts.made_durable(unlinked, &self.operations);
        self.free(&reusable)
    }

    /// Frees `runs`, which no entry on disk and no running operation uses.
    pub(crate) fn free(&self, runs: &[Unlinked]) -> Result<()> {
        // Before the clusters can be reused: a new stream at the same host offset would be taken for the
        // cached one.
        if !runs.is_empty() {
            self.mapping.expanded().clear();
        }
        self.refcounts.free(runs)
    }
}
