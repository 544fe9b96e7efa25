//! Step 2 of a flush round: writeback of changed refcounts.

use super::RefcountStore;
use crate::error::Result;
use crate::invariant;
use crate::meta::cache::join_runs;
use crate::meta::overlap::OverlapChecks;
use crate::meta::page::{DirtyRun, SECTOR_SIZE};
use crate::port::event::Event;
use crate::rules::OrderingRule;
use crate::sync::lock;
use ::alloc::vec::Vec;
use qcow2_format::HostOffset;
use qcow2_format::bytes::table_bytes;

impl RefcountStore {
    /// Writes the changed refcount blocks and, after a barrier, the refcount table entries of new blocks. The
    /// last writes are not durable yet when it returns. Errors: `Storage`, `NoSpace`, `Corrupt`; what could
    /// not be written waits for the next call. After a failed barrier the image is poisoned.
    pub(crate) fn write_back(&self) -> Result<()> {
        invariant::may_write(self.file.is_writable());
        let mut refcounts = lock(&self.state);
        let (pages, blocks) = self.cache.take_dirty();
        let sectors = core::mem::take(&mut refcounts.dirty_sectors);
        let (table, start) = (&refcounts.table, refcounts.table_offset);
        let entries = sectors.iter().map(|&sector| table_sector(table, start, sector)).collect();
        // Taken before the refcounts are unlocked: otherwise a later copy of a block could be written first,
        // and this older one over it.
        let writing = lock(&self.io);
        drop(refcounts);
        let written = self.write_changes(&blocks, entries);
        if written.is_err() {
            // Before others may write blocks: a growing table that leads to these must find them changed.
            self.cache.put_back(&pages, &blocks);
        }
        drop(writing);
        if written.is_err() {
            // A table that was replaced meanwhile was written whole, and is longer.
            lock(&self.state).dirty_sectors.extend(sectors);
        }
        written
    }

    fn write_changes(&self, blocks: &[DirtyRun], entries: Vec<DirtyRun>) -> Result<()> {
        if !blocks.is_empty() {
            self.file.event(Event::RefblockUpdatePart);
        }
        self.tables.write_runs(OverlapChecks::REFCOUNT_BLOCK, blocks)?;
        if !entries.is_empty() {
            // Block before entry: after a crash the entry would point to stale bytes as refcounts.
            if self.file.keeps(OrderingRule::BlockBeforeTableEntry) {
                self.file.poison_on_error(self.file.flush())?;
            }
            self.file.event(Event::ReftableUpdate);
            self.tables.write_runs(OverlapChecks::REFCOUNT_TABLE, &join_runs(entries))?;
        }
        Ok(())
    }
}

fn table_sector(table: &[u64], offset: HostOffset, sector: u64) -> DirtyRun {
    let per_sector = (SECTOR_SIZE / 8) as usize;
    let first = sector as usize * per_sector;
    debug_assert!(first < table.len(), "sector {sector} of a refcount table that is shorter");
    let words = &table[first..table.len().min(first + per_sector)];
    let bytes = table_bytes(words.iter().copied());
    DirtyRun { offset: HostOffset::new(offset.value() + sector * SECTOR_SIZE), bytes }
}
