//! The refcounts stored in the image.

use super::{Owner, ProblemKind, Walk};
use crate::pages::PageBytes;
use qcow2_format::refcount::{decode_table_entry, reserved_bits};
use qcow2_format::{Geometry, HostCluster};
use std::collections::BTreeMap;

/// The refcounts of an image; each block is read once.
pub(super) struct Refcounts {
    geometry: Geometry,
    /// The words of each refcount block, by refcount table index.
    blocks: BTreeMap<u64, Vec<u64>>,
}

impl Refcounts {
    /// The stored refcount of host cluster `index`; 0 without a refcount block.
    pub(super) fn of(&self, index: u64) -> u64 {
        let cluster = HostCluster::new(index);
        let Some(words) = self.blocks.get(&self.geometry.refcount_table_index(cluster)) else { return 0 };
        let (width, slot) = (self.geometry.refcount_width(), self.geometry.refcount_block_slot(cluster));
        width.extract(words[width.word_index(slot)], slot)
    }

    /// How many clusters from `first` on are covered by refcount blocks.
    pub(super) fn counted_from(&self, first: u64) -> u64 {
        let entries = self.geometry.refcount_block_entries();
        let width = self.geometry.refcount_width();
        let per_word = 64 / u64::from(width.bits());
        let mut counted = 0;
        for (&table_index, words) in self.blocks.range(first / entries..) {
            for (word_index, &word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
                let slots = word_index as u64 * per_word..(word_index as u64 + 1) * per_word;
                let beyond = slots.filter(|slot| table_index * entries + slot >= first);
                counted += beyond.filter(|&slot| width.extract(word, slot) != 0).count() as u64;
            }
        }
        counted
    }
}

impl Walk<'_> {
    /// Reads the refcount table and its blocks and records the clusters they use.
    pub(super) fn refcounts(&mut self) -> Refcounts {
        let geometry = self.format().geometry;
        let mut counts = Refcounts { geometry, blocks: BTreeMap::new() };
        let (offset, clusters) = (self.header.refcount_table_offset, self.header.refcount_table_clusters);
        if !self.own(offset, clusters, Owner::RefcountTable) {
            return counts;
        }
        let table = self.words(offset, clusters * geometry.cluster_size() / 8);
        for (index, raw) in table.into_iter().enumerate().filter(|(_, raw)| *raw != 0) {
            let place = format!("refcount table entry {index}");
            if reserved_bits(raw) != 0 {
                self.audit.problem(ProblemKind::Broken, format!("{place}: reserved bits in {raw:#x}"));
            }
            match decode_table_entry(raw, &geometry) {
                Ok(Some(block)) => {
                    if self.own(block.value(), 1, Owner::RefcountBlock) {
                        counts.blocks.insert(index as u64, block_words(self.image, block.value(), &geometry));
                    }
                }
                Ok(None) => {}
                Err(error) => self.audit.problem(ProblemKind::Broken, format!("{place}: {error}")),
            }
        }
        counts
    }
}

/// The words of a refcount block without trailing zeroes; a read past the end gives 0.
fn block_words(image: &PageBytes, offset: u64, geometry: &Geometry) -> Vec<u64> {
    super::read_words(image, offset, geometry.cluster_size() / 8)
}
