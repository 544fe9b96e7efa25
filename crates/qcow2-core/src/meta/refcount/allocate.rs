//! Allocation of host clusters.
//!
//! A cluster is free only if its refcount is zero and no metadata is known to be in it (I5).

use super::{RefcountStore, Refcounts};
use crate::damage::Damage;
use crate::error::{Error, ErrorKind, Result, TableKind};
use crate::invariant;
use crate::meta::overlap::OverlapChecks;
use crate::meta::page::SECTOR_SIZE;
use crate::meta::pending::Unlinked;
use crate::meta::run::ClusterRun;
use crate::port::event::Event;
use crate::sync::lock;
use qcow2_format::refcount::{decode_table_entry, encode_table_entry};
use qcow2_format::{HostCluster, HostOffset};

/// Table entries hold host offsets below this. Spec: "Cluster mapping".
const MAX_HOST_END: u64 = 1 << 56;

/// Newly allocated host clusters: their refcount is one, and nothing refers to them yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reserved {
    /// Host offset of the first one.
    pub(crate) offset: HostOffset,
    pub(crate) run: ClusterRun,
    /// True if the clusters lie past the end of the file, so that they read as zeroes.
    pub(crate) fresh: bool,
}

/// The result of a search for free clusters.
struct Found {
    run: ClusterRun,
    /// The first free cluster of the file, possibly before `run`.
    lowest: u64,
}

impl RefcountStore {
    /// Allocates up to `want` consecutive clusters, fewer if the first free run is shorter. Disk: may read
    /// refcount blocks and write new ones. Errors: `NoSpace`, `Corrupt`, `Storage`.
    pub(crate) fn allocate(&self, want: u64) -> Result<Reserved> {
        self.reserve(want, false, None)
    }

    /// Allocates a cluster for compressed streams.
    pub(super) fn allocate_for_streams(&self) -> Result<Reserved> {
        self.reserve(1, false, Some(Damage::HeaderFree { table: None }))
    }

    /// Allocates exactly `count` consecutive clusters for metadata of `kind`. Disk and errors: as
    /// [`allocate`](Self::allocate).
    pub(crate) fn allocate_metadata(&self, kind: OverlapChecks, count: u64) -> Result<Reserved> {
        let l2 = kind == OverlapChecks::ACTIVE_L2;
        let header = l2.then_some(Damage::HeaderFree { table: Some(TableKind::L2) });
        let reserved = self.reserve(count, true, header)?;
        self.tables.guard().note(kind, reserved.run);
        Ok(reserved)
    }

    /// [`allocate_metadata`](Self::allocate_metadata) that also reserves space in the storage. For tables
    /// that are written in the middle of a procedure: a full disk is found before that has changed anything.
    /// Errors: also `NoSpace`; nothing is allocated then.
    pub(crate) fn allocate_with_space(&self, kind: OverlapChecks, count: u64) -> Result<Reserved> {
        let reserved = self.allocate_metadata(kind, count)?;
        let len = reserved.run.len(self.geometry());
        if let Err(error) = self.file.reserve_space(reserved.offset, len) {
            self.release(Unlinked { clusters: reserved.run, kinds: kind })?;
            return Err(error);
        }
        Ok(reserved)
    }

    /// Allocates one cluster with the refcount `references`.
    pub(crate) fn allocate_shared(&self, references: u64) -> Result<HostOffset> {
        let reserved = self.allocate(1)?;
        self.set_count(&lock(&self.state), reserved.run.first(), references)?;
        Ok(reserved.offset)
    }

