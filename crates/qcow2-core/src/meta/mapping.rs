//! L1 and L2 lookups, and the one way an L2 entry changes.
//!
//! Invariant I2: an entry changes only after everything it leads to has been written.

mod l1;
mod table;

use self::l1::L1Table;
use super::cache::PageCache;
use super::file::ImageFile;
use super::header::HeaderStore;
use super::page::{DirtyRun, Page};
use super::pending::Unlinked;
use super::refcount::RefcountStore;
use super::tables::Tables;
use crate::error::{Error, ErrorKind, Result, TableKind};
use crate::inflight::{Claim, Claims, touched_clusters};
use crate::invariant;
use crate::port::event::Event;
use crate::read::expanded::ExpandedClusters;
use crate::read::resolve::{Place, Run, resolve_run};
use crate::sync::{Mutex, Rank, RwLock, RwLockWriteGuard, read, write};
use ::alloc::format;
use ::alloc::sync::Arc;
use ::alloc::vec::Vec;
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::{ClusterEntry, L2Entry, L2Format};
use qcow2_format::{FormatError, GuestOffset, HostOffset, L1Index};

/// L1 entries that are looked at for one run: a whole table is 64 runs then.
const MAX_UNMAPPED_ENTRIES: u64 = 1 << 16;

/// Which guest range lives where: the active L1 table, the cached L2 tables, and who is changing them.
pub(crate) struct Mapping {
    // The file has it too; here every lookup finds it without following a pointer.
    format: L2Format,
    file: Arc<ImageFile>,
    header: Arc<HeaderStore>,
    tables: Arc<Tables>,
    refcounts: Arc<RefcountStore>,
    l1: L1Table,
    cache: PageCache,
    /// Open (read) while entries change, closed (write) while a write-back copies them.
    gate: RwLock<()>,
    // Two writers that miss the same table must not make it twice: the second copy would lose what was
    // written through the first.
    table_lock: Mutex<()>,
    claims: Claims,
    expanded: ExpandedClusters,
}

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
        debug_assert!(at + self.words_per_entry <= self.page.len(), "entry {index} is not in this page");
        if self.words_per_entry == 2 { self.page.pair(at) } else { (self.page.word(at), 0) }
    }
}

/// Changed sectors of the mapping, as they were at one moment.
pub(crate) struct MappingChanges {
    pub(crate) l2: Vec<DirtyRun>,
    pub(crate) l1: Vec<DirtyRun>,
    /// Keeps the pages in the cache until their sectors are written: read from the disk before that, they
    /// would be the old ones.
    _pages: Vec<Arc<Page>>,
}

impl Mapping {
    /// `l1`: where the active L1 table is, and its raw entries. `cache`: for L2 tables.
    pub(crate) fn new(refcounts: Arc<RefcountStore>, l1: (HostOffset, Vec<u64>), cache: PageCache) -> Self {
        let tables = refcounts.tables();
        let file = Arc::clone(tables.file());
        Self {
            format: *file.l2_format(),
            file,
            header: Arc::clone(tables.header()),
            tables: Arc::clone(tables),
            refcounts,
            l1: L1Table::new(l1.0, l1.1),
            cache,
            gate: RwLock::new(Rank::Gate, ()),
            table_lock: Mutex::new(Rank::NewTable, ()),
            claims: Claims::default(),
            expanded: ExpandedClusters::default(),
        }
    }

    /// Where the bytes from `offset` on live: one run of at most `max_len` bytes. Disk: may read an L2 table.
    /// Errors: `Corrupt` for a broken entry, `Storage`.
    pub(crate) fn lookup(&self, offset: GuestOffset, max_len: u64) -> Result<Run> {
        let Some(place) = self.l2_place(offset)? else {
            let run = Run { len: self.unmapped_len(offset, max_len), place: Place::Unallocated };
            invariant::covers(&run, max_len);
            return Ok(run);
        };
        let entry = |i| {
            let (raw, bitmap) = place.raw(i);
            self.format.decode(raw, bitmap)
        };
        let run = resolve_run(&self.format, offset, max_len, place.entries(), entry)
            .map_err(|e| self.entry_error(offset, e))?;
        invariant::covers(&run, max_len);
        match run.place {
            Place::Data { host, .. } => {
                invariant::equally_far(&self.format.geometry, offset, host);
                self.check_place(offset, host)?;
            }
            Place::Compressed(_) => self.check_compressed(offset)?,
            _ => {}
        }
        Ok(run)
    }

