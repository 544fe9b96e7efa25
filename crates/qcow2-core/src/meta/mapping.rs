//! The mapping: L1 and L2 lookups, and all changes of L2 entries.
//!
//! Invariant I2: an entry changes only after everything that it points to has been written.

mod l1;
mod scan;
mod table;

pub(crate) use self::l1::L1Entries;
use self::l1::L1Table;
pub(crate) use self::scan::Stored;
use super::cache::PageCache;
use super::file::ImageFile;
use super::header::HeaderStore;
use super::page::{DirtyRun, Page};
use super::pending::Unlinked;
use super::refcount::RefcountStore;
use super::tables::Tables;
use crate::damage::{Damage, L2Slot, bad_l1_entry};
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
use qcow2_format::{FormatError, FormatErrorKind, GuestOffset, HostOffset, L1Index};

/// L1 entries that one lookup examines at most: a whole table of the largest size then is 64 runs.
const MAX_UNMAPPED_ENTRIES: u64 = 1 << 16;

/// The mapping of guest offsets to host offsets: the active L1 table, the cached L2 tables, and the claims of
/// requests that are changing it.
pub(crate) struct Mapping {
    // A copy of the one in `file`: saves every lookup a pointer.
    format: L2Format,
    file: Arc<ImageFile>,
    header: Arc<HeaderStore>,
    tables: Arc<Tables>,
    refcounts: Arc<RefcountStore>,
    l1: L1Table,
    cache: PageCache,
    /// The commit gate: open (read-locked) while entries change, closed (write-locked) while writeback copies
    /// them.
    gate: RwLock<()>,
    // Two writers that need the same new table must not both make one: entries that were written through the
    // first would be lost.
    table_lock: Mutex<()>,
    claims: Claims,
    expanded: ExpandedClusters,
}

/// A cached page of an L2 table, and the entry in it that maps a guest offset.
#[derive(Clone)]
pub(crate) struct L2Place {
    page: Arc<Page>,
    word: usize,
    words_per_entry: usize,
}

impl L2Place {
    /// Number of entries in the page from this one on.
    pub(crate) fn entries(&self) -> u64 {
        let words = self.page.len() - self.word;
        // No division: this is asked in every lookup.
        (if self.words_per_entry == 2 { words / 2 } else { words }) as u64
    }

    /// The run at `offset` if the whole page has one entry again and again, which has no host offset. Tables
    /// of zeroes are long, and a damaged L1 table may lead to one of them from each of its entries.
    fn like_the_first(&self, format: &L2Format, offset: GuestOffset, max_len: u64) -> Option<Run> {
        let inside = format.geometry.in_cluster(offset.value());
        if max_len <= format.geometry.cluster_size() - inside {
            return None;
        }
        let raw = self.page.same_words().filter(|_| self.words_per_entry == 1)?;
        let place = match format.decode(raw, 0) {
            Ok(L2Entry::Standard(entry)) if entry.host.is_none() && entry.zero != 0 => {
                Place::Zero { host: None }
            }
            Ok(L2Entry::Standard(entry)) if entry.host.is_none() => Place::Unallocated,
            _ => return None,
        };
        let len = self.entries() * format.geometry.cluster_size() - inside;
        Some(Run { len: len.min(max_len), place })
    }

    fn raw(&self, index: u64) -> (u64, u64) {
        let at = self.word + index as usize * self.words_per_entry;
        debug_assert!(at + self.words_per_entry <= self.page.len(), "entry {index} is not in this page");
        if self.words_per_entry == 2 { self.page.pair(at) } else { (self.page.word(at), 0) }
    }
}

/// Copies of the changed sectors of the mapping, all of one moment.
pub(crate) struct MappingChanges {
    pub(crate) l2: Vec<DirtyRun>,
    pub(crate) l1: Vec<DirtyRun>,
    /// Keeps the pages in the cache until their sectors are written: an evicted page would be read back from
    /// disk without its changes.
    pages: Vec<Arc<Page>>,
}

