//! Finding, reserving and freeing host clusters.
//!
//! Invariant I1: a refcount goes up in memory before anything refers to the cluster, and down only after
//! nothing on disk does. A cluster counts as free only if its refcount is zero and no metadata is known to
//! live there.

use super::Meta;
use super::guard::Hit;
use super::overlap::OverlapChecks;
use super::page::{Page, SECTOR_SIZE};
use super::pending::Unlinked;
use super::run::ClusterRun;
use crate::error::{Error, ErrorKind, Result};
use crate::invariant;
use crate::port::event::Event;
use crate::port::storage::{StorageErrorKind, ZeroMode};
use crate::sync::lock;
use ::alloc::collections::BTreeSet;
use ::alloc::format;
use ::alloc::sync::Arc;
use ::alloc::vec;
use ::alloc::vec::Vec;
use qcow2_format::refcount::{decode_table_entry, encode_table_entry};
use qcow2_format::{Geometry, HostCluster, HostOffset};

/// The largest host offset that a table entry can hold. Spec: "Cluster mapping".
const MAX_HOST_END: u64 = 1 << 56;

/// The most zeroes that are written at once.
const MAX_PIECE: u64 = 64 << 10;

/// The refcount table and where to look for free clusters.
pub(crate) struct Refcounts {
    pub(crate) table: Vec<u64>,
    pub(crate) table_offset: HostOffset,
    pub(crate) table_clusters: u64,
    /// Sectors of the table that differ from the disk.
    pub(crate) dirty_sectors: BTreeSet<u64>,
    /// No cluster below this one is free.
    pub(crate) first_free: u64,
    /// Where the next compressed stream goes: host bytes `start..end` of a cluster that others share.
    pub(crate) pack: Option<(u64, u64)>,
}

impl Refcounts {
    /// The clusters of the table.
    pub(crate) fn table_run(&self, geometry: &Geometry) -> ClusterRun {
        ClusterRun::new(geometry.host_cluster(self.table_offset).value(), self.table_clusters)
    }

    /// Puts no further compressed stream into host cluster `cluster`.
    fn leave_pack(&mut self, cluster: u64, geometry: &Geometry) {
        if self
            .pack
            .is_some_and(|(start, _)| geometry.host_cluster(HostOffset::new(start)).value() == cluster)
        {
            self.pack = None;
        }
    }
}

/// Host clusters that were just reserved: their refcount is one and nothing refers to them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reserved {
    pub(crate) offset: HostOffset,
    pub(crate) run: ClusterRun,
    /// The clusters lie past the end of the file: they read as zeroes once the file is longer.
    pub(crate) fresh: bool,
}

/// What a search for free clusters has found.
struct Found {
    run: ClusterRun,
    /// The first free cluster of all.
    lowest: u64,
}

struct Slot {
    page: Arc<Page>,
    /// Clusters from `base` to `end` have their counts in `page`; slot numbers within it start at 0.
    base: u64,
    end: u64,
}

impl Meta {
    /// Reserves up to `want` clusters that follow each other; fewer where the free run is shorter.
    pub(crate) fn allocate(&self, want: u64) -> Result<Reserved> {
        self.reserve(want, false)
    }

    /// Reserves exactly `count` clusters in a row for metadata of `kind`.
    pub(crate) fn allocate_metadata(&self, kind: OverlapChecks, count: u64) -> Result<Reserved> {
        let reserved = self.reserve(count, true)?;
        self.guard.note(kind, reserved.run);
        Ok(reserved)
    }

    /// [`allocate_metadata`](Self::allocate_metadata) with space on the disk, for tables that are written
    /// when much has changed already. Errors: also `NoSpace`, nothing having changed.
    pub(crate) fn allocate_with_space(&self, kind: OverlapChecks, count: u64) -> Result<Reserved> {
        let reserved = self.allocate_metadata(kind, count)?;
        if let Err(error) = self.reserve_space(reserved.offset, reserved.run.len(&self.geometry)) {
            self.release(Unlinked { clusters: reserved.run, kinds: kind })?;
            return Err(error);
        }
        Ok(reserved)
    }