    /// In a data file bytes are where the guest has them; anything else is damage.
    fn check_place(&self, offset: GuestOffset, host: HostOffset) -> Result<()> {
        if !self.format.external_data || host.value() == offset.value() {
            return Ok(());
        }
        Err(self.header.mark_corrupt(format!(
            "l2 entry of guest offset {offset}: host offset {host} in the data file, allowed is {offset}"
        )))
    }

    /// In a data file nothing is compressed: such an entry would have its cluster replaced by one of the
    /// image file, whose place in the data file is another guest cluster's.
    fn check_compressed(&self, offset: GuestOffset) -> Result<()> {
        if !self.format.external_data {
            return Ok(());
        }
        let message = format!("l2 entry of guest offset {offset}: compressed in an external data file");
        Err(self.header.mark_corrupt(message).in_table(TableKind::L2).at_guest(offset))
    }

    /// An entry that cannot be right: an image open for writing is marked, so that nothing is built on it.
    fn entry_error(&self, offset: GuestOffset, error: FormatError) -> Error {
        let damaged = self.header.mark_corrupt(format!("l2 entry of guest offset {offset} is damaged"));
        damaged.in_table(TableKind::L2).at_guest(offset).with_source(error)
    }

    /// How far L1 entries without a table reach from `offset` on, at most `max_len`, as far as that is cheap
    /// to find out: a comparison of two disks asks one of them again and again.
    fn unmapped_len(&self, offset: GuestOffset, max_len: u64) -> u64 {
        let (coverage, start) = (self.format.geometry.l2_coverage(), offset.value());
        let limit = start.saturating_add(max_len);
        // Past its end the table has nothing, however large the header's disk size is.
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
        L1Entry::decode(raw, &self.format.geometry).map_err(|e| {
            let damaged = self.header.mark_corrupt(format!("l1 entry {index} is damaged"));
            damaged.in_table(TableKind::L1).with_source(e)
        })
    }

    /// The L2 entry that maps `offset`, or `None` where there is no table.
    fn l2_place(&self, offset: GuestOffset) -> Result<Option<L2Place>> {
        match self.l1_entry(self.format.geometry.l1_index(offset))?.l2_table {
            Some(table) => self.place_in_table(table, offset).map(Some),
            None => Ok(None),
        }
    }

    fn place_in_table(&self, table: HostOffset, offset: GuestOffset) -> Result<L2Place> {
        let entry_size = self.format.geometry.l2_entry_size();
        let byte = self.format.geometry.l2_index(offset).value() * entry_size;
        let at = table.checked_add(byte).ok_or_else(|| {
            Error::corrupt(format!("l2 table at {table} passes 2^64")).in_table(TableKind::L2).at_host(table)
        })?;
        let (start, word) = self.cache.locate(at);
        let page = match self.cache.cached(start) {
            Some(page) => page,
            None => {
                self.file.event(Event::L2Load);
                self.cache.load(self.file.storage(), start)?
            }
        };
        Ok(L2Place { page, word, words_per_entry: (entry_size / 8) as usize })
    }

