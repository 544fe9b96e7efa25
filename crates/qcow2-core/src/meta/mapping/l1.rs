//! The active L1 table; all of it that is not zeroes is in memory.

use crate::error::Result;
use crate::meta::file::read_pieces;
use crate::meta::page::{DirtyRun, SECTOR_SIZE};
use crate::port::storage::Storage;
use crate::sync::{Mutex, Rank, RwLock, lock, read, write};
use ::alloc::boxed::Box;
use ::alloc::collections::BTreeSet;
use ::alloc::vec;
use ::alloc::vec::Vec;
use qcow2_format::bytes::{table_bytes, words};
use qcow2_format::{HostOffset, L1Index};

/// The active L1 table and which of its sectors differ from the disk.
pub(super) struct L1Table {
    table: RwLock<(HostOffset, L1Entries)>,
    dirty: Mutex<BTreeSet<u64>>,
}

/// Entries of a part. Origin: ours; a part without entries costs 8 bytes instead of 8 KiB. A chain may have a
/// thousand layers with tables of 32 MiB each, which are holes in small files.
const PART: usize = 1024;

/// Raw entries of a table. A part that is all zeroes is not stored.
pub(crate) struct L1Entries {
    len: usize,
    parts: Vec<Option<Box<[u64]>>>,
}

impl L1Entries {
    fn new(raw: &[u64]) -> Self {
        let part = |part: &[u64]| part.iter().any(|&raw| raw != 0).then(|| part.into());
        Self { len: raw.len(), parts: raw.chunks(PART).map(part).collect() }
    }

    /// `count` entries, all zeroes.
    pub(crate) fn zeroes(count: u64) -> Self {
        let len = count as usize;
        Self { len, parts: (0..len.div_ceil(PART)).map(|_| None).collect() }
    }

    /// The `count` entries of the table at `offset`. Disk: reads what is not a hole. Errors: `Storage`,
    /// `Corrupt`.
    pub(crate) fn read(storage: &dyn Storage, offset: HostOffset, count: u64) -> Result<Self> {
        let mut entries = Self::zeroes(count);
        read_pieces(storage, offset, count, &mut |start, piece| {
            let nonzero = (start as usize..).zip(words(piece)).filter(|&(_, raw)| raw != 0);
            nonzero.for_each(|(index, raw)| entries.set(index, raw));
        })?;
        Ok(entries)
    }

    /// The entry at `index`; 0 past the end.
    fn at(&self, index: usize) -> u64 {
        let part = self.parts.get(index / PART).and_then(Option::as_deref);
        part.and_then(|part| part.get(index % PART)).copied().unwrap_or(0)
    }

    /// Changes the entry at `index`, which must be below `len`.
    fn set(&mut self, index: usize, raw: u64) {
        debug_assert!(index < self.len, "l1 entry {index} of {}", self.len);
        let len = PART.min(self.len - index / PART * PART);
        let part = self.parts[index / PART].get_or_insert_with(|| vec![0; len].into());
        part[index % PART] = raw;
    }

    /// Index of the first nonzero entry in `range`, which must not pass the end.
    fn next_mapped(&self, range: core::ops::Range<usize>) -> Option<usize> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / PART + 1) * PART);
            if let Some(part) = &self.parts[at / PART] {
                let inside = &part[at % PART..at % PART + (end - at)];
                if let Some(index) = inside.iter().position(|&raw| raw != 0) {
                    return Some(at + index);
                }
            }
            at = end;
        }
        None
    }

    /// All of them.
    pub(crate) fn to_vec(&self) -> Vec<u64> {
        let mut raw = vec![0; self.len];
        for (part, raw) in self.parts.iter().zip(raw.chunks_mut(PART)) {
            part.iter().for_each(|part| raw.copy_from_slice(part));
        }
        raw
    }
}