    /// Has the storage take space for tables of `len` bytes, where it can.
    pub(crate) fn reserve_space(&self, tables: HostOffset, len: u64) -> Result<()> {
        match self.storage.allocate(tables, len) {
            Err(error) if error.kind() != StorageErrorKind::Unsupported => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn reserve(&self, want: u64, exact: bool) -> Result<Reserved> {
        self.event(Event::ClusterAlloc);
        let mut refcounts = lock(&self.refcounts);
        let Found { run, lowest } = self.find_free(&mut refcounts, want.max(1), exact)?;
        if run.end() > self.geometry.clusters_below(MAX_HOST_END) {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "image file has reached its largest size of 2^56 bytes",
            ));
        }
        self.check_unused(run)?;
        invariant::handed_out(run);
        let offset = run.offset(&self.geometry);
        let fresh = self.storage.len()? <= offset.value();
        for cluster in run.clusters() {
            self.set_refcount(&refcounts, cluster, 1)?;
        }
        refcounts.first_free = if run.first() == lowest { run.end() } else { lowest };
        Ok(Reserved { offset, run, fresh })
    }

    /// Refuses to hand out clusters that hold metadata although nobody counts them.
    fn check_unused(&self, run: ClusterRun) -> Result<()> {
        match self.guard.hit_by(OverlapChecks::NONE, run) {
            None => Ok(()),
            Some(Hit { cluster, kinds }) => Err(self.mark_corrupt(format!(
                "host cluster {cluster} holds {} but its refcount is 0",
                kinds.text()
            ))),
        }
    }

    /// Reserves `cluster` if it is free and its refcount block exists.
    pub(crate) fn reserve_at(&self, cluster: u64) -> Result<bool> {
        let mut refcounts = lock(&self.refcounts);
        let counted = self.slot(&refcounts, cluster)?.is_some();
        if !counted
            || self.refcount_of(&refcounts, cluster)? != 0
            || self.guard.kinds_at(cluster) != OverlapChecks::NONE
        {
            return Ok(false);
        }
        invariant::handed_out(ClusterRun::one(cluster));
        self.set_refcount(&refcounts, cluster, 1)?;
        if refcounts.first_free == cluster {
            refcounts.first_free += 1;
        }
        Ok(true)
    }

    /// The first free run: exactly `want` clusters, or (not `exact`) the first free cluster and up to
    /// `want - 1` after it.
    fn find_free(&self, refcounts: &mut Refcounts, want: u64, exact: bool) -> Result<Found> {
        let width = self.geometry.refcount_width();
        let mut at = refcounts.first_free;
        let (mut first, mut count, mut lowest) = (at, 0, u64::MAX);
        loop {
            let Some(slot) = self.slot(refcounts, at)? else {
                if count > 0 && !exact {
                    break;
                }
                let blocks = if exact { self.blocks_ahead(refcounts, at, want) } else { 1 };
                let index = self.geometry.refcount_table_index(HostCluster::new(at));
                if index + blocks > refcounts.table.len() as u64 {
                    self.grow_refcount_table(refcounts, index + blocks - 1)?;
                    continue;
                }
                for block in 0..blocks {
                    self.add_block(refcounts, index + block, at + block)?;
                }
                at += blocks;
                (first, count) = (at, 0);
                continue;
            };
            while at < slot.end && count < want {
                let number = at - slot.base;
                if width.extract(slot.page.word(width.word_index(number)), number) == 0 {
                    if count == 0 {
                        first = at;
                    }
                    lowest = lowest.min(at);
                    count += 1;
                } else if count > 0 && !exact {
                    break;
                } else {
                    count = 0;
                }
                at += 1;
            }
            if count == want || (count > 0 && !exact && at < slot.end) {
                break;
            }
        }
        Ok(Found { run: ClusterRun::new(first, count), lowest })
    }

    /// The page that counts `cluster`, or `None` where there is no refcount block.
    fn slot(&self, refcounts: &Refcounts, cluster: u64) -> Result<Option<Slot>> {
        let host = HostCluster::new(cluster);
        let index = self.geometry.refcount_table_index(host);
        let raw = refcounts.table.get(index as usize).copied().unwrap_or(0);
        let block = decode_table_entry(raw, &self.geometry)
            .map_err(|e| Error::corrupt(format!("refcount table entry {index} is damaged")).with_source(e))?;
        let Some(block) = block else { return Ok(None) };
        let number = self.geometry.refcount_block_slot(host);
        let width = self.geometry.refcount_width();
        let word = width.word_index(number) as u64;
        let at = block
            .checked_add(word * 8)
            .ok_or_else(|| Error::corrupt(format!("refcount block at {block} passes 2^64")))?;
        let (start, _) = self.refcount_cache.locate(at);
        if self.events.is_some() && self.refcount_cache.cached(start).is_none() {
            self.event(Event::RefblockLoad);
        }
        let page = self.refcount_cache.load(&*self.storage, start)?;
        let per_page = self.refcount_cache.page_size() * 8 / u64::from(width.bits());
        let base = cluster - number % per_page;
        Ok(Some(Slot { page, base, end: base + per_page }))
    }

