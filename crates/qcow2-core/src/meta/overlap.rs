//! Which host clusters hold metadata, so that guest data is never written over it.
//!
//! Invariant I5: metadata overlaps nothing.

use ::alloc::collections::BTreeMap;

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
