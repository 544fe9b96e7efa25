//! Refcount blocks in memory while many of their counts change.
//!
//! Invariant I1: no count goes below the number of references, because each drop stands for one that is gone.

use super::uncounted;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::Meta;
use crate::meta::alloc::Refcounts;
use crate::meta::overlap::OverlapChecks;
use crate::meta::page::be_word;
use ::alloc::format;
use ::alloc::vec;
use ::alloc::vec::Vec;
use core::ops::Range;
use qcow2_format::refcount::{RefcountWidth, decode_table_entry};
use qcow2_format::{Geometry, HostOffset};

/// Bytes of refcount blocks in memory at most (but always one block): enough for a disk of 1 TiB as it is made by
/// default.
const WINDOW_BYTES: u64 = 48 << 20;

/// How the refcount table is cut into windows.
pub(super) struct Spans {
    blocks_per_window: u64,
    clusters_per_window: u64,
    table_entries: u64,
}

impl Spans {
    pub(super) fn new(geometry: &Geometry, table_entries: u64) -> Self {
        let blocks_per_window = (WINDOW_BYTES / geometry.cluster_size()).max(1);
        let clusters_per_window = blocks_per_window * geometry.refcount_block_entries();
        Self { blocks_per_window, clusters_per_window, table_entries }
    }

    /// How many windows there are.
    pub(super) fn count(&self) -> u64 {
        self.table_entries.div_ceil(self.blocks_per_window)
    }

    /// The window that counts `cluster`.
    pub(super) fn of(&self, cluster: u64) -> u64 {
        cluster / self.clusters_per_window
    }

    /// Window `number`, no block of which has been read yet.
    pub(super) fn window<'a>(&self, meta: &'a Meta, refcounts: &'a Refcounts, number: u64) -> Window<'a> {
        let first_block = number * self.blocks_per_window;
        let len = self.table_entries.saturating_sub(first_block).min(self.blocks_per_window);
        // With one window nothing lies outside, so that a cluster past the table is noticed.
        let clusters = match self.count() {
            0 | 1 => 0..u64::MAX,
            _ => number * self.clusters_per_window..(number + 1) * self.clusters_per_window,
        };
        Window {
            meta,
            table: &refcounts.table,
            per_block: meta.geometry.refcount_block_entries(),
            width: meta.geometry.refcount_width(),
            clusters,
            first_block,
            blocks: (0..len).map(|_| None).collect(),
        }
    }
}

/// The counts of a range of clusters.
pub(super) struct Window<'a> {
    meta: &'a Meta,
    table: &'a [u64],
    per_block: u64,
    width: RefcountWidth,
    /// The clusters that it is responsible for.
    clusters: Range<u64>,
    first_block: u64,
    blocks: Vec<Option<Block>>,
}

/// One refcount block.
struct Block {
    offset: HostOffset,
    words: Vec<u64>,
    dirty: bool,
    /// A bit for each cluster whose count has become zero; empty while there is none.
    freed: Vec<u64>,
}

