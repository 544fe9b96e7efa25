//! Refcounts in memory: the refcount table, the cached blocks, and all changes of refcounts.
//!
//! Invariant I1: a refcount goes up in memory before anything refers to the cluster, and down only when no
//! entry on disk refers to it any more.

mod allocate;
mod free;
mod grow;
mod pack;
mod rebuild;
mod trim;
mod width;
mod write_back;

use super::cache::PageCache;
use super::file::{ImageFile, read_words};
use super::header::HeaderStore;
use super::overlap::OverlapChecks;
use super::page::{Page, SECTOR_SIZE};
use super::pending::PendingFrees;
use super::run::ClusterRun;
use super::tables::Tables;
use crate::damage::bad_refcount_table_entry;
use crate::error::{Error, ErrorKind, Result, TableKind};
use crate::invariant;
use crate::port::event::Event;
use crate::port::storage::Storage;
use crate::sync::{Mutex, MutexGuard, Rank, lock};
use ::alloc::collections::BTreeSet;
use ::alloc::format;
use ::alloc::sync::Arc;
use ::alloc::vec::Vec;
use core::ops::Range;
use qcow2_format::refcount::decode_table_entry;
use qcow2_format::{Geometry, Header, HostCluster, HostOffset};

/// The refcounts of an open image, and the clusters that wait to be freed. Empty if the image is open for
/// reading.
pub(crate) struct RefcountStore {
    file: Arc<ImageFile>,
    header: Arc<HeaderStore>,
    tables: Arc<Tables>,
    cache: PageCache,
    state: Mutex<Refcounts>,
    // Separate from `state`, so that allocation does not wait while blocks are written. Only one thread
    // writes blocks at a time: of two, the one with the older copy of a block could write last.
    io: Mutex<()>,
    pending: Mutex<PendingFrees>,
    /// True if freed host clusters are discarded in the storage.
    discard_freed: bool,
}

/// The refcount table and the start of the search for free clusters.
#[derive(Default)]
pub(crate) struct Refcounts {
    /// The raw entries up to the last one that is not zero, or a few more: a table has room for far more
    /// blocks than a small image has, and a host may have thousands of them open. Whole sectors, but for the
    /// end of the table.
    table: Vec<u64>,
    table_offset: HostOffset,
    table_clusters: u64,
    /// Sectors of the table that differ from the disk.
    dirty_sectors: BTreeSet<u64>,
    /// No cluster below this one is free.
    first_free: u64,
    /// Free bytes behind the last compressed stream, in its host cluster: the next stream goes there. Not
    /// empty.
    pack: Option<Range<u64>>,
}

impl Refcounts {
    /// Reads the refcount table. The header's parser has checked its length against the limit.
    pub(crate) fn load(storage: &dyn Storage, header: &Header, geometry: &Geometry) -> Result<Self> {
        let table_clusters = u64::from(header.refcount_table_clusters);
        let table_offset = header.refcount_table_offset;
        let mut table = read_words(storage, table_offset, table_clusters * geometry.cluster_size() / 8)?;
        let used = table.iter().rposition(|&raw| raw != 0).map_or(0, |last| last + 1);
        table.truncate(used.next_multiple_of(ENTRIES_PER_SECTOR));
        table.shrink_to_fit();
        Ok(Self { table, table_offset, table_clusters, ..Self::default() })
    }

    /// The refcounts of an image that was just created, whose table has the entries `table`, and zeroes
    /// behind them.
    pub(crate) fn created(header: &Header, mut table: Vec<u64>, geometry: &Geometry) -> Self {
        let table_clusters = u64::from(header.refcount_table_clusters);
        let entries = (geometry.bytes_of(table_clusters) / 8) as usize;
        table.resize(table.len().next_multiple_of(ENTRIES_PER_SECTOR).min(entries), 0);
        Self { table, table_offset: header.refcount_table_offset, table_clusters, ..Self::default() }
    }

    /// The raw entries of the table, without zeroes at its end.
    pub(crate) fn table(&self) -> &[u64] {
        &self.table
    }

    /// How many entries the table has.
    fn entries(&self, geometry: &Geometry) -> u64 {
        geometry.bytes_of(self.table_clusters) / 8
    }

    /// The raw entry at `index`; 0 past the end.
    fn entry(&self, index: u64) -> u64 {
        self.table.get(index as usize).copied().unwrap_or(0)
    }