impl Mapping {
    /// `l1`: host offset and raw entries of the active L1 table. `cache`: for L2 tables.
    pub(crate) fn new(refcounts: Arc<RefcountStore>, l1: (HostOffset, L1Entries), cache: PageCache) -> Self {
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

    /// Looks up the bytes at `offset`: one run of at most `max_len` bytes. Disk: may read a page of an L2
    /// table. Errors: `Corrupt` for a damaged entry, `Storage`.
    pub(crate) fn lookup(&self, offset: GuestOffset, max_len: u64) -> Result<Run> {
        self.find(offset, max_len, None)
    }

    /// [`lookup`](Self::lookup) at the start of a change, which is what the error then says.
    pub(crate) fn lookup_to_change(&self, offset: GuestOffset, max_len: u64) -> Result<Run> {
        let cluster = GuestOffset::new(self.format.geometry.align_down(offset.value()));
        self.find(offset, max_len, Some(cluster))
    }

    /// [`lookup`](Self::lookup) in what is in memory: `None` if a table would have to be read.
    pub(crate) fn cached_lookup(&self, offset: GuestOffset, max_len: u64) -> Result<Option<Run>> {
        let Some(table) = self.l1_entry(self.format.geometry.l1_index(offset))?.l2_table else {
            return Ok(Some(self.unmapped(offset, max_len)));
        };
        let (start, word, words_per_entry) = self.locate(table, offset)?;
        let Some(page) = self.cache.cached(start) else { return Ok(None) };
        self.run_at(offset, max_len, &L2Place { page, word, words_per_entry }, None).map(Some)
    }

    fn find(&self, offset: GuestOffset, max_len: u64, to_change: Option<GuestOffset>) -> Result<Run> {
        match self.l2_place(offset)? {
            Some(place) => self.run_at(offset, max_len, &place, to_change),
            None => Ok(self.unmapped(offset, max_len)),
        }
    }

    fn unmapped(&self, offset: GuestOffset, max_len: u64) -> Run {
        let run = Run { len: self.unmapped_len(offset, max_len), place: Place::Unallocated };
        invariant::covers(&run, max_len);
        run
    }

    /// The run at `offset`, whose entry is at `place`.
    fn run_at(
        &self,
        offset: GuestOffset,
        max_len: u64,
        place: &L2Place,
        to_change: Option<GuestOffset>,
    ) -> Result<Run> {
        let entry = |i| {
            let (raw, bitmap) = place.raw(i);
            self.format.decode(raw, bitmap)
        };
        let run = match place.like_the_first(&self.format, offset, max_len) {
            Some(run) => self.past_holes(offset, max_len, place, run),
            None => resolve_run(&self.format, offset, max_len, place.entries(), entry)
                .map_err(|e| self.entry_error(offset, place.raw(0).0, e, to_change))?,
        };
        invariant::covers(&run, max_len);
        match run.place {
            Place::Data { host, .. } => {
                invariant::equally_far(&self.format.geometry, offset, host);
                self.check_place(offset, host)?;
            }
            Place::Zero { host: Some(host) } => self.check_place(offset, host)?,
            Place::Compressed(_) => self.check_compressed(offset)?,
            Place::Zero { host: None } | Place::Unallocated => {}
        }
        Ok(run)
    }

    /// In an external data file host offset and guest offset must be equal; anything else is damage. Of
    /// zeroes too: where the offset is wrong, the flag may be.
    #[inline]
    fn check_place(&self, offset: GuestOffset, host: HostOffset) -> Result<()> {
        if !self.format.external_data || host.value() == offset.value() {
            return Ok(());
        }
        Err(self.misplaced(offset, host))
    }

    #[cold]
    fn misplaced(&self, offset: GuestOffset, host: HostOffset) -> Error {
        let message = format!(
            "l2 entry of guest offset {offset}: host offset {host} in the data file, allowed is {offset}"
        );
        let geometry = &self.format.geometry;
        let guest = GuestOffset::new(geometry.align_down(offset.value()));
        let there = HostOffset::new(geometry.align_down(host.value()));
        let error = Error::corrupt(message).in_table(TableKind::L2).at_guest(offset);
        self.damaged(error, offset, |entry| Damage::DataFileOffset { entry, guest, offset: there })
    }

    /// Refuses a compressed entry in an image with an external data file. A write would replace it by a
    /// cluster that is allocated in the image file, and that host offset belongs to another guest cluster in
    /// the data file.
    fn check_compressed(&self, offset: GuestOffset) -> Result<()> {
        if !self.format.external_data {
            return Ok(());
        }
        let message = format!("l2 entry of guest offset {offset}: compressed in an external data file");
        let error = Error::corrupt(message).in_table(TableKind::L2).at_guest(offset);
        Err(self.damaged(error, offset, |entry| Damage::CompressedInDataFile { entry }))
    }

    /// The error for a damaged entry. Marks an image that is open for writing corrupt, so that no change
    /// builds on it. `raw`: the entry's first word. `to_change`: the cluster, if the entry is to change.
    #[cold]
    fn entry_error(
        &self,
        offset: GuestOffset,
        raw: u64,
        error: FormatError,
        to_change: Option<GuestOffset>,
    ) -> Error {
        let (kind, zero) = (error.kind().clone(), self.format.has_zero_flag(raw));
        let damaged = Error::corrupt(format!("l2 entry of guest offset {offset} is damaged"));
        let damaged = damaged.in_table(TableKind::L2).at_guest(offset).with_source(error);
        match kind {
            FormatErrorKind::Misaligned(host) => self.damaged(damaged, offset, |entry| {
                Damage::ClusterOffset { entry, offset: HostOffset::new(host), zero, to_change }
            }),
            FormatErrorKind::ZeroFlagInVersion2 => {
                self.damaged(damaged, offset, |entry| Damage::ZeroInVersion2 { entry })
            }
            FormatErrorKind::SubclusterBitmap(_) => {
                self.damaged(damaged, offset, |entry| Damage::SubclusterBitmap { entry, to_change })
            }
            _ => self.header.marked(damaged),
        }
    }

    /// Marks the image corrupt, for what is wrong with the entry that maps `offset`.
    fn damaged(&self, error: Error, offset: GuestOffset, damage: impl Fn(L2Slot) -> Damage) -> Error {
        let geometry = &self.format.geometry;
        let index = geometry.l2_index(offset);
        // Whoever has got as far as the entry has found its table.
        let table = L1Entry::decode(self.l1.entry(geometry.l1_index(offset)), geometry);
        self.header.marked(match table.ok().and_then(|entry| entry.l2_table) {
            Some(table) => error.with_damage(damage(L2Slot { table, index })),
            None => error,
        })
    }

    /// How many bytes from `offset` on have no data in this layer, at most `max_len`: they are unallocated or
    /// zeroes, also by turns. At most to the end of a page of the table. 0 for an entry that is damaged.
    /// Disk: may read that page. Errors: `Corrupt` for a damaged L1 entry, `Storage`.
    pub(crate) fn len_without_data(&self, offset: GuestOffset, max_len: u64) -> Result<u64> {
        let Some(place) = self.l2_place(offset)? else { return Ok(self.unmapped_len(offset, max_len)) };
        if let Some(run) = place.like_the_first(&self.format, offset, max_len) {
            return Ok(self.past_holes(offset, max_len, &place, run).len);
        }
        let is_data = |&index: &u64| {
            let (raw, bitmap) = place.raw(index);
            !matches!(self.format.decode(raw, bitmap), Ok(L2Entry::Standard(entry)) if entry.allocated == 0)
        };
        let entries = (0..place.entries()).find(is_data).unwrap_or(place.entries());
        let geometry = &self.format.geometry;
        let len = (entries * geometry.cluster_size()).saturating_sub(geometry.in_cluster(offset.value()));
        Ok(len.min(max_len))
    }

    /// How many bytes at `offset` have no L2 table, at most `max_len`; `None` if there is one. Reads nothing.
    pub(crate) fn len_without_table(&self, offset: GuestOffset, max_len: u64) -> Option<u64> {
        let index = self.format.geometry.l1_index(offset).value();
        (!self.l1.is_mapped(index)).then(|| self.unmapped_len(offset, max_len))
    }

    /// Length of the run of L1 entries without an L2 table at `offset`, at most `max_len`. Examines only
    /// [`MAX_UNMAPPED_ENTRIES`] entries: a comparison of two disks may look up the same long run again and
    /// again.
    fn unmapped_len(&self, offset: GuestOffset, max_len: u64) -> u64 {
        let (coverage, start) = (self.format.geometry.l2_coverage(), offset.value());
        let limit = start.saturating_add(max_len);
        // Everything past the end of the table is unmapped, however large the disk size in the header is.
        let (first, end) = (start / coverage + 1, limit.div_ceil(coverage).min(self.l1.len()));
        let looked_at = end.min(first.saturating_add(MAX_UNMAPPED_ENTRIES));
        match self.l1.next_mapped(first..looked_at) {
            Some(index) => index * coverage - start,
            None if looked_at < end => looked_at * coverage - start,
            None => limit - start,
        }
    }

    /// Lengthens a run that takes the rest of a page of zeroes by all behind it that is in the same hole of
    /// the file: a small file may have a table of 2 MiB for each of its L1 entries, none of which was ever
    /// written. Disk: queries the hole, and reads none of its tables. Not for an image that is written to,
    /// whose cache is newer than the file.
    fn past_holes(&self, offset: GuestOffset, max_len: u64, place: &L2Place, run: Run) -> Run {
        if run.len == max_len || run.place != Place::Unallocated || self.file.is_writable() {
            return run;
        }
        let Some(hole) = self.file.hole_at(place.page.offset().value()) else { return run };
        let (geometry, limit) = (&self.format.geometry, offset.value().saturating_add(max_len));
        let first = geometry.l1_index(offset);
        let Ok(L1Entry { l2_table: Some(own), .. }) = self.l1_entry(first) else { return run };
        let inside = (hole.end - own.value()).min(geometry.cluster_size()) / geometry.l2_entry_size();
        let start = geometry.l2_coverage().saturating_mul(first.value());
        let mut end = start.saturating_add(inside.saturating_mul(geometry.cluster_size()));
        if inside == geometry.l2_entries() {
            let in_hole = |raw| match L1Entry::decode(raw, geometry) {
                Ok(L1Entry { l2_table: None, .. }) => true,
                Ok(L1Entry { l2_table: Some(at), .. }) => {
                    let end = at.value().checked_add(geometry.cluster_size());
                    hole.contains(&at.value()) && end.is_some_and(|end| end <= hole.end)
                }
                Err(_) => false,
            };
            let next = first.value() + 1;
            let last = self.l1.len().min(next.saturating_add(MAX_UNMAPPED_ENTRIES));
            let alike = (next..last).take_while(|&index| in_hole(self.l1.entry(L1Index::new(index)))).count();
            end = end.saturating_add(geometry.l2_coverage().saturating_mul(alike as u64));
        }
        // The hole may end inside this page.
        let len = end.min(limit).saturating_sub(offset.value());
        Run { len: len.max(run.len), ..run }
    }

    fn l1_entry(&self, index: L1Index) -> Result<L1Entry> {
        let raw = self.l1.entry(index);
        L1Entry::decode(raw, &self.format.geometry).map_err(|e| self.header.marked(bad_l1_entry(index, e)))
    }

    /// The L2 entry that maps `offset`, or `None` if there is no L2 table.
    fn l2_place(&self, offset: GuestOffset) -> Result<Option<L2Place>> {
        match self.l1_entry(self.format.geometry.l1_index(offset))?.l2_table {
            Some(table) => self.place_in_table(table, offset).map(Some),
            None => Ok(None),
        }
    }

    /// Where in the table at `table` the entry is that maps `offset`: its page, the word in that, and the
    /// words of an entry.
    fn locate(&self, table: HostOffset, offset: GuestOffset) -> Result<(HostOffset, usize, usize)> {
        let entry_size = self.format.geometry.l2_entry_size();
        let byte = self.format.geometry.l2_index(offset).value() * entry_size;
        let at = table.checked_add(byte).ok_or_else(|| {
            Error::corrupt(format!("l2 table at {table} passes 2^64")).in_table(TableKind::L2).at_host(table)
        })?;
        let (start, word) = self.cache.locate(at);
        Ok((start, word, (entry_size / 8) as usize))
    }

    fn place_in_table(&self, table: HostOffset, offset: GuestOffset) -> Result<L2Place> {
        let (start, word, words_per_entry) = self.locate(table, offset)?;
        let page = match self.cache.cached(start) {
            Some(page) => page,
            None => {
                self.file.event(Event::L2Load);
                self.cache.load(self.file.storage(), start)?
            }
        };
        Ok(L2Place { page, word, words_per_entry })
    }

    /// The `index`-th entry counted from the one at `place`, which maps `offset`.
    pub(crate) fn entry(&self, place: &L2Place, index: u64, offset: GuestOffset) -> Result<L2Entry> {
        let (raw, bitmap) = place.raw(index);
        let geometry = &self.format.geometry;
        let start = geometry.align_down(offset.value()) + index * geometry.cluster_size();
        let decoded = self.format.decode(raw, bitmap);
        let entry = decoded
            .map_err(|e| self.entry_error(GuestOffset::new(start), raw, e, Some(GuestOffset::new(start))))?;
        // Also for zero clusters, which a lookup does not check: a write would go to their host cluster.
        match entry {
            L2Entry::Standard(ClusterEntry { host: Some(host), .. }) => {
                self.check_place(GuestOffset::new(start), host)?;
            }
            L2Entry::Standard(_) => {}
            L2Entry::Compressed(_) => self.check_compressed(GuestOffset::new(start))?,
        }
        Ok(entry)
    }

    /// Sets `count` entries from `place` on; `entry(i)` is the `i`-th new one. The caller has claimed their
    /// clusters and has written everything that the new entries point to. `unlinked`: the clusters that the
    /// old entries referred to.
    pub(crate) fn commit(
        &self,
        place: &L2Place,
        count: u64,
        unlinked: &[Unlinked],
        entry: impl Fn(u64) -> L2Entry,
    ) -> Result<()> {
        invariant::may_write(self.file.is_writable());
        assert!(count <= place.entries(), "{count} entries pass the end of their page");
        // Open for all of it, so that entries and unlinked clusters are in the same flush round. If the
        // clusters were in an earlier round, it would free them while the entries on disk still point to
        // them.
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

    /// Claims the clusters of `len` bytes at `offset` exclusively; see [`Claims::claim`].
    pub(crate) fn claim(&self, offset: GuestOffset, len: u64) -> Claim<'_> {
        self.claims.claim(touched_clusters(&self.format.geometry, offset, len))
    }

    /// Takes a shared claim on the clusters of `len` bytes at `offset`; see [`Claims::share`].
    pub(crate) fn share(&self, offset: GuestOffset, len: u64) -> Claim<'_> {
        self.claims.share(touched_clusters(&self.format.geometry, offset, len))
    }

