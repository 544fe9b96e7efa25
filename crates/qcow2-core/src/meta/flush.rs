//! Writing changes back, in the order that makes a crash harmless.
//!
//! One round, whatever its size, is:
//! 1. close the gate, copy the changed mapping sectors, open the gate;
//! 2. write the refcount blocks that changed up to now (and behind a barrier, the refcount table entries of
//!    new ones);
//! 3. barrier: refcounts, new tables and guest data are durable;
//! 4. write the copied mapping sectors; barrier: the links and unlinks are durable;
//! 5. what was unlinked before step 1 may be freed once nobody can see it.
//!
//! So no barrier is spent per write, and at every moment the disk has no more references than refcounts (I1),
//! no link to bytes that are not there (I2), and no freed cluster that a link on disk still leads to (I3).

use super::file::ImageFile;
use super::mapping::{Mapping, MappingChanges};
use super::overlap::OverlapChecks;
use super::pending::Unlinked;
use super::refcount::RefcountStore;
use super::tables::Tables;
use crate::error::Result;
use crate::inflight::{Operation, Operations};
use crate::invariant;
use crate::port::event::Event;
use crate::rules::OrderingRule;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, Rank, lock};
use ::alloc::sync::Arc;
use ::alloc::vec::Vec;

/// Writes back what mapping and refcounts have changed, and frees what nobody can see any more.
///
/// The mapping is a field and no shared part: nothing else stands on it, and a read finds it without one more
/// pointer.
pub(crate) struct Flusher {
    file: Arc<ImageFile>,
    tables: Arc<Tables>,
    refcounts: Arc<RefcountStore>,
    mapping: Mapping,
    operations: Operations,
    /// Held for a round.
    flushing: Mutex<()>,
    /// How many rounds have begun.
    rounds: AtomicU64,
}

/// What one round writes after the barrier.
struct Links {
    changes: MappingChanges,
    unlinked: Vec<Unlinked>,
}

impl Flusher {
    /// `mapping` stands on `refcounts`.
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
        }
    }

    /// Which guest range lives where.
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Starts an operation: until it is dropped, no cluster whose mapping it has looked up is freed.
    pub(crate) fn enter(&self) -> Operation<'_> {
        self.operations.enter()
    }

    /// Makes every change durable whose call returned before this one. Errors: `Storage`, `NoSpace`; a
    /// failure poisons the image.
    pub(crate) fn flush(&self) -> Result<()> {
        // Read before waiting: a round that begins later sees everything this caller has done.
        let seen = self.rounds.load(Ordering::SeqCst);
        let _flushing = lock(&self.flushing);
        if self.rounds.load(Ordering::SeqCst) > seen {
            // Another round began after this call did, and has ended: it covered this caller too.
            return self.file.check_writable();
        }
        self.rounds.fetch_add(1, Ordering::SeqCst);
        let result = self.round();
        self.file.poison_on_error(result)
    }

    /// A flush where many changes wait already, so that memory stays bounded.
    pub(crate) fn flush_if_pressed(&self) -> Result<()> {
        let pressed = self.mapping.is_pressed() || self.refcounts.is_pressed();
        if pressed { self.flush() } else { Ok(()) }
    }

    /// Flushes until every refcount on disk is exact; for the end of an image's use.
    pub(crate) fn settle(&self) -> Result<()> {
        // The first round writes the unlinks and frees what they unlinked, the second one the lower counts.
        self.flush()?;
        self.flush()
    }

    /// Keeps rounds from beginning until the guard is dropped.
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
        self.refcounts.write_back()?;
        let links_follow = !links.changes.l2.is_empty() || !links.changes.l1.is_empty();
        self.barrier(links_follow)?;
        if links_follow {
            self.write_links(&links.changes)?;
            if self.file.keeps(OrderingRule::LinksBeforeFlushReturns) {
                self.file.event(Event::FlushToDisk);
                self.file.flush()?;
            }
        }
        // After the links are durable: what they replaced could otherwise be used again while the disk still
        // leads to it (I3).
        if self.file.keeps(OrderingRule::UnlinkBeforeFree) {
            self.free_unlinked(links.unlinked)?;
        }
        Ok(())
    }

    /// Step 1: the mapping as it is at one moment, and what was unlinked up to then.
    fn take_links(&self) -> Links {
        let _closed = self.mapping.close_gate();
        Links { changes: self.mapping.take_changes(), unlinked: self.refcounts.take_unlinked() }
    }

    /// Step 3: everything written so far is durable, guest data included.
    fn barrier(&self, links_follow: bool) -> Result<()> {
        // The data file too: entries that are written next lead to bytes in it (I2).
        if let Some(data) = self.file.data_file() {
            data.flush()?;
        }
        if !links_follow || self.file.keeps(OrderingRule::RefcountsBeforeLinks) {
            self.file.event(Event::FlushToDisk);
            self.file.flush()?;
        }
        Ok(())
    }

    /// Step 4's writes: L2 entries, then L1 entries.
    fn write_links(&self, changes: &MappingChanges) -> Result<()> {
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
        Ok(())
    }

    /// Step 5: lowers the refcounts of what no running operation can see.
    fn free_unlinked(&self, unlinked: Vec<Unlinked>) -> Result<()> {
        let reusable = self.refcounts.made_durable(unlinked, &self.operations);
        self.free(&reusable)
    }

    /// Frees what nobody can see any more.
    pub(crate) fn free(&self, runs: &[Unlinked]) -> Result<()> {
        // Before the clusters can be used again: a stream at the same place would be taken for the old one.
        if !runs.is_empty() {
            self.mapping.expanded().clear();
        }
        self.refcounts.free(runs)
    }
}