    pub(crate) fn set_refcount(&self, refcounts: &Refcounts, cluster: u64, count: u64) -> Result<()> {
        let slot = self
            .slot(refcounts, cluster)?
            .ok_or_else(|| Error::corrupt(format!("host cluster {cluster} has no refcount block")))?;
        if !slot.page.is_queued() {
            self.check_block_place(&slot)?;
        }
        let (width, number) = (self.geometry.refcount_width(), cluster - slot.base);
        invariant::count_fits(width, count);
        debug_assert!(cluster >= slot.base && cluster < slot.end);
        let index = width.word_index(number);
        slot.page.set_word(index, width.insert(slot.page.word(index), number, count));
        self.refcount_cache.note_dirty(&slot.page);
        Ok(())
    }

    /// Refuses a refcount block that would be written over other metadata.
    pub(crate) fn check_counting(&self, refcounts: &Refcounts, cluster: u64) -> Result<()> {
        match self.slot(refcounts, cluster)? {
            Some(slot) => self.check_block_place(&slot),
            None => Ok(()),
        }
    }

    /// A table entry that points at something else must not get it counted over.
    fn check_block_place(&self, slot: &Slot) -> Result<()> {
        let (at, len) = (slot.page.offset(), self.refcount_cache.page_size());
        self.check_table_place(OverlapChecks::REFCOUNT_BLOCK, at, len)
    }

    pub(crate) fn refcount_of(&self, refcounts: &Refcounts, cluster: u64) -> Result<u64> {
        let width = self.geometry.refcount_width();
        Ok(self.slot(refcounts, cluster)?.map_or(0, |slot| {
            let number = cluster - slot.base;
            width.extract(slot.page.word(width.word_index(number)), number)
        }))
    }

    /// How many refcount blocks to put one after the other from `at` on, which has none. More than one for a
    /// run of `want` clusters that is as long as what a block counts: it would find no place between blocks
    /// that each take the first cluster they count.
    fn blocks_ahead(&self, refcounts: &Refcounts, at: u64, want: u64) -> u64 {
        let per_block = self.geometry.refcount_block_entries();
        if want < per_block {
            return 1;
        }
        // As many as count the run and themselves.
        let blocks = (want + at % per_block).div_ceil(per_block - 1);
        let later = refcounts.table.iter().skip((at / per_block + 1) as usize);
        if later.take(blocks as usize - 1).all(|&entry| entry == 0) { blocks } else { 1 }
    }

    /// Puts the refcount block of table entry `index` at `cluster`, which it or a block before it counts.
    fn add_block(&self, refcounts: &mut Refcounts, index: u64, cluster: u64) -> Result<()> {
        self.check_unused(ClusterRun::one(cluster))?;
        let sector = index * 8 / SECTOR_SIZE;
        let entries = HostOffset::new(refcounts.table_offset.value() + sector * SECTOR_SIZE);
        self.check_table_place(OverlapChecks::REFCOUNT_TABLE, entries, SECTOR_SIZE)?;
        let size = self.geometry.cluster_size();
        let offset = HostOffset::new(self.geometry.bytes_of(cluster));
        self.refcount_cache.forget(offset, size);
        if self.storage.len()? > offset.value() {
            self.storage.write_zeroes(offset, size, ZeroMode::KeepAllocated)?;
        } else {
            self.write_empty_table(OverlapChecks::REFCOUNT_BLOCK, offset)?;
        }
        self.event(Event::RefblockAlloc);
        debug_assert_eq!(refcounts.table[index as usize], 0, "a refcount block is replaced");
        refcounts.table[index as usize] = encode_table_entry(Some(offset));
        if let Err(error) = self.set_refcount(refcounts, cluster, 1) {
            // A block that does not count itself must not stay.
            refcounts.table[index as usize] = encode_table_entry(None);
            return Err(error);
        }
        refcounts.dirty_sectors.insert(sector);
        self.guard.note(OverlapChecks::REFCOUNT_BLOCK, ClusterRun::one(cluster));
        Ok(())
    }

    /// Writes the zeroes of a new table of one cluster at the end of the file, though it reads as zeroes
    /// without: it then has space on the disk before anything depends on it. A full disk is told to who needs
    /// the table, who can go on when there is room, and not found out by a flush, after which the image could
    /// not go on. Written, not reserved, so that the file system puts it between the data around it.
    pub(crate) fn write_empty_table(&self, kind: OverlapChecks, table: HostOffset) -> Result<()> {
        let size = self.geometry.cluster_size();
        let zeroes = vec![0; size.min(MAX_PIECE) as usize];
        for at in (0..size).step_by(zeroes.len()) {
            self.write_table(kind, HostOffset::new(table.value() + at), &zeroes)?;
        }
        Ok(())
    }

