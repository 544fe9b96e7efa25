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

use super::Meta;
use super::cache::join_runs;
use super::overlap::OverlapChecks;
use super::page::{DirtyRun, SECTOR_SIZE};
use super::pending::Unlinked;
use crate::error::Result;
use crate::invariant;
use crate::port::event::Event;
use crate::rules::OrderingRule;
use crate::sync::atomic::Ordering;
use crate::sync::{lock, write};
use ::alloc::vec::Vec;
use qcow2_format::HostOffset;
use qcow2_format::bytes::table_bytes;

/// How many unlinked runs may wait before a write-back is due.
const MAX_UNLINKED_RUNS: usize = 1 << 14;

/// What one round writes after the barrier.
struct Links {
    l2: Vec<DirtyRun>,
    l1: Vec<DirtyRun>,
    unlinked: Vec<Unlinked>,
    /// Keeps the pages in the cache until their sectors are written.
    _pages: Vec<::alloc::sync::Arc<super::page::Page>>,
}

impl Meta {
    /// Makes every change durable whose call returned before this one. Errors: `Storage`, `NoSpace`; a
    /// failure poisons the image.
    pub(crate) fn flush(&self) -> Result<()> {
        let seen = self.flush_rounds.load(Ordering::SeqCst);
        let _flushing = lock(&self.flushing);
        if self.flush_rounds.load(Ordering::SeqCst) > seen {
            // Somebody began a round after this call did, and has ended it: it covered this caller too.
            return self.check_writable();
        }
        self.flush_rounds.fetch_add(1, Ordering::SeqCst);
        let result = self.flush_round();
        self.poison_on_error(result)
    }

    /// A flush where many changes wait already, so that memory stays bounded.
    pub(crate) fn flush_if_pressed(&self) -> Result<()> {
        let pressed = self.l2_cache.is_pressed()
            || self.refcount_cache.is_pressed()
            || lock(&self.pending).fresh_count() >= MAX_UNLINKED_RUNS;
        if pressed { self.flush() } else { Ok(()) }
    }

    /// Flushes until every refcount on disk is exact; for the end of an image's use.
    pub(crate) fn settle(&self) -> Result<()> {
        self.flush()?;
        self.flush()
    }

    /// Ends a changed file where other readers expect an end: with a whole (sub)cluster, or with a whole
    /// sector where the last cluster holds compressed streams. The bytes in between were never written, and
    /// some readers take no short read.
    pub(crate) fn pad_end(&self) -> Result<()> {
        if self.changing.load(Ordering::Acquire) { self.pad_file() } else { Ok(()) }
    }

    /// [`pad_end`](Self::pad_end), whatever was changed.
    pub(crate) fn pad_file(&self) -> Result<()> {
        let len = self.storage.len()?;
        let streams = lock(&self.refcounts).pack;
        let packed = streams
            .is_some_and(|(start, _)| self.geometry.align_down(start) == self.geometry.align_down(len));
        let unit = if packed { SECTOR_SIZE } else { self.geometry.subcluster_size() };
        if !len.is_multiple_of(unit) && self.storage.limits().growable {
            self.storage.set_len(len.next_multiple_of(unit))?;
        }
        Ok(())
    }

    fn flush_round(&self) -> Result<()> {
        invariant::may_write(self.writable);
        self.event(Event::FlushToOs);
        let links = self.take_links();
        if !self.rules.keep(OrderingRule::UnlinkBeforeFree) {
            self.free_reusable(&links.unlinked)?;
        }
        self.write_refcounts()?;
        let links_follow = !links.l2.is_empty() || !links.l1.is_empty();
        self.barrier(links_follow)?;
        if links_follow {
            self.write_links(&links)?;
            if self.rules.keep(OrderingRule::LinksBeforeFlushReturns) {
                self.event(Event::FlushToDisk);
                self.storage.flush()?;
            }
        }
        if self.rules.keep(OrderingRule::UnlinkBeforeFree) {
            self.free_unlinked(links.unlinked)?;
        }
        Ok(())
    }

    /// Step 1: the mapping as it is at one moment.
    fn take_links(&self) -> Links {
        let _closed = write(&self.gate);
        let (pages, l2) = self.l2_cache.take_dirty();
        let mut l1 = Vec::new();
        self.l1.take_dirty(&mut l1);
        Links { l2, l1, unlinked: lock(&self.pending).take_fresh(), _pages: pages }
    }

    /// Step 2: refcount blocks, then the table entries that lead to new ones.
    fn write_refcounts(&self) -> Result<()> {
        let mut refcounts = lock(&self.refcounts);
        let (_pages, blocks) = self.refcount_cache.take_dirty();
        let mut entries = Vec::new();
        for sector in core::mem::take(&mut refcounts.dirty_sectors) {
            entries.push(self.table_sector(&refcounts.table, refcounts.table_offset, sector));
        }
        let _writing = lock(&self.refcount_io);
        drop(refcounts);
        if !blocks.is_empty() {
            self.event(Event::RefblockUpdatePart);
        }
        self.write_runs(OverlapChecks::REFCOUNT_BLOCK, &blocks)?;
        if !entries.is_empty() {
            if self.rules.keep(OrderingRule::BlockBeforeTableEntry) {
                self.storage.flush()?;
            }
            self.event(Event::ReftableUpdate);
            self.write_runs(OverlapChecks::REFCOUNT_TABLE, &join_runs(entries))?;
        }
        Ok(())
    }

    fn table_sector(&self, table: &[u64], offset: HostOffset, sector: u64) -> DirtyRun {
        let per_sector = (SECTOR_SIZE / 8) as usize;
        let first = sector as usize * per_sector;
        let words = &table[first..table.len().min(first + per_sector)];
        let bytes = table_bytes(words.iter().copied());
        DirtyRun { offset: HostOffset::new(offset.value() + sector * SECTOR_SIZE), bytes }
    }

    /// Step 3: everything written so far is durable, guest data included.
    fn barrier(&self, links_follow: bool) -> Result<()> {
        if let Some(data) = self.data.as_ref().filter(|_| self.has_data_file()) {
            data.flush()?;
        }
        if !links_follow || self.rules.keep(OrderingRule::RefcountsBeforeLinks) {
            self.event(Event::FlushToDisk);
            self.storage.flush()?;
        }
        Ok(())
    }

    /// Step 5: lowers the refcounts of what no running operation can see.
    fn free_unlinked(&self, unlinked: Vec<Unlinked>) -> Result<()> {
        let reusable = {
            let mut pending = lock(&self.pending);
            debug_assert!(unlinked.iter().all(|run| !run.clusters.is_empty()), "references to nothing");
            pending.made_durable(self.operations.epoch(), unlinked);
            if pending.is_empty() {
                return Ok(());
            }
            pending.take_reusable(self.operations.advance())
        };
        self.free_reusable(&reusable)
    }

    /// Step 4's writes: L2 entries, then L1 entries.
    fn write_links(&self, links: &Links) -> Result<()> {
        let both = [
            (&links.l2, OverlapChecks::ACTIVE_L2, Event::L2Update),
            (&links.l1, OverlapChecks::ACTIVE_L1, Event::L1Update),
        ];
        for (runs, kind, event) in both {
            for run in runs {
                self.event(event);
                self.write_table(kind, run.offset, &run.bytes)?;
            }
        }
        Ok(())
    }

    /// Writes sectors of tables to the image file.
    pub(crate) fn write_runs(&self, kind: OverlapChecks, runs: &[DirtyRun]) -> Result<()> {
        runs.iter().try_for_each(|run| self.write_table(kind, run.offset, &run.bytes))
    }
}
