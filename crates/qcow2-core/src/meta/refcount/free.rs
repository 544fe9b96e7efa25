//! Drops references and frees clusters.
//!
//! Invariant I3: an unlinked cluster waits here until the unlink is on disk and no running operation can
//! still use it.

use super::{RefcountStore, Refcounts};
use crate::error::Result;
use crate::inflight::Operations;
use crate::meta::overlap::OverlapChecks;
use crate::meta::pending::Unlinked;
use crate::meta::run::ClusterRun;
use crate::port::event::Event;
use crate::sync::lock;
use ::alloc::vec::Vec;

/// Number of waiting unlinked runs above which a flush is due.
const MAX_UNLINKED_RUNS: usize = 1 << 14;

impl RefcountStore {
    /// True if freed host clusters are discarded in the storage.
    pub(crate) fn discards_freed(&self) -> bool {
        self.discard_freed
    }

    /// Records that the entries that referred to `run` were changed in memory. The refcounts go down when the
    /// change is on disk. For tables the caller has called [`check_freeable`](Self::check_freeable) first.
    pub(crate) fn unlink(&self, run: Unlinked) {
        if !run.clusters.is_empty() {
            lock(&self.pending).push(run);
        }
    }

    /// True if no cluster waits to be freed.
    pub(crate) fn is_settled(&self) -> bool {
        lock(&self.pending).is_empty()
    }

    /// [`unlink`](Self::unlink) for several runs.
    pub(crate) fn unlink_all(&self, runs: &[Unlinked]) {
        let mut pending = lock(&self.pending);
        runs.iter().filter(|run| !run.clusters.is_empty()).for_each(|&run| pending.push(run));
    }

    /// True if so many changes wait that a flush is due.
    pub(crate) fn is_pressed(&self) -> bool {
        self.cache.is_pressed() || lock(&self.pending).fresh_count() >= MAX_UNLINKED_RUNS
    }

    /// Takes the runs whose unlinks the present flush writes. The caller has closed the gate, so that the
    /// flush writes the entries of each of them.
    pub(crate) fn take_unlinked(&self) -> Vec<Unlinked> {
        lock(&self.pending).take_fresh()
    }

    /// Adds runs whose unlinks are on disk now. Advances the epoch and returns the runs that none of
    /// `operations` can still use. The caller holds the flush lock.
    pub(crate) fn made_durable(&self, unlinked: Vec<Unlinked>, operations: &Operations) -> Vec<Unlinked> {
        let mut pending = lock(&self.pending);
        debug_assert!(unlinked.iter().all(|run| !run.clusters.is_empty()), "an empty run is unlinked");
        pending.made_durable(operations.epoch(), unlinked);
        if pending.is_empty() {
            return Vec::new();
        }
        pending.take_reusable(operations.advance())
    }

    /// Checks that freeing `run` later cannot fail: that it holds no other metadata
    /// ([`Tables::check_owner`](crate::meta::tables::Tables::check_owner)) and that its refcounts can be
    /// written. For procedures that free their old tables last. Disk: may read refcount blocks.
    pub(crate) fn check_freeable(&self, run: Unlinked) -> Result<()> {
        self.tables.check_owner(run)?;
        let refcounts = lock(&self.state);
        run.clusters.clusters().try_for_each(|cluster| match self.slot(&refcounts, cluster)? {
            Some(slot) => self.check_block_place(&slot),
            None => Ok(()),
        })
    }

    /// Drops one reference to each cluster of `run`. No entry on disk may refer to them through this
    /// reference any more.
    pub(crate) fn release(&self, run: Unlinked) -> Result<()> {
        self.lower_in(&mut lock(&self.state), run)
    }

    /// [`release`](Self::release) for a caller that has locked the refcounts. On a damaged image the
    /// reference may have pointed to other metadata, whose refcount then never goes below 1, or to a cluster
    /// with refcount 0, which is left alone.
    pub(super) fn lower_in(&self, refcounts: &mut Refcounts, run: Unlinked) -> Result<()> {
        // One lookup for the whole run first: it is nearly always false, and saves a lookup for each cluster.
        let guarded = self.tables.is_guarded(run);
        for cluster in run.clusters.clusters() {
            let one = Unlinked { clusters: ClusterRun::one(cluster), ..run };
            let old = self.count_in(refcounts, cluster)?;
            let guarded = guarded && self.tables.is_guarded(one);
            if guarded || old == 1 {
                self.tables.guard().forget(run.kinds, cluster);
            }
            if old == 0 || guarded && old == 1 {
                continue;
            }
            if old == 1 {
                refcounts.first_free = refcounts.first_free.min(cluster);
                refcounts.leave_pack(cluster, self.geometry());
            }
            self.set_count(refcounts, cluster, old - 1)?;
        }
        Ok(())
    }

    /// Frees `runs`, which no entry on disk and no running operation uses; discards their space first if
    /// `discard_freed` is set. The caller has cleared the cache of expanded clusters.
    pub(crate) fn free(&self, runs: &[Unlinked]) -> Result<()> {
        debug_assert!(runs.iter().all(|run| !run.clusters.is_empty()), "an empty run is freed");
        if !runs.is_empty() {
            self.file.event(Event::ClusterFree);
        }
        for run in runs {
            // Before the refcounts go down: after that another thread may allocate the cluster and write to
            // it.
            if self.discard_freed {
                self.discard_unshared(*run)?;
            }
            self.release(*run)?;
        }
        Ok(())
    }

    /// True if `cluster`, which held `kinds`, has refcount 1. Also keeps compressed streams from adding
    /// another reference from now on.
    fn is_last_reference(&self, cluster: u64, kinds: OverlapChecks) -> Result<bool> {
        if self.tables.is_guarded(Unlinked { clusters: ClusterRun::one(cluster), kinds }) {
            return Ok(false);
        }
        let mut refcounts = lock(&self.state);
        let last = self.count_in(&refcounts, cluster)? == 1;
        if last {
            refcounts.leave_pack(cluster, self.geometry());
        }
        Ok(last)
    }

    /// Discards the clusters of `run` with refcount 1. A failed discard is ignored: it is a hint.
    fn discard_unshared(&self, run: Unlinked) -> Result<()> {
        let (mut first, end) = (run.clusters.first(), run.clusters.end());
        while first < end {
            let mut after = first;
            while after < end && self.is_last_reference(after, run.kinds)? {
                after += 1;
            }
            if after > first {
                let last = ClusterRun::between(first..after);
                debug_assert!(
                    !self.tables.is_guarded(Unlinked { clusters: last, ..run }),
                    "metadata is discarded"
                );
                let _ = self.file.storage().discard(last.offset(self.geometry()), last.len(self.geometry()));
            }
            first = after + 1;
        }
        Ok(())
    }
}
