//! Which host clusters hold metadata, so that guest data is never written over it.
//!
//! Invariant I5: metadata overlaps nothing.

use ::alloc::collections::BTreeMap;

/// Which kinds of metadata guest data may not be written over. A write that would land there is refused and marks the
/// image corrupt. What an image holds when it is opened is looked at kind by kind; tables that the engine itself places
/// later are protected unless nothing is. The names are QEMU's (`overlap-check`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlapChecks(u16);

impl OverlapChecks {
    /// No check at all.
    pub const NONE: Self = Self(0);
    /// The header's cluster.
    pub const MAIN_HEADER: Self = Self(1);
    /// The active L1 table.
    pub const ACTIVE_L1: Self = Self(1 << 1);
    /// L2 tables of the active state.
    pub const ACTIVE_L2: Self = Self(1 << 2);
    /// The refcount table.
    pub const REFCOUNT_TABLE: Self = Self(1 << 3);
    /// Refcount blocks.
    pub const REFCOUNT_BLOCK: Self = Self(1 << 4);
    /// The snapshot table.
    pub const SNAPSHOT_TABLE: Self = Self(1 << 5);
    /// L1 tables of snapshots.
    pub const INACTIVE_L1: Self = Self(1 << 6);
    /// L2 tables of snapshots: opening the image reads all their L1 tables.
    pub const INACTIVE_L2: Self = Self(1 << 7);
    /// The bitmap directory.
    pub const BITMAP_DIRECTORY: Self = Self(1 << 8);
    /// What the header tells without reading anything.
    pub const CONSTANT: Self = Self::MAIN_HEADER
        .with(Self::ACTIVE_L1)
        .with(Self::REFCOUNT_TABLE)
        .with(Self::SNAPSHOT_TABLE)
        .with(Self::BITMAP_DIRECTORY);
    /// What is in memory anyway; the default.
    pub const CACHED: Self =
        Self::CONSTANT.with(Self::ACTIVE_L2).with(Self::REFCOUNT_BLOCK).with(Self::INACTIVE_L1);
    /// Everything.
    pub const ALL: Self = Self::CACHED.with(Self::INACTIVE_L2);

    /// These kinds and those of `more`.
    pub const fn with(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }

    /// These kinds without those of `less`.
    pub const fn without(self, less: Self) -> Self {
        Self(self.0 & !less.0)
    }

    /// Whether all kinds of `kinds` are among these.
    pub const fn contains(self, kinds: Self) -> bool {
        self.0 & kinds.0 == kinds.0
    }

    /// Whether any of `kinds` is among these.
    pub(crate) const fn any_of(self, kinds: Self) -> bool {
        self.0 & kinds.0 != 0
    }
}

const CHUNK_BITS: u32 = 12;
const CHUNK_WORDS: usize = 1 << (CHUNK_BITS - 6);

/// A sparse set of host clusters.
#[derive(Debug, Default)]
pub(crate) struct ClusterSet {
    chunks: BTreeMap<u64, [u64; CHUNK_WORDS]>,
}

impl ClusterSet {
    /// Adds `count` clusters from `first` on; `count` is bounded by the limits on table sizes.
    pub(crate) fn insert(&mut self, first: u64, count: u64) {
        for cluster in first..first.saturating_add(count) {
            let chunk = self.chunks.entry(cluster >> CHUNK_BITS).or_insert([0; CHUNK_WORDS]);
            let (word, bit) = Self::place(cluster);
            chunk[word] |= 1 << bit;
        }
    }

    /// Removes `count` clusters from `first` on.
    pub(crate) fn remove(&mut self, first: u64, count: u64) {
        for cluster in first..first.saturating_add(count) {
            if let Some(chunk) = self.chunks.get_mut(&(cluster >> CHUNK_BITS)) {
                let (word, bit) = Self::place(cluster);
                chunk[word] &= !(1 << bit);
            }
        }
    }

    /// The first cluster of `first..first + count` that is in the set.
    pub(crate) fn first_in(&self, first: u64, count: u64) -> Option<u64> {
        (first..first.saturating_add(count)).find(|&c| self.contains(c))
    }

    /// Whether `cluster` is in the set.
    pub(crate) fn contains(&self, cluster: u64) -> bool {
        let (word, bit) = Self::place(cluster);
        self.chunks.get(&(cluster >> CHUNK_BITS)).is_some_and(|c| c[word] >> bit & 1 == 1)
    }

    fn place(cluster: u64) -> (usize, u64) {
        let inside = cluster & ((1 << CHUNK_BITS) - 1);
        ((inside / 64) as usize, inside % 64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_runs() {
        let mut set = ClusterSet::default();
        set.insert(4090, 20);
        set.insert(1 << 40, 1);
        assert!(!set.contains(4089) && set.contains(4090) && set.contains(4109) && !set.contains(4110));
        assert_eq!(set.first_in(4000, 1000), Some(4090));
        set.remove(4090, 10);
        assert_eq!(set.first_in(4000, 1000), Some(4100));
        assert_eq!(set.first_in((1 << 40) - 5, 5), None);
        assert_eq!(set.first_in((1 << 40) - 5, 6), Some(1 << 40));
    }
}