impl Window<'_> {
    /// Adds `times` to the counts of those of the `count` clusters from `first` on that are in the window.
    pub(super) fn raise(&mut self, first: u64, count: u64, times: u64) -> Result<()> {
        let width = self.width;
        self.change(first, count, |block, slots, base| {
            block.raise(width, slots, times).map_err(|(slot, old)| match old {
                0 => uncounted(base + slot),
                _ => Error::new(
                    ErrorKind::NoSpace,
                    format!(
                        "host cluster {}: refcount {old} cannot be raised, the largest is {}",
                        base + slot,
                        width.max()
                    ),
                ),
            })
        })
    }

    /// Takes `times` from those counts.
    pub(super) fn lower(&mut self, first: u64, count: u64, times: u64) -> Result<()> {
        let width = self.width;
        self.change(first, count, |block, slots, base| {
            block.lower(width, slots, times).map_err(|slot| uncounted(base + slot))
        })
    }

    fn change(
        &mut self,
        first: u64,
        count: u64,
        mut change: impl FnMut(&mut Block, Range<u64>, u64) -> Result<()>,
    ) -> Result<()> {
        let (mut at, end) = (first.max(self.clusters.start), (first + count).min(self.clusters.end));
        while at < end {
            let base = at - at % self.per_block;
            let stop = end.min(base + self.per_block);
            change(self.block(at)?, at - base..stop - base, base)?;
            at = stop;
        }
        Ok(())
    }

    /// Whether the window is responsible for `cluster`.
    pub(super) fn holds(&self, cluster: u64) -> bool {
        self.clusters.contains(&cluster)
    }

    /// The count of a cluster that the window [holds](Self::holds).
    pub(super) fn count(&mut self, cluster: u64) -> Result<u64> {
        let (width, slot) = (self.width, cluster % self.per_block);
        Ok(width.extract(self.block(cluster)?.words[width.word_index(slot)], slot))
    }

    /// Visits those of the `count` clusters from `first` on that the window holds and whose count says otherwise than
    /// `copied`, as distances from `first`. What no block counts is passed over: by now the change that this is the end of
    /// has happened, and must not fail because of something else that is damaged.
    pub(super) fn mismatches(
        &mut self,
        first: u64,
        count: u64,
        copied: bool,
        visit: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let (mut at, end) = (first.max(self.clusters.start), (first + count).min(self.clusters.end));
        let (width, per_block) = (self.width, self.per_block);
        while at < end {
            let base = at - at % per_block;
            let stop = end.min(base + per_block);
            let words = match self.block(at) {
                Ok(block) => &block.words,
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    at = stop;
                    continue;
                }
                Err(error) => return Err(error),
            };
            for cluster in at..stop {
                let slot = cluster - base;
                if (width.extract(words[width.word_index(slot)], slot) == 1) != copied {
                    visit(cluster - first);
                }
            }
            at = stop;
        }
        Ok(())
    }

    /// The block that counts `cluster`, read at the first use.
    fn block(&mut self, cluster: u64) -> Result<&mut Block> {
        let index = cluster / self.per_block;
        let place = index
            .checked_sub(self.first_block)
            .and_then(|at| self.blocks.get_mut(at as usize))
            .ok_or_else(|| uncounted(cluster))?;
        if place.is_none() {
            let raw = self.table.get(index as usize).copied().unwrap_or(0);
            let offset = decode_table_entry(raw, &self.meta.geometry)
                .map_err(|e| {
                    Error::corrupt(format!("refcount table entry {index} is damaged")).with_source(e)
                })?
                .ok_or_else(|| uncounted(cluster))?;
            let mut bytes = vec![0; self.meta.geometry.cluster_size() as usize];
            self.meta.storage.read_padded(offset, &mut bytes)?;
            let words = bytes.chunks_exact(8).map(be_word).collect();
            *place = Some(Block { offset, words, dirty: false, freed: Vec::new() });
        }
        place.as_mut().ok_or_else(|| uncounted(cluster))
    }

    /// Writes the changed blocks, in host order.
    pub(super) fn store(&self) -> Result<()> {
        let mut changed: Vec<&Block> = self.blocks.iter().flatten().filter(|block| block.dirty).collect();
        changed.sort_by_key(|block| block.offset);
        let mut bytes = Vec::with_capacity(self.meta.geometry.cluster_size() as usize);
        for block in changed {
            bytes.clear();
            bytes.extend(block.words.iter().flat_map(|word| word.to_be_bytes()));
            self.meta.write_table(OverlapChecks::REFCOUNT_BLOCK, block.offset, &bytes)?;
        }
        Ok(())
    }

    /// The runs of clusters whose counts have become zero, in order.
    pub(super) fn for_each_freed(&self, visit: &mut dyn FnMut(u64, u64)) {
        let mut run: Option<Range<u64>> = None;
        for (index, block) in (self.first_block..).zip(&self.blocks) {
            let Some(block) = block else { continue };
            for slot in block.freed_slots() {
                let cluster = index * self.per_block + slot;
                match &mut run {
                    Some(run) if run.end == cluster => run.end += 1,
                    other => {
                        if let Some(done) = other.replace(cluster..cluster + 1) {
                            visit(done.start, done.end - done.start);
                        }
                    }
                }
            }
        }
        if let Some(run) = run {
            visit(run.start, run.end - run.start);
        }
    }
}

/// Counts of one width side by side in a word. Sums and differences of whole words work on all of them at once as
/// long as none overflows.
#[derive(Clone, Copy)]
struct Lanes {
    count: u64,
    /// One in every lane.
    ones: u64,
    /// The highest bit of every lane.
    highs: u64,
}

impl Lanes {
    fn new(width: RefcountWidth) -> Self {
        let ones = u64::MAX / width.max();
        Self { count: u64::from(64 / width.bits()), ones, highs: ones << (width.bits() - 1) }
    }

    fn any_zero(self, word: u64) -> bool {
        word.wrapping_sub(self.ones) & !word & self.highs != 0
    }

    /// Whether the word of `slot` lies in `slots` as a whole.
    fn is_whole(self, slot: u64, slots: &Range<u64>) -> bool {
        slot.is_multiple_of(self.count) && slot + self.count <= slots.end
    }
}

