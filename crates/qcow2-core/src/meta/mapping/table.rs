//! Makes L2 tables writable: allocates missing ones, copies shared ones.
//!
//! Order on disk: the new table's content; then, with the next flush, its refcount, and after a barrier the
//! L1 entry that points to it (I1, I2).

use super::{L2Place, Mapping};
use crate::error::{Error, Result};
use crate::meta::overlap::OverlapChecks;
use crate::meta::page::SECTOR_SIZE;
use crate::meta::pending::Unlinked;
use crate::port::event::Event;
use crate::rules::OrderingRule;
use crate::sync::{lock, read};
use ::alloc::format;
use ::alloc::vec;
use core::ops::Range;
use qcow2_format::l1::L1Entry;
use qcow2_format::{GuestOffset, HostOffset, L1Index};

impl Mapping {
    /// The L2 entry of `offset`, in a table that may be changed: allocates a missing table, copies a shared
    /// one. The caller has claimed the cluster. Disk: writes the new table; the next flush writes its L1
    /// entry. Errors: `NoSpace`, `Corrupt`, `Storage`.
    pub(crate) fn writable_place(&self, offset: GuestOffset) -> Result<L2Place> {
        let index = self.format.geometry.l1_index(offset);
        let entry = self.l1_entry(index)?;
        if let (Some(table), true) = (entry.l2_table, entry.copied) {
            return self.place_to_change(table, offset);
        }
        let _making = lock(&self.table_lock);
        // Read again: another thread may have made the table while this one waited for the lock.
        let entry = self.l1_entry(index)?;
        let table = match entry.l2_table {
            Some(table) if entry.copied => table,
            old => self.make_l2_table(index, old)?,
        };
        debug_assert!(
            self.l1_entry(index).is_ok_and(|entry| entry.copied && entry.l2_table == Some(table)),
            "a shared l2 table is about to change"
        );
        self.place_to_change(table, offset)
    }

    /// The entry of `offset` in `table`, for a change. Fails if `table` is other metadata, because the L1
    /// entry is damaged.
    fn place_to_change(&self, table: HostOffset, offset: GuestOffset) -> Result<L2Place> {
        let place = self.place_in_table(table, offset)?;
        // A queued page was checked when it was changed first.
        if !place.page.is_queued() {
            let (at, len) = (place.page.offset(), self.cache.page_size());
            self.tables.check_place(OverlapChecks::ACTIVE_L2, at, len)?;
        }
        Ok(place)
    }

    /// Unlinks the L2 tables of the L1 entries in `range`. The caller has deallocated all that they map, and
    /// has flushed that. True if there was one. A table whose place holds other metadata too stays. Errors:
    /// `Corrupt`.
    pub(crate) fn drop_tables(&self, range: Range<u64>) -> Result<bool> {
        let geometry = &self.format.geometry;
        let (mut at, end, mut dropped) = (range.start, range.end.min(self.l1.len()), false);
        while let Some(index) = self.l1.next_mapped(at.min(end)..end) {
            at = index + 1;
            let index = L1Index::new(index);
            let Some(table) = self.l1_entry(index)?.l2_table else { continue };
            let run = Unlinked::one(geometry, OverlapChecks::ACTIVE_L2, table);
            // One that is shared with a snapshot loses a reference.
            if self.tables.guard().hit_by(OverlapChecks::L2, run.clusters).is_some() {
                continue;
            }
            self.tables.check_place(OverlapChecks::ACTIVE_L1, self.l1.sector_of(index), SECTOR_SIZE)?;
            // Both in the same flush round: the table is freed only when the entry on disk is gone.
            let _open = read(&self.gate);
            self.l1.set(index, L1Entry { l2_table: None, copied: false }.encode());
            self.refcounts.unlink(run);
            self.cache.forget(table, geometry.cluster_size());
            dropped = true;
        }
        Ok(dropped)
    }

    fn make_l2_table(&self, index: L1Index, old: Option<HostOffset>) -> Result<HostOffset> {
        let geometry = &self.format.geometry;
        if index.value() >= self.l1.len() {
            return Err(Error::corrupt(format!(
                "l1 table has {} entries, entry {index} is needed",
                self.l1.len()
            )));
        }
        self.tables.check_place(OverlapChecks::ACTIVE_L1, self.l1.sector_of(index), SECTOR_SIZE)?;
        let old_run = old.map(|old| Unlinked::one(geometry, OverlapChecks::ACTIVE_L2, old));
        if let Some(old) = old {
            // It may be shared with a snapshot; if it is any other metadata, there is no table to copy.
            self.tables.check_place(OverlapChecks::L2, old, geometry.cluster_size())?;
        }
        let cluster = self.refcounts.allocate_metadata(OverlapChecks::ACTIVE_L2, 1)?;
        let table = cluster.offset;
        assert!(geometry.is_aligned(table.value()) && table.value() > 0, "a new l2 table at {table}");
        if let Err(error) = self.fill_l2_table(table, old, cluster.fresh) {
            self.refcounts.release(Unlinked { clusters: cluster.run, kinds: OverlapChecks::ACTIVE_L2 })?;
            return Err(error);
        }
        // Link and unlink under one open gate, so that they are in the same flush round: the old table is
        // freed only when the new entry is on disk.
        let _open = read(&self.gate);
        self.l1.set(index, L1Entry { l2_table: Some(table), copied: true }.encode());
        if let Some(run) = old_run {
            self.refcounts.unlink(run);
        }
        Ok(table)
    }

    fn fill_l2_table(&self, table: HostOffset, old: Option<HostOffset>, fresh: bool) -> Result<()> {
        let size = self.format.geometry.cluster_size();
        // The cluster may have been a table before, whose pages may still be cached.
        self.cache.forget(table, size);
        if !self.file.keeps(OrderingRule::TableBeforeEntry) {
            return Ok(());
        }
        match old {
            Some(old) => {
                let mut bytes = vec![0; size as usize];
                self.file.event(Event::L2AllocCowRead);
                self.file.storage().read_padded(old, &mut bytes)?;
                self.file.event(Event::L2AllocWrite);
                self.tables.write(OverlapChecks::ACTIVE_L2, table, &bytes)?;
            }
            None if fresh => {
                self.file.event(Event::L2AllocWrite);
                self.tables.write_empty(OverlapChecks::ACTIVE_L2, table)?;
            }
            None => {
                self.file.event(Event::L2AllocWrite);
                self.tables.zero(OverlapChecks::ACTIVE_L2, table)?;
            }
        }
        Ok(())
    }
}
