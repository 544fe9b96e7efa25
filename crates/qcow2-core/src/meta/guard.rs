//! The map of host clusters that hold metadata. [`Tables`](super::tables::Tables) checks it before it writes
//! or frees any cluster.
//!
//! Invariant I5: metadata overlaps nothing. On a damaged image it does: an L2 entry may point to a refcount
//! block, an L1 entry to the refcount table. So no entry is trusted over this map. It has the tables that the
//! header, the L1 table and the refcount table pointed to when the image was opened, and every table that the
//! engine has allocated since. A cluster leaves it only when the table in it is freed.

use super::overlap::OverlapChecks;
use super::run::ClusterRun;
use crate::invariant;
use crate::sync::{Rank, RwLock, read, write};
use ::alloc::boxed::Box;
use ::alloc::collections::BTreeMap;
use core::ops::Range;

/// A metadata cluster that a write or a free would hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hit {
    pub(crate) cluster: u64,
    /// The kinds of metadata in it, among those of the query.
    pub(crate) kinds: OverlapChecks,
}

/// The metadata clusters of an open image. Its lock has the last rank and is held for a lookup only.
pub(crate) struct Guard {
    map: RwLock<MetadataMap>,
    /// The kinds that guest data must not overwrite.
    checks: OverlapChecks,
    /// True if the caller has chosen snapshots' L2 tables.
    snapshots: bool,
}

impl Guard {
    /// `map`: the metadata clusters. `checks`: the kinds that guest data must not overwrite.
    pub(crate) fn new(map: MetadataMap, checks: OverlapChecks) -> Self {
        // Snapshots' L2 tables are in the map if reading them was cheap; the default checks then include
        // them.
        let default = checks.contains(OverlapChecks::CACHED);
        let snapshots = checks.contains(OverlapChecks::INACTIVE_L2);
        let checks = if default { checks.with(OverlapChecks::INACTIVE_L2) } else { checks };
        Self { map: RwLock::new(Rank::Metadata, map), checks, snapshots }
    }

    /// True if the caller has chosen to protect L2 tables that the map lacks.
    pub(crate) fn lacks_chosen(&self) -> bool {
        self.snapshots && read(&self.map).lacks_snapshots
    }

    /// Replaces the map.
    pub(crate) fn replace(&self, map: MetadataMap) {
        *write(&self.map) = map;
    }

    /// Records that the clusters of `run` hold metadata of `kinds`.
    pub(crate) fn note(&self, kinds: OverlapChecks, run: ClusterRun) {
        debug_assert!(kinds != OverlapChecks::NONE, "{run:?} are recorded without a kind");
        write(&self.map).insert(kinds, run);
    }

    /// Records that `cluster` no longer holds metadata of `kinds`: it was freed as that.
    pub(crate) fn forget(&self, kinds: OverlapChecks, cluster: u64) {
        invariant::not_the_header(kinds, cluster);
        // Looked up under the read lock first: most freed clusters are not in the map.
        if kinds != OverlapChecks::NONE && self.kinds_at(cluster).any_of(kinds) {
            write(&self.map).remove(kinds, cluster);
        }
    }

    /// The kinds of metadata in `cluster`.
    pub(crate) fn kinds_at(&self, cluster: u64) -> OverlapChecks {
        read(&self.map).kinds_at(cluster)
    }

    /// The first cluster of `run` that guest data must not be written to.
    pub(crate) fn hit_by_data(&self, run: ClusterRun) -> Option<Hit> {
        read(&self.map).first_of(self.checks, run)
    }

    /// The first cluster of `run` that holds any other metadata than `own`.
    pub(crate) fn hit_by(&self, own: OverlapChecks, run: ClusterRun) -> Option<Hit> {
        read(&self.map).first_of(OverlapChecks::ALL.without(own), run)
    }
}

/// Host clusters by the kinds of metadata in them.
#[derive(Default)]
pub(crate) struct MetadataMap {
    /// Clusters with metadata of any kind: answers almost every query with one lookup.
    any: ClusterSet,
    kinds: [ClusterSet; OverlapChecks::COUNT],
    /// True if a snapshot has no usable L1 table, so that its L2 tables are not in the map.
    pub(crate) lacks_snapshots: bool,
}

impl MetadataMap {
    /// Adds the clusters of `run`. The limits on table sizes bound their number.
    pub(crate) fn insert(&mut self, kinds: OverlapChecks, run: ClusterRun) {
        let clusters = run.clusters();
        for (index, _) in kinds.each() {
            self.kinds[index].insert(clusters.clone());
        }
        self.any.insert(clusters);
    }

    /// True if `cluster` holds metadata of `kind`.
    pub(crate) fn holds(&self, kind: OverlapChecks, cluster: u64) -> bool {
        self.kinds_at(cluster).contains(kind)
    }

    fn remove(&mut self, kinds: OverlapChecks, cluster: u64) {
        for (index, _) in kinds.each() {
            self.kinds[index].remove(cluster);
        }
        if self.kinds_at(cluster) == OverlapChecks::NONE {
            self.any.remove(cluster);
        }
        debug_assert!(!self.kinds_at(cluster).any_of(kinds), "cluster {cluster} is still in the map");
    }

    fn kinds_at(&self, cluster: u64) -> OverlapChecks {
        let held = OverlapChecks::ALL.each().filter(|(index, _)| self.kinds[*index].contains(cluster));
        held.fold(OverlapChecks::NONE, |kinds, (_, kind)| kinds.with(kind))
    }

