//! A disk that keeps track of what changes while it is copied into the layer below.

use super::layer::{copy_layer, range};
use crate::error::Result;
use qcow2_core::{DiskExtent, ErrorKind, GuestDisk, GuestOffset, GuestRange, ZeroMode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The shortest region, in bytes.
const MIN_REGION: u64 = 64 << 10;
/// The most regions: 1 MiB of bits. Larger disks have longer regions.
const MAX_REGIONS: u64 = 1 << 23;
/// So few regions may be left for the time when requests are held back.
pub(super) const FEW: u64 = 8;

/// The regions of a disk that still have to be copied.
pub(super) struct Regions {
    /// Bytes in a region, a power of two.
    len: u64,
    state: Mutex<State>,
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
    /// All regions of a disk of `size` bytes.
    pub(super) fn all(size: u64) -> Self {
        let len = size.div_ceil(MAX_REGIONS).next_power_of_two().max(MIN_REGION);
        let count = size.div_ceil(len);
        let mut bits = vec![u64::MAX; count.div_ceil(64) as usize];
        if let Some(last) = bits.last_mut().filter(|_| !count.is_multiple_of(64)) {
            *last = (1 << (count % 64)) - 1;
        }
        Self { len, state: Mutex::new(State { bits, count, busy: Vec::new() }) }
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// How many have to be copied, those that somebody copies right now aside.
    pub(super) fn left(&self) -> u64 {
        self.locked().count
    }

    fn mark(&self, changed: GuestRange) {
        if changed.is_empty() {
            return;
        }
        let mut state = self.locked();
        for region in changed.start().value() / self.len..=(changed.end().value() - 1) / self.len {
            let word = &mut state.bits[(region / 64) as usize];
            let set = *word & 1 << (region % 64) != 0;
            *word |= 1 << (region % 64);
            state.count += u64::from(!set);
        }
    }

    /// Takes the first region from `first` on that has to be copied and that nobody copies.
    fn take(&self, first: u64) -> Option<u64> {
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
                break;
            }
            next += 1;
        }
        state.bits[(next / 64) as usize] &= !(1 << (next % 64));
        state.count -= 1;
        state.busy.push(next);
        Some(next)
    }

    fn give(&self, region: u64) {
        self.locked().busy.retain(|busy| *busy != region);
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The top of a chain while it is copied into `base`. Changes go to the top, and are marked after they are
/// made: whoever copies clears the mark first and reads then, so that a change is either seen or marked.
pub(super) struct Tracked {
    top: Arc<dyn GuestDisk>,
    base: Arc<dyn GuestDisk>,
    regions: Regions,
    /// True if changes copy too, until few regions are left: then the number of those falls however much is
    /// written.
    helping: AtomicBool,
    /// Why a change could not copy.
    failure: Mutex<Option<crate::Error>>,
}

impl Tracked {
    pub(super) fn new(top: Arc<dyn GuestDisk>, base: Arc<dyn GuestDisk>) -> Self {
        let regions = Regions::all(top.size());
        Self { top, base, regions, helping: AtomicBool::new(false), failure: Mutex::default() }
    }

    pub(super) fn regions(&self) -> &Regions {
        &self.regions
    }

    /// From now on every change copies regions before it returns, as long as there are more than [`FEW`].
    pub(super) fn set_helping(&self, helping: bool) {
        self.helping.store(helping, Ordering::SeqCst);
    }

    /// Why a change could not copy; told once.
    pub(super) fn failure(&self) -> Option<crate::Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Copies the first region from `first` on that needs it; returns its number.
    pub(super) fn copy_one(&self, first: u64, buffer: &mut Vec<u8>) -> Result<Option<u64>> {
        let Some(region) = self.regions.take(first) else { return Ok(None) };
        let start = region * self.regions.len;
        let whole = range(start, self.top.size().min(start + self.regions.len));
        let copied = copy_layer(&*self.top, &*self.base, whole, buffer);
        self.regions.give(region);
        if copied.is_err() {
            self.regions.mark(whole);
        }
        copied.map(|()| Some(region))
    }

    fn change(&self, changed: GuestRange, made: qcow2_core::Result<()>) -> qcow2_core::Result<()> {
        // After an error too: a part of it may have been made.
        self.regions.mark(changed);
        self.help();
        made
    }

    /// An error here is no error of the change: the copying ends, and the chain goes on as it is.
    fn help(&self) {
        let mut buffer = Vec::new();
        while self.helping.load(Ordering::SeqCst) && self.regions.left() > FEW {
            match self.copy_one(0, &mut buffer) {
                Ok(Some(_)) => {}
                // Others copy all that is left.
                Ok(None) => return,
                Err(error) => {
                    self.set_helping(false);
                    *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            }
        }
    }
}

/// A range inside the disk; nothing of what is outside can have been changed.
fn inside(offset: GuestOffset, len: usize, size: u64) -> GuestRange {
    let end = offset.value().saturating_add(len as u64).min(size);
    range(offset.value().min(end), end)
}

impl GuestDisk for Tracked {
    fn size(&self) -> u64 {
        self.top.size()
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> qcow2_core::Result<()> {
        self.top.read_at(offset, buf)
    }

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> qcow2_core::Result<()> {
        let made = self.top.write_at(offset, buf);
        self.change(inside(offset, buf.len(), self.size()), made)
    }

    fn write_parts(&self, parts: &[(GuestOffset, &[u8])]) -> qcow2_core::Result<()> {
        let made = self.top.write_parts(parts);
        for (offset, buf) in parts {
            self.regions.mark(inside(*offset, buf.len(), self.size()));
        }
        self.help();
        made
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> qcow2_core::Result<()> {
        let made = self.top.write_zeroes(range, mode);
        self.change(inside(range.start(), range.len() as usize, self.size()), made)
    }

    fn discard(&self, range: GuestRange) -> qcow2_core::Result<()> {
        let made = self.top.discard(range);
        self.change(inside(range.start(), range.len() as usize, self.size()), made)
    }

    fn flush(&self) -> qcow2_core::Result<()> {
        self.top.flush()
    }

    fn extent_at(&self, range: GuestRange) -> qcow2_core::Result<DiskExtent> {
        self.top.extent_at(range)
    }

    fn backing(&self) -> Option<&Arc<dyn GuestDisk>> {
        self.top.backing()
    }

    fn cluster_size(&self) -> u64 {
        self.top.cluster_size()
    }

    fn zero_granularity(&self) -> u64 {
        self.top.zero_granularity()
    }

    fn resize(&self, _size: u64) -> qcow2_core::Result<()> {
        Err(qcow2_core::Error::new(ErrorKind::Busy, "the layers of this disk are being changed already"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_region_is_taken_once_and_again_if_it_changes() {
        let regions = Regions::all(70 * MIN_REGION + 1);
        assert_eq!((regions.len(), regions.left()), (MIN_REGION, 71));
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
    }

    #[test]
    fn the_regions_of_a_large_disk_are_longer() {
        let regions = Regions::all(1 << 50);
        assert_eq!((regions.len(), regions.left()), (1 << 27, 1 << 23));
        assert_eq!((Regions::all(0).left(), Regions::all(0).take(0)), (0, None));
    }
}
