//! Which bytes around a partial write must be copied. Pure.
//!
//! Invariant I2: when a new host cluster becomes visible, every byte of its data subclusters has been
//! written.

use super::plan::mask;
use crate::invariant;
use ::alloc::vec::Vec;
use qcow2_format::l2::L2Format;
use qcow2_format::{GuestOffset, GuestRange};

/// One cluster of a write: which of its bytes are written, and which subclusters must be complete.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClusterEdges {
    /// The first byte of the cluster.
    pub(crate) cluster: GuestOffset,
    /// The write's bytes within the cluster: from `start` up to `end`.
    pub(crate) start: u64,
    /// See `start`.
    pub(crate) end: u64,
    /// Mask of subclusters that are data after the commit, so that all their bytes must be written.
    pub(crate) needed: u32,
}

/// The guest ranges of the needed subclusters that the write does not cover, in ascending order.
pub(crate) fn ranges_to_copy(format: &L2Format, edges: &ClusterEdges) -> Vec<GuestRange> {
    debug_assert!(edges.start < edges.end && edges.end <= format.geometry.cluster_size(), "{edges:?}");
    let size = format.geometry.subcluster_size();
    let count = u64::from(format.geometry.subclusters());
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut add = |start: u64, end: u64| {
        if start < end {
            match ranges.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => ranges.push((start, end)),
            }
        }
    };
    for index in (0..count).filter(|&i| edges.needed & mask(i, i + 1) != 0) {
        let (start, end) = (index * size, (index + 1) * size);
        add(start, end.min(edges.start.max(start)));
        add(start.max(edges.end.min(end)), end);
    }
    invariant::beside(&ranges, edges.start..edges.end, format.geometry.cluster_size());
    let base = edges.cluster.value();
    let range =
        |(start, end)| GuestRange::between(GuestOffset::new(base + start), GuestOffset::new(base + end));
    ranges.into_iter().map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_format::{Geometry, GeometryFields};

    fn check(extended_l2: bool, edges: (u64, u64, u32), wanted: &[(u64, u64)]) {
        let geometry =
            Geometry::new(GeometryFields { cluster_bits: 16, refcount_order: 4, extended_l2 }).unwrap();
        let format = L2Format { geometry, zero_flag: true, external_data: false };
        let cluster = GuestOffset::new(0x30000);
        let edges = ClusterEdges { cluster, start: edges.0, end: edges.1, needed: edges.2 };
        let seen: Vec<_> = ranges_to_copy(&format, &edges)
            .iter()
            .map(|r| (r.start().value() - 0x30000, r.end().value() - 0x30000))
            .collect();
        assert_eq!(seen, wanted);
    }

    #[test]
    fn the_rest_of_a_cluster_is_copied() {
        check(false, (0x100, 0x200, 1), &[(0, 0x100), (0x200, 0x10000)]);
        check(false, (0, 0x10000, 1), &[]);
        check(false, (0, 0x200, 1), &[(0x200, 0x10000)]);
    }

    #[test]
    fn only_needed_subclusters_are_copied() {
        check(true, (2100, 2200, 0b10), &[(2048, 2100), (2200, 4096)]);
        check(true, (2100, 2200, 0b1010), &[(2048, 2100), (2200, 4096), (6144, 8192)]);
        check(true, (2100, 2200, 0b1000), &[(6144, 8192)]);
        check(true, (2048, 4096, 0b111), &[(0, 2048), (4096, 6144)]);
    }
}
