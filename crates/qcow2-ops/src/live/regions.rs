//! The regions of a disk that still have to be copied, and who copies which.

use super::layer::range;
use super::locks::{Condvar, Mutex, MutexGuard, PoisonError};
use qcow2_core::GuestRange;
use std::ops::RangeInclusive;

/// The shortest region, in bytes.
const MIN_REGION: u64 = 64 << 10;
/// The most regions: 1 MiB of bits. Larger disks have longer regions.
const MAX_REGIONS: u64 = 1 << 23;

/// A bit for each region of a disk.
pub(super) struct Regions {
    /// Bytes of the disk.
    size: u64,
    /// Bytes in a region, a power of two.
    len: u64,
    state: Mutex<State>,
    /// A region is not busy any more.
    given: Condvar,
}

struct State {
    /// A bit for each region: it has to be copied, perhaps once more.
    bits: Vec<u64>,
    /// How many bits are set.
    count: u64,
    /// Regions that somebody copies right now. Nobody else copies them at the same time: what was read
    /// earlier could be written later.
    busy: Vec<u64>,
}

impl Regions {
    /// The regions of a disk of `size` bytes; none has to be copied.
    pub(super) fn none(size: u64) -> Self {
        let len = size.div_ceil(MAX_REGIONS).next_power_of_two().max(MIN_REGION);
        let bits = vec![0; size.div_ceil(len).div_ceil(64) as usize];
        let state = Mutex::new(State { bits, count: 0, busy: Vec::new() });
        Self { size, len, state, given: Condvar::new() }
    }

    /// The regions of a disk of `size` bytes; all have to be copied.
    pub(super) fn all(size: u64) -> Self {
        let regions = Self::none(size);
        regions.mark(range(0, size));
        regions
    }

    /// Bytes in a region; the last one may be shorter.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// How many have to be copied, those that somebody copies right now aside.
    pub(super) fn left(&self) -> u64 {
        self.locked().count
    }

    /// The bytes of a region.
    pub(super) fn bytes(&self, region: u64) -> GuestRange {
        range(region * self.len, self.size.min((region + 1) * self.len))
    }

    /// The regions that `bytes`, which are not empty, touch.
    pub(super) fn touched(&self, bytes: GuestRange) -> RangeInclusive<u64> {
        bytes.start().value() / self.len..=(bytes.end().value() - 1) / self.len
    }

    /// All regions that `changed` touches have to be copied.
    pub(super) fn mark(&self, changed: GuestRange) {
        if changed.is_empty() {
            return;
        }
        let mut state = self.locked();
        for region in self.touched(changed) {
            let word = &mut state.bits[(region / 64) as usize];
            let set = *word & 1 << (region % 64) != 0;
            *word |= 1 << (region % 64);
            state.count += u64::from(!set);
        }
    }

    /// Takes the first region from `first` on that has to be copied and that nobody copies. Who takes one
    /// gives it back.
    pub(super) fn take(&self, first: u64) -> Option<u64> {
        let mut state = self.locked();
        let mut next = first;
        loop {
            let word = *state.bits.get((next / 64) as usize)? >> (next % 64);
            if word == 0 {
                next = (next / 64 + 1) * 64;
                continue;
            }
            next += u64::from(word.trailing_zeros());
            if !state.busy.contains(&next) {
                state.begin(next);
                return Some(next);
            }
            next += 1;
        }
    }

    /// Takes `region`, or waits until whoever copies it has given it back. False if it does not have to be
    /// copied.
    pub(super) fn take_this(&self, region: u64) -> bool {
        let mut state = self.locked();
        while state.busy.contains(&region) {
            state = self.given.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let marked = state.bits[(region / 64) as usize] & 1 << (region % 64) != 0;
        if marked {
            state.begin(region);
        }
        marked
    }

    /// Nobody copies `region` any more.
    pub(super) fn give(&self, region: u64) {
        self.locked().busy.retain(|busy| *busy != region);
        self.given.notify_all();
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn begin(&mut self, region: u64) {
        self.bits[(region / 64) as usize] &= !(1 << (region % 64));
        self.count -= 1;
        self.busy.push(region);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_region_is_taken_once_and_again_if_it_changes() {
        let regions = Regions::all(70 * MIN_REGION + 1);
        assert_eq!((regions.len(), regions.left()), (MIN_REGION, 71));
        assert_eq!(regions.bytes(70), range(70 * MIN_REGION, 70 * MIN_REGION + 1));
        let taken: Vec<u64> = std::iter::from_fn(|| regions.take(0)).collect();
        assert_eq!(taken, (0..71).collect::<Vec<_>>());
        // Two of them change while they are copied: nobody else takes them until that is over.
        regions.mark(range(3 * MIN_REGION, 4 * MIN_REGION + 1));
        regions.mark(range(4 * MIN_REGION, 4 * MIN_REGION));
        assert_eq!((regions.left(), regions.take(0)), (2, None));
        regions.give(4);
        assert_eq!((regions.take(5), regions.take(0), regions.take(0)), (None, Some(4), None));
        regions.give(3);
        assert_eq!((regions.take(0), regions.left()), (Some(3), 0));
        regions.give(70);
        assert!(!regions.take_this(70));
        regions.mark(range(70 * MIN_REGION, 70 * MIN_REGION + 1));
        assert!(regions.take_this(70));
    }

    #[test]
    fn the_regions_of_a_large_disk_are_longer() {
        let regions = Regions::all(1 << 50);
        assert_eq!((regions.len(), regions.left()), (1 << 27, 1 << 23));
        assert_eq!((Regions::all(0).left(), Regions::all(0).take(0)), (0, None));
    }
}