    /// The first cluster of `run` that holds one of `kinds`.
    fn first_of(&self, kinds: OverlapChecks, run: ClusterRun) -> Option<Hit> {
        let mut rest = run.clusters();
        while let Some(cluster) = self.any.first_in(rest.clone()) {
            debug_assert!(
                self.kinds_at(cluster) != OverlapChecks::NONE,
                "cluster {cluster} holds no metadata"
            );
            let found = self.kinds_at(cluster).common(kinds);
            if found != OverlapChecks::NONE {
                return Some(Hit { cluster, kinds: found });
            }
            rest.start = cluster + 1;
        }
        None
    }
}

const CHUNK_BITS: u32 = 12;
const CHUNK_WORDS: usize = 1 << (CHUNK_BITS - 6);

/// A sparse set of host clusters.
#[derive(Debug, Default)]
struct ClusterSet {
    chunks: BTreeMap<u64, Box<[u64; CHUNK_WORDS]>>,
}

impl ClusterSet {
    fn insert(&mut self, clusters: Range<u64>) {
        for cluster in clusters {
            let chunk =
                self.chunks.entry(cluster >> CHUNK_BITS).or_insert_with(|| Box::new([0; CHUNK_WORDS]));
            let (word, bit) = Self::place(cluster);
            chunk[word] |= 1 << bit;
        }
    }

    fn remove(&mut self, cluster: u64) {
        if let Some(chunk) = self.chunks.get_mut(&(cluster >> CHUNK_BITS)) {
            let (word, bit) = Self::place(cluster);
            chunk[word] &= !(1 << bit);
        }
    }

    /// The first of `clusters` that is in the set. Searches chunk by chunk, so that long empty ranges are
    /// cheap.
    fn first_in(&self, clusters: Range<u64>) -> Option<u64> {
        let last = clusters.end.checked_sub(1).filter(|&last| last >= clusters.start)?;
        let (first_chunk, last_chunk) = (clusters.start >> CHUNK_BITS, last >> CHUNK_BITS);
        // Nearly every query is of a few clusters, and every guest write makes one.
        if first_chunk == last_chunk {
            return Self::first_in_chunk(self.chunks.get(&first_chunk)?, first_chunk, clusters.start, last);
        }
        let mut chunks = self.chunks.range(first_chunk..=last_chunk);
        chunks.find_map(|(&number, chunk)| Self::first_in_chunk(chunk, number, clusters.start, last))
    }

    /// The first of the clusters from `first` to `last` that is in `chunk`; both may be outside.
    fn first_in_chunk(chunk: &[u64; CHUNK_WORDS], number: u64, first: u64, last: u64) -> Option<u64> {
        let base = number << CHUNK_BITS;
        let (mut word, bit) = Self::place(first.saturating_sub(base));
        let end = if last >> CHUNK_BITS == number { Self::place(last).0 } else { CHUNK_WORDS - 1 };
        let mut bits = chunk[word] & (u64::MAX << bit);
        while bits == 0 && word < end {
            word += 1;
            bits = chunk[word];
        }
        let found = base + word as u64 * 64 + u64::from(bits.trailing_zeros());
        (bits != 0 && found <= last).then_some(found)
    }

    fn contains(&self, cluster: u64) -> bool {
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
    fn cluster_set_insert_remove_and_search() {
        let mut set = ClusterSet::default();
        set.insert(4090..4110);
        set.insert(1 << 40..(1 << 40) + 1);
        assert!(!set.contains(4089) && set.contains(4090) && set.contains(4109) && !set.contains(4110));
        assert_eq!(set.first_in(4000..5000), Some(4090));
        assert_eq!(set.first_in(4100..5000), Some(4100));
        assert_eq!((set.first_in(4000..4090), set.first_in(4110..9000)), (None, None));
        assert_eq!(set.first_in(5..5), None);
        (4090..4100).for_each(|cluster| set.remove(cluster));
        assert_eq!(set.first_in(4000..5000), Some(4100));
        assert_eq!(set.first_in((1 << 40) - 5..1 << 40), None);
        assert_eq!(set.first_in(4110..u64::MAX), Some(1 << 40));
    }

    #[test]
    fn a_cluster_is_guarded_until_every_kind_in_it_is_forgotten() {
        let (l2, table) = (OverlapChecks::ACTIVE_L2, OverlapChecks::REFCOUNT_TABLE);
        let guard = Guard::new(MetadataMap::default(), OverlapChecks::CACHED.without(l2));
        guard.note(l2, ClusterRun::new(7, 1));
        guard.note(table, ClusterRun::new(7, 2));
        assert_eq!(guard.hit_by(l2, ClusterRun::new(0, 100)), Some(Hit { cluster: 7, kinds: table }));
        assert_eq!(guard.hit_by(l2.with(table), ClusterRun::new(0, 100)), None);
        assert_eq!(guard.hit_by_data(ClusterRun::new(0, 8)), Some(Hit { cluster: 7, kinds: table }));
        guard.forget(OverlapChecks::NONE, 7);
        guard.forget(table, 7);
        assert_eq!(guard.hit_by_data(ClusterRun::new(0, 8)), None, "l2 tables are not among the checks");
        assert_eq!(
            guard.hit_by(OverlapChecks::NONE, ClusterRun::new(7, 1)),
            Some(Hit { cluster: 7, kinds: l2 })
        );
        guard.forget(l2, 7);
        assert_eq!(guard.hit_by(OverlapChecks::NONE, ClusterRun::new(0, 8)), None);
        assert_eq!(
            guard.hit_by(OverlapChecks::NONE, ClusterRun::new(0, 9)),
            Some(Hit { cluster: 8, kinds: table })
        );
    }
}