    /// Changes the entry at `index`, which must be below [`entries`](Self::entries), in memory.
    fn set_entry(&mut self, index: u64, raw: u64, geometry: &Geometry) {
        let (at, entries) = (index as usize, self.entries(geometry) as usize);
        assert!(at < entries, "refcount table entry {index} of {entries}");
        if at >= self.table.len() {
            self.table.resize((at + 1).next_multiple_of(ENTRIES_PER_SECTOR).min(entries), 0);
        }
        self.table[at] = raw;
    }

    /// The clusters of the table.
    fn table_run(&self, geometry: &Geometry) -> ClusterRun {
        ClusterRun::new(geometry.host_cluster(self.table_offset).value(), self.table_clusters)
    }

    /// Lets no further compressed stream share host cluster `cluster`.
    fn leave_pack(&mut self, cluster: u64, geometry: &Geometry) {
        let packed = |pack: &Range<u64>| geometry.host_cluster(HostOffset::new(pack.start)).value();
        if self.pack.as_ref().is_some_and(|pack| packed(pack) == cluster) {
            self.pack = None;
        }
    }
}

/// Refcount table entries in a sector, the unit in which the table is written.
const ENTRIES_PER_SECTOR: usize = (SECTOR_SIZE / 8) as usize;

/// The cached page that holds a cluster's refcount.
struct Slot {
    page: Arc<Page>,
    /// The clusters from `base` up to `end` (excluded) have their refcounts in `page`, from slot 0 on.
    base: u64,
    end: u64,
}

/// All refcounts locked, for a change of many of them directly on disk: nothing else reads or writes them
/// meanwhile, in memory or on disk.
pub(crate) struct HeldRefcounts<'a> {
    state: MutexGuard<'a, Refcounts>,
    _writing: MutexGuard<'a, ()>,
}

impl HeldRefcounts<'_> {
    /// The raw entries of the refcount table, without zeroes at its end.
    pub(crate) fn table(&self) -> &[u64] {
        &self.state.table
    }

    /// How many entries the refcount table has.
    pub(crate) fn entries(&self, geometry: &Geometry) -> u64 {
        self.state.entries(geometry)
    }

    /// Records that refcounts on disk have gone down. `lowest`: the first cluster that is free now, if any.
    pub(crate) fn lowered(&mut self, lowest: Option<u64>) {
        debug_assert!(lowest != Some(0), "the header's cluster is free");
        // The cluster of the last compressed stream may have been freed.
        self.state.pack = None;
        if let Some(lowest) = lowest {
            self.state.first_free = self.state.first_free.min(lowest);
        }
    }
}

impl RefcountStore {
    /// `refcounts`: loaded from disk. `cache`: for refcount blocks.
    pub(crate) fn new(
        tables: Arc<Tables>,
        refcounts: Refcounts,
        cache: PageCache,
        discard_freed: bool,
    ) -> Self {
        Self {
            file: Arc::clone(tables.file()),
            header: Arc::clone(tables.header()),
            tables,
            cache,
            state: Mutex::new(Rank::Refcounts, refcounts),
            io: Mutex::new(Rank::RefcountIo, ()),
            pending: Mutex::new(Rank::Pending, PendingFrees::default()),
            discard_freed,
        }
    }

    /// The part below: all writes of tables go through it.
    pub(crate) fn tables(&self) -> &Arc<Tables> {
        &self.tables
    }

    fn geometry(&self) -> &Geometry {
        self.file.geometry()
    }