    fn reserve(&self, want: u64, exact: bool, header: Option<Damage>) -> Result<Reserved> {
        self.file.event(Event::ClusterAlloc);
        let mut refcounts = lock(&self.state);
        let Found { run, lowest } = self.find_free(&mut refcounts, want.max(1), exact)?;
        assert!(
            run.count() <= want.max(1) && (!exact || run.count() == want),
            "{run:?}, asked for {want} clusters"
        );
        if run.end() > self.geometry().clusters_below(MAX_HOST_END) {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "image file has reached its largest size of 2^56 bytes",
            ));
        }
        self.tables.check_unused(run, header)?;
        invariant::handed_out(run);
        let offset = run.offset(self.geometry());
        let fresh = self.file.storage().len()? <= offset.value();
        for cluster in run.clusters() {
            self.set_count(&refcounts, cluster, 1)?;
        }
        // A search for a longer run may have skipped free clusters before it.
        refcounts.first_free = if run.first() == lowest { run.end() } else { lowest };
        Ok(Reserved { offset, run, fresh })
    }

    /// Allocates `cluster` if it is free and its refcount block exists. Returns true if it did.
    pub(super) fn reserve_at(&self, cluster: u64) -> Result<bool> {
        let mut refcounts = lock(&self.state);
        let counted = self.slot(&refcounts, cluster)?.is_some();
        if !counted
            || self.count_in(&refcounts, cluster)? != 0
            || self.tables.guard().kinds_at(cluster) != OverlapChecks::NONE
        {
            return Ok(false);
        }
        invariant::handed_out(ClusterRun::one(cluster));
        self.set_count(&refcounts, cluster, 1)?;
        if refcounts.first_free == cluster {
            refcounts.first_free += 1;
        }
        Ok(true)
    }

    /// Finds the first free run of exactly `want` clusters, or, with `exact` false, the first free cluster
    /// and up to `want - 1` free ones after it. Adds refcount blocks at the end as needed.
    fn find_free(&self, refcounts: &mut Refcounts, want: u64, exact: bool) -> Result<Found> {
        let width = self.geometry().refcount_width();
        let mut at = refcounts.first_free;
        let (mut first, mut count, mut lowest) = (at, 0, u64::MAX);
        loop {
            let Some(slot) = self.slot(refcounts, at)? else {
                if count > 0 && !exact {
                    break;
                }
                let blocks = if exact { self.blocks_ahead(refcounts, at, want) } else { 1 };
                let index = self.geometry().refcount_table_index(HostCluster::new(at));
                if index + blocks > refcounts.entries(self.geometry()) {
                    self.grow_table(refcounts, index + blocks - 1)?;
                    continue;
                }
                for block in 0..blocks {
                    self.add_block(refcounts, index + block, at + block)?;
                }
                // A new block occupies the first cluster that it covers, so the run starts after the blocks.
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
        debug_assert!(count > 0 && lowest <= first, "cluster {first} is free, and {lowest} before it");
        Ok(Found { run: ClusterRun::new(first, count), lowest })
    }

    /// How many consecutive refcount blocks to add at cluster `at`, which has none. More than one if the run
    /// of `want` clusters is at least as long as the range of a block: it would not fit between blocks that
    /// each occupy the first cluster of their range.
    fn blocks_ahead(&self, refcounts: &Refcounts, at: u64, want: u64) -> u64 {
        let per_block = self.geometry().refcount_block_entries();
        if want < per_block {
            return 1;
        }
        // As many as cover the run and themselves.
        let blocks = (want + at % per_block).div_ceil(per_block - 1);
        let later = refcounts.table.iter().skip((at / per_block + 1) as usize);
        if later.take(blocks as usize - 1).all(|&entry| entry == 0) { blocks } else { 1 }
    }

    /// Adds the refcount block of table entry `index` at `cluster`, which lies in its own range or in that of
    /// a block before it.
    fn add_block(&self, refcounts: &mut Refcounts, index: u64, cluster: u64) -> Result<()> {
        self.tables.check_unused(ClusterRun::one(cluster), None)?;
        let sector = index * 8 / SECTOR_SIZE;
        let entries = HostOffset::new(refcounts.table_offset.value() + sector * SECTOR_SIZE);
        self.tables.check_place(OverlapChecks::REFCOUNT_TABLE, entries, SECTOR_SIZE)?;
        let size = self.geometry().cluster_size();
        let offset = HostOffset::new(self.geometry().bytes_of(cluster));
        self.cache.forget(offset, size);
        if self.file.storage().len()? > offset.value() {
            self.tables.zero(OverlapChecks::REFCOUNT_BLOCK, offset)?;
        } else {
            self.tables.write_empty(OverlapChecks::REFCOUNT_BLOCK, offset)?;
        }
        self.file.event(Event::RefblockAlloc);
        // Reserved bits alone lead to no block.
        debug_assert!(
            matches!(decode_table_entry(refcounts.entry(index), self.geometry()), Ok(None)),
            "a refcount block is replaced"
        );
        refcounts.set_entry(index, encode_table_entry(Some(offset)), self.geometry());
        if let Err(error) = self.set_count(refcounts, cluster, 1) {
            // Without its own refcount the block's cluster would count as free.
            refcounts.set_entry(index, encode_table_entry(None), self.geometry());
            return Err(error);
        }
        debug_assert!(
            matches!(self.count_in(refcounts, cluster), Ok(1)),
            "a refcount block without refcount"
        );
        refcounts.dirty_sectors.insert(sector);
        self.tables.guard().note(OverlapChecks::REFCOUNT_BLOCK, ClusterRun::one(cluster));
        Ok(())
    }
}