    /// The `index`-th entry counted from the one at `place`. `offset` names it in errors.
    pub(crate) fn entry(&self, place: &L2Place, index: u64, offset: GuestOffset) -> Result<L2Entry> {
        let (raw, bitmap) = place.raw(index);
        let entry = self.format.decode(raw, bitmap).map_err(|e| self.entry_error(offset, e))?;
        // Of clusters that are not read too: a write would go there.
        let geometry = &self.format.geometry;
        let start = geometry.align_down(offset.value()) + index * geometry.cluster_size();
        match entry {
            L2Entry::Standard(ClusterEntry { host: Some(host), .. }) => {
                self.check_place(GuestOffset::new(start), host)?;
            }
            L2Entry::Standard(_) => {}
            L2Entry::Compressed(_) => self.check_compressed(GuestOffset::new(start))?,
        }
        Ok(entry)
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
        invariant::may_write(self.file.is_writable());
        assert!(count <= place.entries(), "{count} entries are changed in a page that has fewer");
        // Open for all of it: entries and the references they gave up belong to one round. One dropped in a
        // round before would free a cluster that the disk still leads to.
        let _open = read(&self.gate);
        for i in 0..count {
            invariant::leads_to_cluster(&self.format.geometry, &entry(i));
            let (raw, bitmap) = self
                .format
                .encode(&entry(i))
                .ok_or_else(|| Error::new(ErrorKind::NoSpace, "host offset is too large for an l2 entry"))?;
            let at = place.word + i as usize * place.words_per_entry;
            if place.words_per_entry == 2 {
                place.page.set_pair(at, raw, bitmap);
            } else {
                place.page.set_word(at, raw);
            }
        }
        self.cache.note_dirty(&place.page);
        if !unlinked.is_empty() && !self.format.external_data {
            self.refcounts.unlink_all(unlinked);
        }
        Ok(())
    }

    /// Waits until nobody else changes or writes through the mapping of `len` bytes from `offset` on, then
    /// claims its clusters; see [`Claims::claim`].
    pub(crate) fn claim(&self, offset: GuestOffset, len: u64) -> Claim<'_> {
        self.claims.claim(touched_clusters(&self.format.geometry, offset, len))
    }

    /// Keeps the mapping of `len` bytes from `offset` on as it is; see [`Claims::share`].
    pub(crate) fn share(&self, offset: GuestOffset, len: u64) -> Claim<'_> {
        self.claims.share(touched_clusters(&self.format.geometry, offset, len))
    }

    /// What compressed clusters expand to, for those that were read lately.
    pub(crate) fn expanded(&self) -> &ExpandedClusters {
        &self.expanded
    }

    /// Where the active L1 table is, and a copy of its raw entries.
    pub(crate) fn l1_contents(&self) -> (HostOffset, Vec<u64>) {
        self.l1.contents()
    }

    /// How many entries the active L1 table has.
    pub(crate) fn l1_len(&self) -> u64 {
        self.l1.len()
    }

    /// Whether the L1 entry at `index` leads anywhere.
    pub(crate) fn is_mapped(&self, index: u64) -> bool {
        self.l1.is_mapped(index)
    }

    /// Goes on with an L1 table at `offset` with these raw entries, which are on disk already.
    pub(crate) fn replace_l1(&self, offset: HostOffset, entries: Vec<u64>) {
        self.l1.replace(offset, entries);
    }

    /// Changes an L1 entry. `index` must be below [`l1_len`](Self::l1_len). Disk: with the next flush.
    pub(crate) fn set_l1_entry(&self, index: L1Index, entry: L1Entry) {
        debug_assert!(index.value() < self.l1.len(), "l1 entry {index} is not in the table");
        let _open = read(&self.gate);
        self.l1.set(index, entry.encode());
    }

    /// Keeps entries from changing until the guard is dropped.
    pub(crate) fn close_gate(&self) -> RwLockWriteGuard<'_, ()> {
        write(&self.gate)
    }

    /// Takes the changed sectors for write-back. The caller has closed the gate.
    pub(crate) fn take_changes(&self) -> MappingChanges {
        let (pages, l2) = self.cache.take_dirty();
        let mut l1 = Vec::new();
        self.l1.take_dirty(&mut l1);
        MappingChanges { l2, l1, _pages: pages }
    }

    /// Whether enough L2 tables wait for write-back that it should happen now.
    pub(crate) fn is_pressed(&self) -> bool {
        self.cache.is_pressed()
    }

    /// Drops the cached L2 table at `table`, changes included: the disk has another one.
    pub(crate) fn forget_table(&self, table: HostOffset) {
        self.cache.forget(table, self.format.geometry.cluster_size());
    }

    /// Drops all cached L2 tables: the disk has others now.
    pub(crate) fn forget_tables(&self) {
        self.cache.clear();
    }
}
