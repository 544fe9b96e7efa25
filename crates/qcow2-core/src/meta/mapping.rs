//! L1 and L2 lookups, and the one way an L2 entry changes.
//!
//! Invariant I2: an entry changes only after everything it leads to has been written.

use super::Meta;
use super::overlap::OverlapChecks;
use super::page::{Page, SECTOR_SIZE};
use super::pending::Unlinked;
use super::run::ClusterRun;
use crate::error::{Error, ErrorKind, Result};
use crate::invariant;
use crate::port::event::Event;
use crate::port::storage::ZeroMode;
use crate::read::resolve::{Place, Run, resolve_run};
use crate::rules::OrderingRule;
use crate::sync::{lock, read};
use ::alloc::format;
use ::alloc::sync::Arc;
use ::alloc::vec;
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::{ClusterEntry, L2Entry};
use qcow2_format::{FormatError, GuestOffset, HostOffset, L1Index};

/// A cached piece of an L2 table and the entry in it that maps a guest offset.
#[derive(Clone)]
pub(crate) struct L2Place {
    page: Arc<Page>,
    word: usize,
    words_per_entry: usize,
}

impl L2Place {
    /// How many entries this page holds from the found one on.
    pub(crate) fn entries(&self) -> u64 {
        ((self.page.len() - self.word) / self.words_per_entry) as u64
    }

    fn raw(&self, index: u64) -> (u64, u64) {
        let at = self.word + index as usize * self.words_per_entry;
        if self.words_per_entry == 2 { self.page.pair(at) } else { (self.page.word(at), 0) }
    }
}

/// L1 entries that are looked at for one run: a whole table is 64 runs then.
const MAX_UNMAPPED_ENTRIES: u64 = 1 << 16;

impl Meta {
    /// Where the bytes from `offset` on live: one run of at most `max_len` bytes. Disk: may read an L2 table.
    /// Errors: `Corrupt` for a broken entry, `Storage`.
    pub(crate) fn lookup(&self, offset: GuestOffset, max_len: u64) -> Result<Run> {
        let Some(place) = self.l2_place(offset)? else {
            return Ok(Run { len: self.unmapped_len(offset, max_len), place: Place::Unallocated });
        };
        let entry = |i| {
            let (raw, bitmap) = place.raw(i);
            self.l2_format.decode(raw, bitmap)
        };
        let run = resolve_run(&self.l2_format, offset, max_len, place.entries(), entry)
            .map_err(|e| self.entry_error(offset, e))?;
        invariant::covers(&run, max_len);
        match run.place {
            Place::Data { host, .. } => self.check_place(offset, host)?,
            Place::Compressed(_) => self.check_compressed(offset)?,
            _ => {}
        }
        Ok(run)
    }

    /// In a data file bytes are where the guest has them; anything else is damage.
    fn check_place(&self, offset: GuestOffset, host: HostOffset) -> Result<()> {
        if !self.has_data_file() || host.value() == offset.value() {
            return Ok(());
        }
        Err(self.mark_corrupt(format!(
            "l2 entry of guest offset {offset}: host offset {host} in the data file, allowed is {offset}"
        )))
    }

    /// In a data file nothing is compressed: such an entry would have its cluster replaced by one of the
    /// image file, whose place in the data file is another guest cluster's.
    fn check_compressed(&self, offset: GuestOffset) -> Result<()> {
        if !self.has_data_file() {
            return Ok(());
        }
        Err(self
            .mark_corrupt(format!("l2 entry of guest offset {offset}: compressed in an external data file")))
    }

    /// An entry that cannot be right: an image open for writing is marked, so that nothing is built on it.
    fn entry_error(&self, offset: GuestOffset, error: FormatError) -> Error {
        self.mark_corrupt(format!("l2 entry of guest offset {offset} is damaged")).with_source(error)
    }