    /// Locks all refcounts for a change of many of them on disk. The caller holds the flush lock.
    pub(crate) fn hold(&self) -> HeldRefcounts<'_> {
        let state = lock(&self.state);
        HeldRefcounts { state, _writing: lock(&self.io) }
    }

    /// Calls `see` with the raw entries of the refcount table, without zeroes at its end; it is locked
    /// meanwhile.
    pub(crate) fn with_table<T>(&self, see: impl FnOnce(&[u64]) -> T) -> T {
        see(&lock(&self.state).table)
    }

    /// A copy of all of the refcount table's raw entries, and its clusters.
    pub(crate) fn copy_table(&self) -> (Vec<u64>, ClusterRun) {
        let refcounts = lock(&self.state);
        let mut table = refcounts.table.clone();
        table.resize(refcounts.entries(self.geometry()) as usize, 0);
        (table, refcounts.table_run(self.geometry()))
    }

    /// The refcount of `cluster`; 0 if it has no refcount block. Disk: may read a refcount block.
    pub(crate) fn count(&self, cluster: u64) -> Result<u64> {
        self.count_in(&lock(&self.state), cluster)
    }

    /// True if each cluster of `run` has the refcount `count`. Disk: may read refcount blocks.
    pub(crate) fn all_have(&self, run: ClusterRun, count: u64) -> Result<bool> {
        let refcounts = lock(&self.state);
        for cluster in run.clusters() {
            if self.count_in(&refcounts, cluster)? != count {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn count_in(&self, refcounts: &Refcounts, cluster: u64) -> Result<u64> {
        let width = self.geometry().refcount_width();
        Ok(self.slot(refcounts, cluster)?.map_or(0, |slot| {
            let number = cluster - slot.base;
            width.extract(slot.page.word(width.word_index(number)), number)
        }))
    }

    /// The page with the refcount of `cluster`, or `None` if it has no refcount block.
    fn slot(&self, refcounts: &Refcounts, cluster: u64) -> Result<Option<Slot>> {
        let (geometry, host) = (self.geometry(), HostCluster::new(cluster));
        let index = geometry.refcount_table_index(host);
        let raw = refcounts.entry(index);
        let block = decode_table_entry(raw, geometry).map_err(|e| {
            // Marked: whoever goes on would count into a place that is no refcount block.
            self.header.marked(bad_refcount_table_entry(index, e))
        })?;
        let Some(block) = block else { return Ok(None) };
        let number = geometry.refcount_block_slot(host);
        let width = geometry.refcount_width();
        let word = width.word_index(number) as u64;
        let at = block.checked_add(word * 8).ok_or_else(|| {
            Error::corrupt(format!("refcount block at {block} passes 2^64"))
                .in_table(TableKind::RefcountBlock)
                .at_host(block)
        })?;
        let (start, _) = self.cache.locate(at);
        let page = match self.cache.cached(start) {
            Some(page) => page,
            None => {
                self.file.event(Event::RefblockLoad);
                self.cache.load(self.file.storage(), start)?
            }
        };
        let per_page = self.cache.page_size() * 8 / u64::from(width.bits());
        let base = cluster - number % per_page;
        Ok(Some(Slot { page, base, end: base + per_page }))
    }

    fn set_count(&self, refcounts: &Refcounts, cluster: u64, count: u64) -> Result<()> {
        let slot = self.slot(refcounts, cluster)?.ok_or_else(|| {
            Error::corrupt(format!("host cluster {cluster} has no refcount block"))
                .in_table(TableKind::RefcountTable)
        })?;
        if !slot.page.is_queued() {
            self.check_block_place(&slot)?;
        }
        let (width, number) = (self.geometry().refcount_width(), cluster - slot.base);
        invariant::count_fits(width, count);
        debug_assert!(cluster >= slot.base && cluster < slot.end);
        let index = width.word_index(number);
        slot.page.set_word(index, width.insert(slot.page.word(index), number, count));
        self.cache.note_dirty(&slot.page);
        Ok(())
    }

    /// Refuses to write to a refcount block that is other metadata: its refcount table entry is damaged.
    fn check_block_place(&self, slot: &Slot) -> Result<()> {
        let (at, len) = (slot.page.offset(), self.cache.page_size());
        self.tables.check_place(OverlapChecks::REFCOUNT_BLOCK, at, len)
    }

    /// Adds one reference to each cluster of `run`. Errors: `NoSpace` if a refcount is at its maximum; the
    /// clusters before it stay raised.
    fn raise(&self, refcounts: &Refcounts, run: ClusterRun) -> Result<()> {
        for cluster in run.clusters() {
            let old = self.count_in(refcounts, cluster)?;
            if old >= self.geometry().refcount_width().max() {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    format!("host cluster {cluster}: refcount {old} is at its maximum"),
                ));
            }
            self.set_count(refcounts, cluster, old + 1)?;
        }
        Ok(())
    }

    /// Replaces the refcount table in memory by `table` in the clusters of `place`. Its blocks are on disk;
    /// cached pages at their offsets are stale and dropped.
    pub(crate) fn adopt_table(&self, table: Vec<u64>, place: ClusterRun) {
        let entries = place.len(self.geometry()) / 8;
        assert_eq!(table.len() as u64, entries, "a refcount table that does not fill its clusters");
        let mut refcounts = lock(&self.state);
        for &raw in &table {
            if let Ok(Some(block)) = decode_table_entry(raw, self.geometry()) {
                self.cache.forget(block, self.geometry().cluster_size());
            }
        }
        let (table_offset, table_clusters) = (place.offset(self.geometry()), place.count());
        *refcounts = Refcounts { table, table_offset, table_clusters, ..Refcounts::default() };
    }

    /// Drops all cached refcount blocks: those on disk have changed.
    pub(crate) fn forget_cached(&self) {
        self.cache.clear();
    }
}
