//! Refcounts in memory: the table, the cached blocks, and the one way in which a count changes.
//!
//! Invariant I1: a refcount goes up in memory before anything refers to the cluster, and down only after
//! nothing on disk does.

mod allocate;
mod free;
mod grow;
mod pack;
mod rebuild;
mod width;
mod write_back;

use super::cache::PageCache;
use super::file::{ImageFile, read_words};
use super::header::HeaderStore;
use super::overlap::OverlapChecks;
use super::page::Page;
use super::pending::PendingFrees;
use super::run::ClusterRun;
use super::tables::Tables;
use crate::error::{Error, ErrorKind, Result};
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

/// The refcounts of an open image, and the clusters that wait to be freed. An image that is open for reading
/// has an empty one.
pub(crate) struct RefcountStore {
    file: Arc<ImageFile>,
    header: Arc<HeaderStore>,
    tables: Arc<Tables>,
    cache: PageCache,
    state: Mutex<Refcounts>,
    // Apart from `state`: blocks are written without keeping allocation waiting, but never by two at once,
    // since the older copy of a block could then reach the disk last.
    io: Mutex<()>,
    pending: Mutex<PendingFrees>,
    /// Whether freed host clusters are given back to the storage.
    discard_freed: bool,
}

/// The refcount table and where to look for free clusters.
#[derive(Default)]
pub(crate) struct Refcounts {
    table: Vec<u64>,
    table_offset: HostOffset,
    table_clusters: u64,
    /// Sectors of the table that differ from the disk.
    dirty_sectors: BTreeSet<u64>,
    /// No cluster below this one is free.
    first_free: u64,
    /// Where the next compressed stream goes: host bytes of a cluster that others share, not empty.
    pack: Option<Range<u64>>,
}

impl Refcounts {
    /// Reads the table that `header` names, which was checked against its limit.
    pub(crate) fn load(storage: &dyn Storage, header: &Header, geometry: &Geometry) -> Result<Self> {
        let table_clusters = u64::from(header.refcount_table_clusters);
        let table_offset = header.refcount_table_offset;
        let table = read_words(storage, table_offset, table_clusters * geometry.cluster_size() / 8)?;
        Ok(Self { table, table_offset, table_clusters, ..Self::default() })
    }

    /// The raw entries of the table.
    pub(crate) fn table(&self) -> &[u64] {
        &self.table
    }

    /// The clusters of the table.
    fn table_run(&self, geometry: &Geometry) -> ClusterRun {
        ClusterRun::new(geometry.host_cluster(self.table_offset).value(), self.table_clusters)
    }

    /// Puts no further compressed stream into host cluster `cluster`.
    fn leave_pack(&mut self, cluster: u64, geometry: &Geometry) {
        let packed = |pack: &Range<u64>| geometry.host_cluster(HostOffset::new(pack.start)).value();
        if self.pack.as_ref().is_some_and(|pack| packed(pack) == cluster) {
            self.pack = None;
        }
    }
}

/// The cached page that counts a cluster.
struct Slot {
    page: Arc<Page>,
    /// Clusters from `base` to `end` have their counts in `page`; slot numbers within it start at 0.
    base: u64,
    end: u64,
}

/// The refcounts while somebody changes many of them at once on disk: nobody else touches them meanwhile, in
/// memory or on disk.
pub(crate) struct HeldRefcounts<'a> {
    state: MutexGuard<'a, Refcounts>,
    _writing: MutexGuard<'a, ()>,
}

impl HeldRefcounts<'_> {
    /// The raw entries of the refcount table.
    pub(crate) fn table(&self) -> &[u64] {
        &self.state.table
    }

    /// Records that counts on disk have gone down; `lowest` is the first cluster that is free now, if one is.
    pub(crate) fn lowered(&mut self, lowest: Option<u64>) {
        debug_assert!(lowest != Some(0), "the header's cluster is free");
        // The cluster that streams were packed into may be one of those that are free now.
        self.state.pack = None;
        if let Some(lowest) = lowest {
            self.state.first_free = self.state.first_free.min(lowest);
        }
    }
}

impl RefcountStore {
    /// `refcounts`: as on disk. `cache`: for refcount blocks.
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