    /// How far L1 entries without a table reach from `offset` on, at most `max_len`, as far as it is told
    /// cheaply: whoever walks over two disks asks one of them again and again.
    fn unmapped_len(&self, offset: GuestOffset, max_len: u64) -> u64 {
        let (coverage, start) = (self.geometry.l2_coverage(), offset.value());
        let limit = start.saturating_add(max_len);
        // Past its end the table has nothing, however large the disk is said to be.
        let (first, end) = (start / coverage + 1, limit.div_ceil(coverage).min(self.l1.len()));
        let looked_at = end.min(first.saturating_add(MAX_UNMAPPED_ENTRIES));
        match self.l1.next_mapped(first..looked_at) {
            Some(index) => index * coverage - start,
            None if looked_at < end => looked_at * coverage - start,
            None => limit - start,
        }
    }

    fn l1_entry(&self, index: L1Index) -> Result<L1Entry> {
        let raw = self.l1.entry(index);
        L1Entry::decode(raw, &self.geometry)
            .map_err(|e| self.mark_corrupt(format!("l1 entry {index} is damaged")).with_source(e))
    }

    /// The L2 entry that maps `offset`, or `None` where there is no table.
    fn l2_place(&self, offset: GuestOffset) -> Result<Option<L2Place>> {
        match self.l1_entry(self.geometry.l1_index(offset))?.l2_table {
            Some(table) => self.place_in_table(table, offset).map(Some),
            None => Ok(None),
        }
    }

    fn place_in_table(&self, table: HostOffset, offset: GuestOffset) -> Result<L2Place> {
        let entry_size = self.geometry.l2_entry_size();
        let byte = self.geometry.l2_index(offset).value() * entry_size;
        let at = table
            .checked_add(byte)
            .ok_or_else(|| Error::corrupt(format!("l2 table at {table} passes 2^64")))?;
        let (start, word) = self.l2_cache.locate(at);
        if self.events.is_some() && self.l2_cache.cached(start).is_none() {
            self.event(Event::L2Load);
        }
        let page = self.l2_cache.load(&*self.storage, start)?;
        Ok(L2Place { page, word, words_per_entry: (entry_size / 8) as usize })
    }

    /// The `index`-th entry counted from the one at `place`. `offset` names it in errors.
    pub(crate) fn entry(&self, place: &L2Place, index: u64, offset: GuestOffset) -> Result<L2Entry> {
        let (raw, bitmap) = place.raw(index);
        let entry = self.l2_format.decode(raw, bitmap).map_err(|e| self.entry_error(offset, e))?;
        // Of clusters that are not read too: a write would go there.
        let start = self.geometry.align_down(offset.value()) + index * self.geometry.cluster_size();
        match entry {
            L2Entry::Standard(ClusterEntry { host: Some(host), .. }) => {
                self.check_place(GuestOffset::new(start), host)?;
            }
            L2Entry::Standard(_) => {}
            L2Entry::Compressed(_) => self.check_compressed(GuestOffset::new(start))?,
        }
        Ok(entry)
    }

    /// The L2 entry of `offset` in a table that may be changed: a missing table is made, a shared one copied.
    /// The caller has claimed the cluster. Disk: the new table's content; its L1 entry waits for the next
    /// write-back.
    pub(crate) fn writable_place(&self, offset: GuestOffset) -> Result<L2Place> {
        let index = self.geometry.l1_index(offset);
        let entry = self.l1_entry(index)?;
        if let (Some(table), true) = (entry.l2_table, entry.copied) {
            return self.place_to_change(table, offset);
        }
        let _making = lock(&self.table_lock);
        let entry = self.l1_entry(index)?;
        let table = match entry.l2_table {
            Some(table) if entry.copied => table,
            old => self.make_l2_table(index, old)?,
        };
        self.place_to_change(table, offset)
    }

    /// The entry of `offset` in `table`, which is about to be changed: an L1 entry that points at other
    /// metadata stops here.
    fn place_to_change(&self, table: HostOffset, offset: GuestOffset) -> Result<L2Place> {
        let place = self.place_in_table(table, offset)?;
        if !place.page.is_queued() {
            let (at, len) = (place.page.offset(), self.l2_cache.page_size());
            self.check_table_place(OverlapChecks::ACTIVE_L2, at, len)?;
        }
        Ok(place)
    }

