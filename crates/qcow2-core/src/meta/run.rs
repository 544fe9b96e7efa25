//! Runs of host clusters as one type, so that first and count cannot be mixed up and no end passes 2^64.

use core::fmt;
use core::ops::Range;
use qcow2_format::{Geometry, HostOffset};

/// Consecutive host clusters; may be empty.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClusterRun {
    first: u64,
    count: u64,
}

impl ClusterRun {
    /// No clusters at all.
    pub(crate) const NONE: Self = Self { first: 0, count: 0 };

    /// `count` clusters from cluster `first` on. Both come from byte numbers divided by at least 512, so no
    /// file content can make their sum pass 2^64.
    pub(crate) fn new(first: u64, count: u64) -> Self {
        assert!(first.checked_add(count).is_some(), "{count} clusters from cluster {first} on");
        Self { first, count }
    }

    /// One cluster.
    pub(crate) fn one(cluster: u64) -> Self {
        Self::new(cluster, 1)
    }

    /// The clusters from `range.start` up to `range.end`, excluded.
    pub(crate) fn between(range: Range<u64>) -> Self {
        debug_assert!(range.start <= range.end, "clusters {range:?} end before they start");
        Self { first: range.start, count: range.end - range.start }
    }

    /// The clusters that `len` bytes at `offset` touch; bytes past 2^64 - 1 are ignored. An empty table at a
    /// cluster boundary touches none.
    pub(crate) fn touched(geometry: &Geometry, offset: HostOffset, len: u64) -> Self {
        let first = geometry.host_cluster(offset).value();
        Self::between(first..geometry.clusters_for(offset.value().saturating_add(len)))
    }

    /// [`touched`](Self::touched) for an unchecked range from a table: `None` if it passes 2^64 - 1.
    pub(crate) fn of_bytes(geometry: &Geometry, offset: HostOffset, len: u64) -> Option<Self> {
        let end = offset.checked_add(len)?;
        Some(Self::between(geometry.host_cluster(offset).value()..geometry.clusters_for(end.value())))
    }

    /// The first cluster; for an empty run the cluster at which it would start.
    pub(crate) fn first(self) -> u64 {
        self.first
    }

    /// Number of clusters.
    pub(crate) fn count(self) -> u64 {
        self.count
    }

    /// The cluster after the last one.
    pub(crate) fn end(self) -> u64 {
        self.first + self.count
    }

    /// True if it has no cluster.
    pub(crate) fn is_empty(self) -> bool {
        self.count == 0
    }

    /// The cluster numbers.
    pub(crate) fn clusters(self) -> Range<u64> {
        self.first..self.end()
    }

    /// Host offset of the first cluster.
    pub(crate) fn offset(self, geometry: &Geometry) -> HostOffset {
        HostOffset::new(geometry.bytes_of(self.first))
    }

    /// Length in bytes.
    pub(crate) fn len(self, geometry: &Geometry) -> u64 {
        geometry.bytes_of(self.count)
    }

    /// Appends `next` if it starts right behind this run. Returns true if it did.
    pub(crate) fn join(&mut self, next: Self) -> bool {
        let joins = self.end() == next.first;
        if joins {
            *self = Self::new(self.first, self.count + next.count);
        }
        joins
    }

    /// The first `count` clusters, or all if there are fewer.
    pub(crate) fn cut(self, count: u64) -> Self {
        Self { count: self.count.min(count), ..self }
    }
}

impl fmt::Debug for ClusterRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "clusters {}..{}", self.first, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_format::GeometryFields;

    fn check(offset: u64, len: u64, wanted: Option<Range<u64>>) {
        let fields = GeometryFields { cluster_bits: 9, refcount_order: 4, extended_l2: false };
        let geometry = Geometry::new(fields).unwrap();
        let seen = ClusterRun::of_bytes(&geometry, HostOffset::new(offset), len);
        assert_eq!(seen.map(ClusterRun::clusters), wanted, "{len} bytes at {offset:#x}");
        if let Some(seen) = seen {
            assert_eq!(ClusterRun::touched(&geometry, HostOffset::new(offset), len), seen);
        }
    }

    #[test]
    fn a_byte_range_touches_the_clusters_of_all_its_bytes() {
        check(0, 0, Some(0..0));
        check(512, 512, Some(1..2));
        check(511, 2, Some(0..2));
        check(513, 1023, Some(1..3));
        check(u64::MAX - 1, 1, Some((1 << 55) - 1..1 << 55));
        check(u64::MAX - 1, 2, None);
    }

    #[test]
    fn only_adjacent_runs_join() {
        let mut run = ClusterRun::new(5, 2);
        assert!(!run.join(ClusterRun::one(8)) && run.join(ClusterRun::one(7)));
        assert_eq!((run.first(), run.count(), run.end()), (5, 3, 8));
        assert_eq!(run.cut(1).clusters(), 5..6);
    }

    #[test]
    #[should_panic(expected = "clusters from cluster")]
    fn a_run_past_u64_max_panics() {
        let _ = ClusterRun::new(u64::MAX, 1);
    }
}
