//! A set of host clusters in bounded memory.

use std::collections::BTreeMap;

/// Pages of a set at most. Origin: ours; 128 MiB, which is 2^30 clusters: 64 TiB in clusters of 64 KiB.
const MAX_PAGES: usize = 1 << 15;
const PAGE_CLUSTERS: u64 = 1 << 15;
const PAGE_WORDS: usize = (PAGE_CLUSTERS / 64) as usize;

/// A set of clusters. A full one forgets what it is given, so a table may be looked at twice.
#[derive(Default)]
pub(super) struct Marks {
    pages: BTreeMap<u64, Box<[u64; PAGE_WORDS]>>,
}

impl Marks {
    /// Adds a cluster. Returns true if it is new.
    pub(super) fn insert(&mut self, cluster: u64) -> bool {
        let number = cluster / PAGE_CLUSTERS;
        if self.pages.len() >= MAX_PAGES && !self.pages.contains_key(&number) {
            return true;
        }
        let page = self.pages.entry(number).or_insert_with(|| Box::new([0; PAGE_WORDS]));
        let (word, bit) = place(cluster);
        let new = page[word] >> bit & 1 == 0;
        page[word] |= 1 << bit;
        new
    }

    pub(super) fn insert_each(&mut self, clusters: impl Iterator<Item = u64>) {
        clusters.for_each(|cluster| {
            self.insert(cluster);
        });
    }

    pub(super) fn contains(&self, cluster: u64) -> bool {
        let (word, bit) = place(cluster);
        self.pages.get(&(cluster / PAGE_CLUSTERS)).is_some_and(|page| page[word] >> bit & 1 == 1)
    }
}

fn place(cluster: u64) -> (usize, u64) {
    ((cluster % PAGE_CLUSTERS / 64) as usize, cluster % 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_it_is_given() {
        let mut marks = Marks::default();
        for cluster in [0, 63, 64, PAGE_CLUSTERS - 1, PAGE_CLUSTERS, u64::MAX] {
            assert!(!marks.contains(cluster) && marks.insert(cluster), "{cluster}");
            assert!(marks.contains(cluster) && !marks.insert(cluster), "{cluster}");
        }
        marks.insert_each(100..200);
        assert!((100..200).all(|cluster| marks.contains(cluster)) && !marks.contains(200));
    }
}