    /// The tables that the refcounts stand on.
    pub(crate) fn tables(&self) -> &Arc<Tables> {
        &self.tables
    }

    fn geometry(&self) -> &Geometry {
        self.file.geometry()
    }

    /// Holds all refcounts for a change of many of them on disk. The caller holds back flushes.
    pub(crate) fn hold(&self) -> HeldRefcounts<'_> {
        let state = lock(&self.state);
        HeldRefcounts { state, _writing: lock(&self.io) }
    }

    /// Calls `see` with the raw entries of the refcount table, which does not change meanwhile.
    pub(crate) fn with_table<T>(&self, see: impl FnOnce(&[u64]) -> T) -> T {
        see(&lock(&self.state).table)
    }

    /// A copy of the refcount table's raw entries, and its clusters.
    pub(crate) fn copy_table(&self) -> (Vec<u64>, ClusterRun) {
        let refcounts = lock(&self.state);
        (refcounts.table.clone(), refcounts.table_run(self.geometry()))
    }

    /// The refcount of `cluster`; 0 where no block counts it. Disk: may read a refcount block.
    pub(crate) fn count(&self, cluster: u64) -> Result<u64> {
        self.count_in(&lock(&self.state), cluster)
    }

    /// Whether each cluster of `run` has the refcount `count`. Disk: may read refcount blocks.
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

    /// The page that counts `cluster`, or `None` where there is no refcount block.
    fn slot(&self, refcounts: &Refcounts, cluster: u64) -> Result<Option<Slot>> {
        let (geometry, host) = (self.geometry(), HostCluster::new(cluster));
        let index = geometry.refcount_table_index(host);
        let raw = refcounts.table.get(index as usize).copied().unwrap_or(0);
        let block = decode_table_entry(raw, geometry).map_err(|e| {
            // Marked: whoever goes on would count into a place that is no refcount block.
            self.header.mark_corrupt(format!("refcount table entry {index} is damaged")).with_source(e)
        })?;
        let Some(block) = block else { return Ok(None) };
        let number = geometry.refcount_block_slot(host);
        let width = geometry.refcount_width();
        let word = width.word_index(number) as u64;
        let at = block
            .checked_add(word * 8)
            .ok_or_else(|| Error::corrupt(format!("refcount block at {block} passes 2^64")))?;
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
        let slot = self
            .slot(refcounts, cluster)?
            .ok_or_else(|| Error::corrupt(format!("host cluster {cluster} has no refcount block")))?;
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

    /// A table entry that points at something else must not get it counted over.
    fn check_block_place(&self, slot: &Slot) -> Result<()> {
        let (at, len) = (slot.page.offset(), self.cache.page_size());
        self.tables.check_place(OverlapChecks::REFCOUNT_BLOCK, at, len)
    }

    /// Adds one reference to each cluster of `run`. Errors: `NoSpace` where the refcount is at its largest
    /// value; clusters before it keep the raise.
    fn raise(&self, refcounts: &Refcounts, run: ClusterRun) -> Result<()> {
        for cluster in run.clusters() {
            let old = self.count_in(refcounts, cluster)?;
            if old >= self.geometry().refcount_width().max() {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    format!("host cluster {cluster}: refcount {old} is the largest that fits"),
                ));
            }
            self.set_count(refcounts, cluster, old + 1)?;
        }
        Ok(())
    }

    /// Goes on with another refcount table at `place`, whose blocks are all on disk and not yet in the cache.
    pub(crate) fn adopt_table(&self, table: Vec<u64>, place: ClusterRun) {
        let entries = place.len(self.geometry()) / 8;
        assert_eq!(table.len() as u64, entries, "a refcount table of another length than its clusters");
        let mut refcounts = lock(&self.state);
        for &raw in &table {
            if let Ok(Some(block)) = decode_table_entry(raw, self.geometry()) {
                self.cache.forget(block, self.geometry().cluster_size());
            }
        }
        let (table_offset, table_clusters) = (place.offset(self.geometry()), place.count());
        *refcounts = Refcounts { table, table_offset, table_clusters, ..Refcounts::default() };
    }

    /// Drops all cached refcount blocks: the disk has others now.
    pub(crate) fn forget_cached(&self) {
        self.cache.clear();
    }
}