    /// Goes on with another refcount table, whose blocks are all on disk and not yet in the cache.
    pub(crate) fn adopt_table(&self, table: Vec<u64>, place: ClusterRun) {
        let mut refcounts = lock(&self.refcounts);
        for &raw in &table {
            if let Ok(Some(block)) = decode_table_entry(raw, &self.geometry) {
                self.refcount_cache.forget(block, self.geometry.cluster_size());
            }
        }
        let (table_offset, table_clusters) = (place.offset(&self.geometry), place.count());
        let dirty_sectors = BTreeSet::new();
        *refcounts =
            Refcounts { table, table_offset, table_clusters, dirty_sectors, first_free: 0, pack: None };
    }

    /// Adds one reference to each cluster of `run`. Errors: `NoSpace` where the refcount
    /// is at its largest value; clusters before it keep the raise.
    pub(crate) fn raise(&self, refcounts: &Refcounts, run: ClusterRun) -> Result<()> {
        for cluster in run.clusters() {
            let old = self.refcount_of(refcounts, cluster)?;
            if old >= self.geometry.refcount_width().max() {
                return Err(Error::new(
                    ErrorKind::NoSpace,
                    format!("host cluster {cluster}: refcount {old} is the largest that fits"),
                ));
            }
            self.set_refcount(refcounts, cluster, old + 1)?;
        }
        Ok(())
    }

    /// Drops the references of `run`. Nothing on disk may hold them any more.
    pub(crate) fn release(&self, run: Unlinked) -> Result<()> {
        self.lower_in(&mut lock(&self.refcounts), run)
    }

    /// [`release`](Self::release) for a caller that holds the refcounts. On a damaged image a reference may
    /// have led to other metadata, which stays counted once whoever pointed at it, or to a cluster that
    /// nobody counts, which is free already.
    pub(crate) fn lower_in(&self, refcounts: &mut Refcounts, run: Unlinked) -> Result<()> {
        let guarded = self.is_guarded(run);
        for cluster in run.clusters.clusters() {
            let old = self.refcount_of(refcounts, cluster)?;
            let guarded = guarded && self.is_guarded(Unlinked { clusters: ClusterRun::one(cluster), ..run });
            if guarded || old == 1 {
                self.guard.forget(run.kinds, cluster);
            }
            if old == 0 || guarded && old == 1 {
                continue;
            }
            if old == 1 {
                refcounts.first_free = refcounts.first_free.min(cluster);
                refcounts.leave_pack(cluster, &self.geometry);
            }
            self.set_refcount(refcounts, cluster, old - 1)?;
        }
        Ok(())
    }

    /// Whether one of the clusters of `run` holds other metadata than what was referred to.
    pub(crate) fn is_guarded(&self, run: Unlinked) -> bool {
        self.guard.hit_by(run.kinds, run.clusters).is_some()
    }

    /// Frees what nobody can see any more, giving the space back to the storage first where that is wanted.
    pub(crate) fn free_reusable(&self, runs: &[Unlinked]) -> Result<()> {
        if !runs.is_empty() {
            self.event(Event::ClusterFree);
            self.expanded.clear();
        }
        for run in runs {
            if self.discard_freed {
                self.discard_unshared(*run)?;
            }
            self.release(*run)?;
        }
        Ok(())
    }

    /// Whether `cluster`, which held `kinds`, has one reference, and from now on no compressed stream will
    /// add another.
    fn is_last_reference(&self, cluster: u64, kinds: OverlapChecks) -> Result<bool> {
        if self.is_guarded(Unlinked { clusters: ClusterRun::one(cluster), kinds }) {
            return Ok(false);
        }
        let mut refcounts = lock(&self.refcounts);
        let last = self.refcount_of(&refcounts, cluster)? == 1;
        if last {
            refcounts.leave_pack(cluster, &self.geometry);
        }
        Ok(last)
    }

    /// Gives the space of those clusters back whose last reference this is. A failed discard loses nothing.
    fn discard_unshared(&self, run: Unlinked) -> Result<()> {
        let (mut first, end) = (run.clusters.first(), run.clusters.end());
        while first < end {
            let mut after = first;
            while after < end && self.is_last_reference(after, run.kinds)? {
                after += 1;
            }
            if after > first {
                let last = ClusterRun::between(first..after);
                let _ = self.storage.discard(last.offset(&self.geometry), last.len(&self.geometry));
            }
            first = after + 1;
        }
        Ok(())
    }
}