impl L1Table {
    /// The table at `offset` with these raw entries.
    pub(super) fn new(offset: HostOffset, entries: L1Entries) -> Self {
        Self {
            table: RwLock::new(Rank::L1Table, (offset, entries)),
            dirty: Mutex::new(Rank::L1Dirty, BTreeSet::new()),
        }
    }

    /// The raw entry at `index`; 0 past the end.
    pub(super) fn entry(&self, index: L1Index) -> u64 {
        read(&self.table).1.at(index.value() as usize)
    }

    /// True if the entry at `index` is not zero.
    pub(super) fn is_mapped(&self, index: u64) -> bool {
        read(&self.table).1.at(index as usize) != 0
    }

    /// Index of the first nonzero entry in `range`; `None` if there is none or `range` passes the end.
    pub(super) fn next_mapped(&self, range: core::ops::Range<u64>) -> Option<u64> {
        let table = read(&self.table);
        let range = range.start as usize..range.end as usize;
        let inside = range.end <= table.1.len;
        inside.then(|| table.1.next_mapped(range)).flatten().map(|index| index as u64)
    }

    /// Number of entries.
    pub(super) fn len(&self) -> u64 {
        read(&self.table).1.len as u64
    }

    /// Host offset of the sector that holds entry `index`.
    pub(super) fn sector_of(&self, index: L1Index) -> HostOffset {
        let sector = index.value() * 8 / SECTOR_SIZE * SECTOR_SIZE;
        HostOffset::new(read(&self.table).0.value().saturating_add(sector))
    }

    /// The table's host offset, and a copy of its raw entries.
    pub(super) fn contents(&self) -> (HostOffset, Vec<u64>) {
        let table = read(&self.table);
        (table.0, table.1.to_vec())
    }

    /// Replaces the table by the one at `offset`, which is on disk already.
    pub(super) fn replace(&self, offset: HostOffset, entries: &[u64]) {
        debug_assert!(offset.value().is_multiple_of(SECTOR_SIZE), "an l1 table at {offset}");
        *write(&self.table) = (offset, L1Entries::new(entries));
        lock(&self.dirty).clear();
    }

    /// Changes an entry; the caller keeps the commit gate open. `index` must be below [`len`](Self::len).
    pub(super) fn set(&self, index: L1Index, raw: u64) {
        write(&self.table).1.set(index.value() as usize, raw);
        lock(&self.dirty).insert(index.value() * 8 / SECTOR_SIZE);
    }

    /// Marks the sectors of `runs` changed again: they could not be written. Those of a table that was
    /// replaced meanwhile are left out.
    pub(super) fn put_back(&self, runs: &[DirtyRun]) {
        let table = read(&self.table);
        let sectors = (table.1.len as u64 * 8).div_ceil(SECTOR_SIZE);
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
            debug_assert!(first < entries.len, "sector {sector} of an l1 table that is shorter");
            let words = first..entries.len.min(first + per_sector);
            let bytes = table_bytes(words.map(|index| entries.at(index)));
            runs.push(DirtyRun { offset: HostOffset::new(base + sector * SECTOR_SIZE), bytes });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_zeroes_are_not_stored_and_read_as_zeroes() {
        let mut raw = vec![0; 3 * PART + 5];
        raw[PART + 7] = 9;
        let mut entries = L1Entries::new(&raw);
        assert_eq!(entries.parts.iter().flatten().count(), 1);
        assert_eq!((entries.at(PART + 7), entries.at(0), entries.at(3 * PART + 5)), (9, 0, 0));
        assert_eq!(entries.next_mapped(0..raw.len()), Some(PART + 7));
        assert_eq!(entries.next_mapped(PART + 8..raw.len()), None);
        raw[3 * PART + 4] = 1;
        entries.set(3 * PART + 4, 1);
        assert_eq!(entries.next_mapped(PART + 8..raw.len()), Some(3 * PART + 4));
        assert_eq!(entries.next_mapped(PART + 8..raw.len() - 1), None);
        assert_eq!(entries.to_vec(), raw);
    }
}
