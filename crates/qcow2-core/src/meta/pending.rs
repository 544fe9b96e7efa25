//! Clusters that were unlinked and wait to be freed.
//!
//! Invariant I3: their refcounts go down only after the unlink is on disk and no running operation can still
//! use them.

use super::overlap::OverlapChecks;
use super::run::ClusterRun;
use crate::invariant;
use ::alloc::vec::Vec;
use qcow2_format::{Geometry, HostOffset};

/// A run of host clusters that lose one reference each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unlinked {
    pub(crate) clusters: ClusterRun,
    /// What the dropped reference was for: a kind of metadata, or none for guest data. Clusters that hold
    /// other metadata are not freed.
    pub(crate) kinds: OverlapChecks,
}

impl Unlinked {
    /// A reference to a table of `kinds` with `len` bytes at `offset`, a multiple of the cluster size.
    pub(crate) fn table(geometry: &Geometry, kinds: OverlapChecks, offset: HostOffset, len: u64) -> Self {
        Self { clusters: ClusterRun::touched(geometry, offset, len), kinds }
    }

    /// A reference to a table of one cluster.
    pub(crate) fn one(geometry: &Geometry, kinds: OverlapChecks, table: HostOffset) -> Self {
        Self { clusters: ClusterRun::one(geometry.host_cluster(table).value()), kinds }
    }

    /// References to guest data.
    pub(crate) fn data(clusters: ClusterRun) -> Self {
        Self { clusters, kinds: OverlapChecks::NONE }
    }
}

/// Unlinked clusters: `fresh` while the unlink is in memory only, `durable` with their epoch after that.
#[derive(Debug, Default)]
pub(crate) struct PendingFrees {
    fresh: Vec<Unlinked>,
    durable: Vec<(u64, Vec<Unlinked>)>,
}

impl PendingFrees {
    /// Adds a run that was unlinked in memory.
    pub(crate) fn push(&mut self, run: Unlinked) {
        debug_assert!(!run.clusters.is_empty(), "an empty run is unlinked");
        if let Some(last) = self.fresh.last_mut()
            && last.kinds == run.kinds
            && last.clusters.join(run.clusters)
        {
            return;
        }
        self.fresh.push(run);
    }

    /// Number of runs whose unlink is not on disk yet.
    pub(crate) fn fresh_count(&self) -> usize {
        self.fresh.len()
    }

    /// Takes the runs whose unlinks the present flush writes.
    pub(crate) fn take_fresh(&mut self) -> Vec<Unlinked> {
        core::mem::take(&mut self.fresh)
    }

    /// Adds runs whose unlinks are on disk now. `epoch`: the current one.
    pub(crate) fn made_durable(&mut self, epoch: u64, runs: Vec<Unlinked>) {
        debug_assert!(self.durable.last().is_none_or(|(last, _)| *last <= epoch), "the epoch went back");
        if !runs.is_empty() {
            self.durable.push((epoch, runs));
        }
    }

    /// Takes the runs that can be freed in epoch `now`: no running operation uses them.
    pub(crate) fn take_reusable(&mut self, now: u64) -> Vec<Unlinked> {
        let mut reusable = Vec::new();
        self.durable.retain_mut(|(epoch, runs)| {
            let keep = *epoch + 2 > now;
            if !keep {
                invariant::unseen(*epoch, now);
                reusable.append(runs);
            }
            keep
        });
        reusable
    }

    /// True if no run waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.durable.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_freed_two_epochs_after_they_are_durable() {
        let mut pending = PendingFrees::default();
        let data = |first, count| Unlinked::data(ClusterRun::new(first, count));
        pending.push(data(5, 1));
        pending.push(data(6, 2));
        let table = Unlinked { clusters: ClusterRun::one(8), kinds: OverlapChecks::L2 };
        pending.push(table);
        let fresh = pending.take_fresh();
        assert_eq!(fresh, [data(5, 3), table]);
        pending.made_durable(7, fresh);
        assert!(pending.take_reusable(8).is_empty() && !pending.is_empty());
        assert_eq!(pending.take_reusable(9), [data(5, 3), table]);
        assert!(pending.is_empty());
    }
}