    /// The same without waiting: `None` if another request has claimed one of them exclusively.
    pub(crate) fn try_share(&self, offset: GuestOffset, len: u64) -> Option<Claim<'_>> {
        self.claims.try_share(touched_clusters(&self.format.geometry, offset, len))
    }

    /// The cache of recently expanded compressed clusters.
    pub(crate) fn expanded(&self) -> &ExpandedClusters {
        &self.expanded
    }

    /// Host offset of the active L1 table, and a copy of its raw entries.
    pub(crate) fn l1_contents(&self) -> (HostOffset, Vec<u64>) {
        self.l1.contents()
    }

    /// Number of entries of the active L1 table.
    pub(crate) fn l1_len(&self) -> u64 {
        self.l1.len()
    }

    /// True if the L1 entry at `index` points to an L2 table.
    pub(crate) fn is_mapped(&self, index: u64) -> bool {
        self.l1.is_mapped(index)
    }

    /// Replaces the L1 table in memory by one at `offset` with these raw entries, which are on disk already.
    pub(crate) fn replace_l1(&self, offset: HostOffset, entries: Vec<u64>) {
        self.l1.replace(offset, &entries);
    }

    /// Changes an L1 entry in memory; the next flush writes it. `index` must be below
    /// [`l1_len`](Self::l1_len).
    pub(crate) fn set_l1_entry(&self, index: L1Index, entry: L1Entry) {
        debug_assert!(index.value() < self.l1.len(), "l1 entry {index} is not in the table");
        let _open = read(&self.gate);
        self.l1.set(index, entry.encode());
    }

    /// Closes the commit gate: no entry changes until the guard is dropped.
    pub(crate) fn close_gate(&self) -> RwLockWriteGuard<'_, ()> {
        write(&self.gate)
    }

    /// Takes copies of the changed sectors for writeback. The caller has closed the commit gate.
    pub(crate) fn take_changes(&self) -> MappingChanges {
        let (pages, l2) = self.cache.take_dirty();
        let mut l1 = Vec::new();
        self.l1.take_dirty(&mut l1);
        MappingChanges { l2, l1, pages }
    }

    /// Takes back changes that could not be written; `unlinked`: what was unlinked by them.
    pub(crate) fn put_back(&self, changes: &MappingChanges, unlinked: &[Unlinked]) {
        // As in a commit: entries and unlinked clusters belong to the same flush round.
        let _open = read(&self.gate);
        self.cache.put_back(&changes.pages, &changes.l2);
        self.l1.put_back(&changes.l1);
        self.refcounts.unlink_all(unlinked);
    }

    /// True if so many pages of L2 tables are queued that a flush is due.
    pub(crate) fn is_pressed(&self) -> bool {
        self.cache.is_pressed()
    }

    /// Drops the cached L2 table at `table`, changes included: the one on disk has changed.
    pub(crate) fn forget_table(&self, table: HostOffset) {
        self.cache.forget(table, self.format.geometry.cluster_size());
    }

    /// Drops all cached L2 tables: those on disk have changed.
    pub(crate) fn forget_tables(&self) {
        self.cache.clear();
    }
}