    fn make_l2_table(&self, index: L1Index, old: Option<HostOffset>) -> Result<HostOffset> {
        if index.value() >= self.l1.len() {
            return Err(Error::corrupt(format!(
                "l1 table has {} entries, entry {index} is needed",
                self.l1.len()
            )));
        }
        self.check_table_place(OverlapChecks::ACTIVE_L1, self.l1.sector_of(index), SECTOR_SIZE)?;
        let old_run = old.map(|old| Unlinked {
            clusters: ClusterRun::one(self.geometry.host_cluster(old).value()),
            kinds: OverlapChecks::ACTIVE_L2,
        });
        if let Some(old) = old {
            // Snapshots share it; anything else there is no table to copy.
            self.check_table_place(OverlapChecks::L2, old, self.geometry.cluster_size())?;
        }
        let cluster = self.allocate_metadata(OverlapChecks::ACTIVE_L2, 1)?;
        let table = cluster.offset;
        if let Err(error) = self.fill_l2_table(table, old, cluster.fresh) {
            self.release(Unlinked { clusters: cluster.run, kinds: OverlapChecks::ACTIVE_L2 })?;
            return Err(error);
        }
        let _open = read(&self.gate);
        self.l1.set(index, L1Entry { l2_table: Some(table), copied: true }.encode());
        if let Some(run) = old_run {
            lock(&self.pending).push(run);
        }
        Ok(table)
    }

    fn fill_l2_table(&self, table: HostOffset, old: Option<HostOffset>, fresh: bool) -> Result<()> {
        let size = self.geometry.cluster_size();
        self.l2_cache.forget(table, size);
        if !self.rules.keep(OrderingRule::TableBeforeEntry) {
            return Ok(());
        }
        match old {
            Some(old) => {
                let mut bytes = vec![0; size as usize];
                self.event(Event::L2AllocCowRead);
                self.storage.read_padded(old, &mut bytes)?;
                self.event(Event::L2AllocWrite);
                self.write_table(OverlapChecks::ACTIVE_L2, table, &bytes)?;
            }
            None if fresh => {
                self.event(Event::L2AllocWrite);
                self.write_empty_table(OverlapChecks::ACTIVE_L2, table)?;
            }
            None => {
                self.event(Event::L2AllocWrite);
                self.storage.write_zeroes(table, size, ZeroMode::KeepAllocated)?;
            }
        }
        Ok(())
    }

    /// Sets the entries from `place` on, `entry(i)` giving the `i`-th of `count`. The caller has claimed
    /// their clusters, and everything the new entries lead to has been written. `unlinked` are the references
    /// the old ones held.
    pub(crate) fn commit(
        &self,
        place: &L2Place,
        count: u64,
        unlinked: &[Unlinked],
        entry: impl Fn(u64) -> L2Entry,
    ) -> Result<()> {
        invariant::may_write(self.writable);
        assert!(count <= place.entries(), "{count} entries are changed in a page that has fewer");
        let _open = read(&self.gate);
        for i in 0..count {
            invariant::leads_to_cluster(&self.geometry, &entry(i));
            let (raw, bitmap) = self
                .l2_format
                .encode(&entry(i))
                .ok_or_else(|| Error::new(ErrorKind::NoSpace, "host offset is too large for an l2 entry"))?;
            let at = place.word + i as usize * place.words_per_entry;
            if place.words_per_entry == 2 {
                place.page.set_pair(at, raw, bitmap);
            } else {
                place.page.set_word(at, raw);
            }
        }
        self.l2_cache.note_dirty(&place.page);
        if !unlinked.is_empty() && !self.has_data_file() {
            let mut pending = lock(&self.pending);
            for &run in unlinked {
                pending.push(run);
            }
        }
        Ok(())
    }
}
