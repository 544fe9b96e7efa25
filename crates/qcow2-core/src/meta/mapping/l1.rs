//! The active L1 table; all of it is in memory.

use crate::meta::page::{DirtyRun, SECTOR_SIZE};
use crate::sync::{Mutex, Rank, RwLock, lock, read, write};
use ::alloc::collections::BTreeSet;
use ::alloc::vec::Vec;
use qcow2_format::bytes::table_bytes;
use qcow2_format::{HostOffset, L1Index};

/// The active L1 table and which of its sectors differ from the disk.
pub(super) struct L1Table {
    table: RwLock<(HostOffset, Vec<u64>)>,
    dirty: Mutex<BTreeSet<u64>>,
}

impl L1Table {
    /// The table at `offset` with these raw entries.
    pub(super) fn new(offset: HostOffset, entries: Vec<u64>) -> Self {
        Self {
            table: RwLock::new(Rank::L1Table, (offset, entries)),
            dirty: Mutex::new(Rank::L1Dirty, BTreeSet::new()),
        }
    }

    /// The raw entry at `index`; 0 past the end.
    pub(super) fn entry(&self, index: L1Index) -> u64 {
        read(&self.table).1.get(index.value() as usize).copied().unwrap_or(0)
    }

    /// True if the entry at `index` is not zero.
    pub(super) fn is_mapped(&self, index: u64) -> bool {
        read(&self.table).1.get(index as usize).is_some_and(|&raw| raw != 0)
    }

    /// Index of the first nonzero entry in `range`; `None` if there is none or `range` passes the end.
    pub(super) fn next_mapped(&self, range: core::ops::Range<u64>) -> Option<u64> {
        let table = read(&self.table);
        let entries = table.1.get(range.start as usize..range.end as usize)?;
        let index = entries.iter().position(|&raw| raw != 0)?;
        Some(range.start + index as u64)
    }

    /// Number of entries.
    pub(super) fn len(&self) -> u64 {
        read(&self.table).1.len() as u64
    }

    /// Host offset of the sector that holds entry `index`.
    pub(super) fn sector_of(&self, index: L1Index) -> HostOffset {
        let sector = index.value() * 8 / SECTOR_SIZE * SECTOR_SIZE;
        HostOffset::new(read(&self.table).0.value().saturating_add(sector))
    }

    /// The table's host offset, and a copy of its raw entries.
    pub(super) fn contents(&self) -> (HostOffset, Vec<u64>) {
        read(&self.table).clone()
    }

    /// Replaces the table by the one at `offset`, which is on disk already.
    pub(super) fn replace(&self, offset: HostOffset, entries: Vec<u64>) {
        debug_assert!(offset.value().is_multiple_of(SECTOR_SIZE), "an l1 table at {offset}");
        *write(&self.table) = (offset, entries);
        lock(&self.dirty).clear();
    }

    /// Changes an entry; the caller keeps the commit gate open. `index` must be below [`len`](Self::len).
    pub(super) fn set(&self, index: L1Index, raw: u64) {
        write(&self.table).1[index.value() as usize] = raw;
        lock(&self.dirty).insert(index.value() * 8 / SECTOR_SIZE);
    }

    /// Marks the sectors of `runs` changed again: they could not be written. Those of a table that was
    /// replaced meanwhile are left out.
    pub(super) fn put_back(&self, runs: &[DirtyRun]) {
        let table = read(&self.table);
        let sectors = (table.1.len() as u64 * 8).div_ceil(SECTOR_SIZE);
        let index = |run: &DirtyRun| Some(run.offset.value().checked_sub(table.0.value())? / SECTOR_SIZE);
        lock(&self.dirty).extend(runs.iter().filter_map(index).filter(|&sector| sector < sectors));
    }

    /// Takes copies of the changed sectors for writeback. The caller has closed the commit gate.
    pub(super) fn take_dirty(&self, runs: &mut Vec<DirtyRun>) {
        let dirty = core::mem::take(&mut *lock(&self.dirty));
        if dirty.is_empty() {
            return;
        }
        let table = read(&self.table);
        let (base, entries) = (table.0.value(), &table.1);
        let per_sector = (SECTOR_SIZE / 8) as usize;
        for sector in dirty {
            let first = sector as usize * per_sector;
            debug_assert!(first < entries.len(), "sector {sector} of an l1 table that is shorter");
            let words = &entries[first..entries.len().min(first + per_sector)];
            let bytes = table_bytes(words.iter().copied());
            runs.push(DirtyRun { offset: HostOffset::new(base + sector * SECTOR_SIZE), bytes });
        }
    }
}
