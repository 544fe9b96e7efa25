//! Changes of many consecutive refcounts of a block, a word at a time where possible.

use super::RefcountWidth;
use core::ops::Range;

/// The refcounts of one word as lanes of equal width. One addition or subtraction of a whole word changes all
/// of them, as long as no lane overflows into the next.
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

    /// True if all lanes of the word that starts at `slot` are inside `slots`.
    fn is_whole(self, slot: u64, slots: &Range<u64>) -> bool {
        slot.is_multiple_of(self.count) && slot + self.count <= slots.end
    }
}

impl RefcountWidth {
    /// Adds `times` to the refcounts of `slots`. A refcount of 0 is an error: a free cluster has no reference
    /// to share. On failure returns the first slot that cannot be raised and its refcount; the slots before
    /// it are already raised.
    pub fn raise_run(self, words: &mut [u64], slots: Range<u64>, times: u64) -> Result<(), (u64, u64)> {
        let lanes = Lanes::new(self);
        let mut slot = slots.start;
        while slot < slots.end {
            let word = &mut words[self.word_index(slot)];
            // The fast path needs the top bit of every lane clear: then adding one cannot carry into the next
            // lane.
            if times == 1
                && lanes.is_whole(slot, &slots)
                && *word & lanes.highs == 0
                && !lanes.any_zero(*word)
            {
                *word += lanes.ones;
                slot += lanes.count;
                continue;
            }
            let old = self.extract(*word, slot);
            let new = old.checked_add(times).filter(|&new| old > 0 && new <= self.max());
            *word = self.insert(*word, slot, new.ok_or((slot, old))?);
            slot += 1;
        }
        Ok(())
    }

    /// Subtracts `times` from the refcounts of `slots` and calls `freed` for each slot that reaches 0. On
    /// failure returns the first slot whose refcount is too low; the slots before it are already lowered.
    pub fn lower_run(
        self,
        words: &mut [u64],
        slots: Range<u64>,
        times: u64,
        mut freed: impl FnMut(u64),
    ) -> Result<(), u64> {
        let lanes = Lanes::new(self);
        let mut slot = slots.start;
        while slot < slots.end {
            let word = &mut words[self.word_index(slot)];
            // The fast path takes no lane from 1 to 0, so `freed` need not be called for it.
            if times == 1
                && lanes.is_whole(slot, &slots)
                && !lanes.any_zero(*word)
                && !lanes.any_zero(*word - lanes.ones)
            {
                *word -= lanes.ones;
                slot += lanes.count;
                continue;
            }
            let new = self.extract(*word, slot).checked_sub(times).ok_or(slot)?;
            *word = self.insert(*word, slot, new);
            if new == 0 {
                freed(slot);
            }
            slot += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn block(width: RefcountWidth, counts: &[u64]) -> [u64; 8] {
        let mut words = [0; 8];
        for (slot, &count) in (0..).zip(counts) {
            let word = &mut words[width.word_index(slot)];
            *word = width.insert(*word, slot, count.min(width.max()));
        }
        words
    }

    fn counts(width: RefcountWidth, words: &[u64; 8]) -> Vec<u64> {
        (0..8 * u64::from(64 / width.bits()))
            .map(|slot| width.extract(words[width.word_index(slot)], slot))
            .collect()
    }

    proptest! {
        /// The word-wise path and the slot-wise path give the same refcounts and the same errors.
        #[test]
        fn runs_match_single_slot_updates(
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
            let mut words = block(width, &start[..slots as usize]);
            let old = counts(width, &words);
            let changed = |count: u64| match raise {
                true => count.checked_add(times).filter(|&new| count > 0 && new <= width.max()),
                false => count.checked_sub(times),
            };
            let bad = range.clone().find(|&slot| changed(old[slot as usize]).is_none());
            let mut freed = Vec::new();
            let seen = match raise {
                true => width.raise_run(&mut words, range.clone(), times).err().map(|(slot, _)| slot),
                false => width.lower_run(&mut words, range.clone(), times, |slot| freed.push(slot)).err(),
            };
            prop_assert_eq!(seen, bad);
            if bad.is_none() {
                let new = counts(width, &words);
                for slot in 0..slots {
                    let count = old[slot as usize];
                    let wanted = if range.contains(&slot) { changed(count) } else { Some(count) };
                    prop_assert_eq!(Some(new[slot as usize]), wanted);
                }
                let wanted: Vec<u64> =
                    range.filter(|&slot| !raise && new[slot as usize] == 0).collect();
                prop_assert_eq!(freed, wanted);
            }
        }
    }
}
