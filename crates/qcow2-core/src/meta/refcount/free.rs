//! Dropping references, and giving clusters back that nobody refers to any more.
//!
//! Invariant I3: what was unlinked waits here until the unlink is on disk and no operation can still see it.

use super::{RefcountStore, Refcounts};
use crate::error::Result;
use crate::inflight::Operations;
use crate::meta::overlap::OverlapChecks;
use crate::meta::pending::Unlinked;
use crate::meta::run::ClusterRun;
use crate::port::event::Event;
use crate::sync::lock;
use ::alloc::vec::Vec;

/// How many unlinked runs may wait before a write-back is due.
const MAX_UNLINKED_RUNS: usize = 1 << 14;

impl RefcountStore {
    /// Whether freed host clusters are given back to the storage.
    pub(crate) fn discards_freed(&self) -> bool {
        self.discard_freed
    }

    /// Gives up references that nothing names any more, in memory: they are dropped when the unlink is on
    /// disk. For tables [`check_freeable`](Self::check_freeable) came before.
    pub(crate) fn unlink(&self, run: Unlinked) {
        if !run.clusters.is_empty() {
            lock(&self.pending).push(run);
        }
    }

    /// Whether no cluster waits to be freed.
    pub(crate) fn is_settled(&self) -> bool {
        lock(&self.pending).is_empty()
    }

    /// [`unlink`](Self::unlink) of several.
    pub(crate) fn unlink_all(&self, runs: &[Unlinked]) {
        let mut pending = lock(&self.pending);
        runs.iter().filter(|run| !run.clusters.is_empty()).for_each(|&run| pending.push(run));
    }

    /// Whether so much waits for write-back that it should happen now.
    pub(crate) fn is_pressed(&self) -> bool {
        self.cache.is_pressed() || lock(&self.pending).fresh_count() >= MAX_UNLINKED_RUNS
    }

    /// Takes the references whose unlinks are about to be written. The caller has closed the gate, so that
    /// each of them belongs to a change that is written with them.
    pub(crate) fn take_unlinked(&self) -> Vec<Unlinked> {
        lock(&self.pending).take_fresh()
    }

    /// Takes references in whose unlinks are on disk now, and returns those that none of `operations` can see
    /// any more. The caller holds back other flushes.
    pub(crate) fn made_durable(&self, unlinked: Vec<Unlinked>, operations: &Operations) -> Vec<Unlinked> {
        let mut pending = lock(&self.pending);
        debug_assert!(unlinked.iter().all(|run| !run.clusters.is_empty()), "references to nothing");
        pending.made_durable(operations.epoch(), unlinked);
        if pending.is_empty() {
            return Vec::new();
        }
        pending.take_reusable(operations.advance())
    }

    /// [`Tables::check_owner`](crate::meta::tables::Tables::check_owner), and that the refcounts of `run` can
    /// be changed: a procedure that ends with giving it up must not fail there. Disk: may read refcount
    /// blocks.
    pub(crate) fn check_freeable(&self, run: Unlinked) -> Result<()> {
        self.tables.check_owner(run)?;
        let refcounts = lock(&self.state);
        run.clusters.clusters().try_for_each(|cluster| match self.slot(&refcounts, cluster)? {
            Some(slot) => self.check_block_place(&slot),
            None => Ok(()),
        })
    }

    /// Drops the references of `run`. Nothing on disk may hold them any more.
    pub(crate) fn release(&self, run: Unlinked) -> Result<()> {
        self.lower_in(&mut lock(&self.state), run)
    }

    /// [`release`](Self::release) for a caller that holds the refcounts. On a damaged image a reference may
    /// have led to other metadata, which stays counted once whoever pointed at it, or to a cluster that
    /// nobody counts, which is free already.
    pub(super) fn lower_in(&self, refcounts: &mut Refcounts, run: Unlinked) -> Result<()> {
        // Asked for the whole run first: nearly always the answer is no, and then no cluster is asked about.
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

    /// Frees what nobody can see any more, giving the space back to the storage first where that is wanted.
    /// What was read from there has been forgotten.
    pub(crate) fn free(&self, runs: &[Unlinked]) -> Result<()> {
        debug_assert!(runs.iter().all(|run| !run.clusters.is_empty()), "references to nothing are dropped");
        if !runs.is_empty() {
            self.file.event(Event::ClusterFree);
        }
        for run in runs {
            // Before the counts go down: afterwards the cluster may be somebody else's, with new bytes.
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