impl Block {
    /// The error is the slot whose count cannot be raised, and that count.
    fn raise(&mut self, width: RefcountWidth, slots: Range<u64>, times: u64) -> Result<(), (u64, u64)> {
        let lanes = Lanes::new(width);
        self.dirty = true;
        let mut slot = slots.start;
        while slot < slots.end {
            let word = &mut self.words[width.word_index(slot)];
            if times == 1
                && lanes.is_whole(slot, &slots)
                && *word & lanes.highs == 0
                && !lanes.any_zero(*word)
            {
                *word += lanes.ones;
                slot += lanes.count;
                continue;
            }
            let old = width.extract(*word, slot);
            let new = old.checked_add(times).filter(|&new| old > 0 && new <= width.max());
            *word = width.insert(*word, slot, new.ok_or((slot, old))?);
            slot += 1;
        }
        Ok(())
    }

    /// The error is the slot whose count is too low.
    fn lower(&mut self, width: RefcountWidth, slots: Range<u64>, times: u64) -> Result<(), u64> {
        let lanes = Lanes::new(width);
        self.dirty = true;
        let mut slot = slots.start;
        while slot < slots.end {
            let word = &mut self.words[width.word_index(slot)];
            if times == 1
                && lanes.is_whole(slot, &slots)
                && !lanes.any_zero(*word)
                && !lanes.any_zero(*word - lanes.ones)
            {
                *word -= lanes.ones;
                slot += lanes.count;
                continue;
            }
            let new = width.extract(*word, slot).checked_sub(times).ok_or(slot)?;
            *word = width.insert(*word, slot, new);
            if new == 0 {
                self.note_freed(slot, width);
            }
            slot += 1;
        }
        Ok(())
    }

    fn note_freed(&mut self, slot: u64, width: RefcountWidth) {
        if self.freed.is_empty() {
            let slots = self.words.len() as u64 * u64::from(64 / width.bits());
            self.freed = vec![0; slots.div_ceil(64) as usize];
        }
        self.freed[(slot / 64) as usize] |= 1 << (slot % 64);
    }

    fn freed_slots(&self) -> impl Iterator<Item = u64> + '_ {
        (0u64..).zip(&self.freed).filter(|(_, word)| **word != 0).flat_map(|(index, &word)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index * 64 + bit)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(width: RefcountWidth, counts: &[u64]) -> Block {
        let mut words = vec![0; 8];
        for (slot, &count) in (0..).zip(counts) {
            let word = &mut words[width.word_index(slot)];
            *word = width.insert(*word, slot, count.min(width.max()));
        }
        Block { offset: HostOffset::new(0), words, dirty: false, freed: Vec::new() }
    }

    fn counts(width: RefcountWidth, block: &Block) -> Vec<u64> {
        let slots = block.words.len() as u64 * u64::from(64 / width.bits());
        (0..slots).map(|slot| width.extract(block.words[width.word_index(slot)], slot)).collect()
    }

    proptest! {
        /// Whole words at a time or one by one: the same counts, and the same refusals.
        #[test]
        fn runs_are_as_good_as_single_counts(
            order in 0..7u32,
            start in proptest::collection::vec(0..4u64, 512),
            from in 0..512u64,
            len in 0..512u64,
            times in 1..3u64,
            raise in any::<bool>(),
        ) {
            let width = RefcountWidth::from_order(order).unwrap();
            let slots = 512u64 >> order;
            let range = from % slots..(from % slots + len).min(slots);
            let before = block(width, &start[..slots as usize]);
            let old = counts(width, &before);
            let mut after = block(width, &start[..slots as usize]);
            let changed = |count: u64| match raise {
                true => count.checked_add(times).filter(|&new| count > 0 && new <= width.max()),
                false => count.checked_sub(times),
            };
            let bad = range.clone().find(|&slot| changed(old[slot as usize]).is_none());
            let seen = match raise {
                true => after.raise(width, range.clone(), times).err().map(|(slot, _)| slot),
                false => after.lower(width, range.clone(), times).err(),
            };
            prop_assert_eq!(seen, bad);
            if bad.is_none() {
                let new = counts(width, &after);
                for slot in 0..slots {
                    let wanted = if range.contains(&slot) { changed(old[slot as usize]) } else { Some(old[slot as usize]) };
                    prop_assert_eq!(Some(new[slot as usize]), wanted);
                }
                let freed: Vec<u64> = after.freed_slots().collect();
                let wanted: Vec<u64> =
                    range.filter(|&slot| !raise && new[slot as usize] == 0).collect();
                prop_assert_eq!(freed, wanted);
            }
        }
    }
}
