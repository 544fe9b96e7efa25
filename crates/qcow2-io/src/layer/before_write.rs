//! A disk whose old content is kept elsewhere before it changes.

use qcow2_core::chain::reads_zero;
use qcow2_core::{GuestDisk, GuestOffset, GuestRange, Result, ZeroMode, forward_guest_disk};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Where old content goes, and how.
#[derive(Clone)]
#[non_exhaustive]
pub struct BeforeWrite {
    /// The disk that gets it. Whoever uses it has opened it for writing.
    pub target: Arc<dyn GuestDisk>,
    /// What is copied at once, in bytes, a power of two. It is 64 KiB at least, and a cluster of the target.
    pub min_cluster_size: u64,
    /// Runs of guest bytes, as pairs of start and length in ascending order, outside of which nothing is
    /// kept; `None`: all is.
    pub only: Option<Vec<(u64, u64)>>,
    /// Whether a write goes on when its old content could not be kept; nothing is kept from then on.
    pub may_break: bool,
}

impl BeforeWrite {
    /// Everything is kept in `target`; a write whose old content cannot be kept fails.
    pub fn new(target: Arc<dyn GuestDisk>) -> Self {
        Self { target, min_cluster_size: 0, only: None, may_break: false }
    }
}

/// Wraps a disk: before a cluster changes for the first time, by a write, by zeroes or by a discard, its old
/// content is written to the target at the same offset, zeroes as zeroes. Dropping it closes the target, if
/// that is an image; the copies are durable after a flush.
pub struct CopyBeforeWrite {
    inner: Arc<dyn GuestDisk>,
    rules: BeforeWrite,
    step: u64,
    /// Held while old content is copied.
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// The clusters whose old content is kept: 64 to a word, words without any left out.
    done: BTreeMap<u64, u64>,
    is_broken: bool,
}

impl CopyBeforeWrite {
    /// Wraps `inner`, whose old content goes where `rules` say.
    pub fn new(inner: Arc<dyn GuestDisk>, rules: BeforeWrite) -> Self {
        let step = DEFAULT_STEP.max(rules.target.cluster_size()).max(rules.min_cluster_size);
        Self { inner, rules, step, kept: Mutex::default() }
    }

    /// Whether any byte of `cluster` is to be kept.
    fn is_wanted(&self, cluster: u64) -> bool {
        let Some(only) = &self.rules.only else { return true };
        let (start, end) = (cluster * self.step, (cluster + 1).saturating_mul(self.step));
        let next = only.partition_point(|&(run, len)| run.saturating_add(len) <= start);
        only.get(next).is_some_and(|&(run, _)| run < end)
    }

    /// Keeps the old content of every cluster that `range` touches.
    fn keep(&self, range: GuestRange) -> Result<()> {
        let inside = range.end().value().min(self.inner.size());
        if range.start().value() >= inside {
            return Ok(());
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        for cluster in clusters(GuestRange::between(range.start(), GuestOffset::new(inside)), self.step) {
            if kept.is_broken || kept.is_done(cluster) || !self.is_wanted(cluster) {
                continue;
            }
            match self.copy(cluster) {
                Ok(()) => kept.mark(cluster),
                Err(_) if self.rules.may_break => kept.is_broken = true,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn copy(&self, cluster: u64) -> Result<()> {
        let start = cluster * self.step;
        let end = start.saturating_add(self.step).min(self.inner.size());
        let range = GuestRange::between(GuestOffset::new(start), GuestOffset::new(end));
        if reads_zero(&*self.inner, range)? {
            return self.rules.target.write_zeroes(range, ZeroMode::MayUnmap);
        }
        let mut bytes = vec![0; range.len() as usize];
        self.inner.read_at(range.start(), &mut bytes)?;
        self.rules.target.write_at(range.start(), &bytes)
    }
}

impl Kept {
    fn is_done(&self, cluster: u64) -> bool {
        self.done.get(&(cluster / 64)).is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }

    fn mark(&mut self, cluster: u64) {
        *self.done.entry(cluster / 64).or_default() |= 1 << (cluster % 64);
    }
}

/// The numbers of the clusters of `step` bytes that `range` touches.
fn clusters(range: GuestRange, step: u64) -> impl Iterator<Item = u64> {
    range.start().value() / step..range.end().value().div_ceil(step)
}

impl GuestDisk for CopyBeforeWrite {
    forward_guest_disk!(inner: size read_at extent_at backing cluster_size zero_granularity resize);

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        // A write that passes the end is refused below.
        if let Some(range) = GuestRange::new(offset, buf.len() as u64) {
            self.keep(range)?;
        }
        self.inner.write_at(offset, buf)
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        self.keep(range)?;
        self.inner.write_zeroes(range, mode)
    }

    fn discard(&self, range: GuestRange) -> Result<()> {
        self.keep(range)?;
        self.inner.discard(range)
    }

    /// The old content first: it cannot be had again.
    fn flush(&self) -> Result<()> {
        self.rules.target.flush()?;
        self.inner.flush()
    }

    fn filtered(&self) -> Option<&Arc<dyn GuestDisk>> {
        Some(&self.inner)
    }
}

impl Drop for CopyBeforeWrite {
    fn drop(&mut self) {
        // Whoever wrote through it has flushed what matters; this leaves the image as tidy as can be.
        if let Some(image) = self.rules.target.as_image() {
            let _ = image.close();
        }
    }
}

/// Bytes that are copied at once where neither the target nor the options ask for more.
const DEFAULT_STEP: u64 = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LimitStorage, MemoryStorage};
    use qcow2_core::{ExtentState, RawDisk, Storage};

    const STEP: u64 = DEFAULT_STEP;

    fn raw(bytes: Vec<u8>) -> Arc<dyn GuestDisk> {
        Arc::new(RawDisk::new(Arc::new(MemoryStorage::from(bytes)), true).unwrap())
    }

    fn byte(disk: &dyn GuestDisk, offset: u64) -> u8 {
        let mut byte = [0];
        disk.read_at(GuestOffset::new(offset), &mut byte).unwrap();
        byte[0]
    }

    fn range(start: u64, end: u64) -> GuestRange {
        GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
    }

    #[test]
    fn the_first_change_of_a_cluster_keeps_it() {
        let size = 4 * STEP as usize + 100;
        let target = raw(vec![0; size]);
        let disk = CopyBeforeWrite::new(raw(vec![1; size]), BeforeWrite::new(target.clone()));
        disk.write_at(GuestOffset::new(STEP - 1), &[2; 2]).unwrap();
        disk.write_at(GuestOffset::new(5), &[3]).unwrap();
        disk.write_zeroes(range(4 * STEP, 4 * STEP + 100), ZeroMode::MayUnmap).unwrap();
        disk.discard(range(2 * STEP, 2 * STEP + 1)).unwrap();
        assert!(disk.write_at(GuestOffset::new(size as u64), &[1]).is_err());
        let kept = [(0, 1), (5, 1), (2 * STEP - 1, 1), (2 * STEP, 1), (3 * STEP, 0), (4 * STEP + 99, 1)];
        for (offset, expected) in kept {
            assert_eq!(byte(&*target, offset), expected, "{offset}");
        }
        assert_eq!((byte(&disk, 5), byte(&disk, STEP), byte(&disk, STEP + 1)), (3, 2, 1));
    }

    #[test]
    fn only_given_runs_are_kept() {
        let size = 4 * STEP as usize;
        let target = raw(vec![0; size]);
        let mut rules = BeforeWrite::new(target.clone());
        rules.only = Some(vec![(STEP, 1), (3 * STEP - 1, 2)]);
        let disk = CopyBeforeWrite::new(raw(vec![1; size]), rules);
        disk.write_at(GuestOffset::new(0), &vec![2; size]).unwrap();
        assert_eq!([0, 1, 2, 3].map(|cluster| byte(&*target, cluster * STEP)), [0, 1, 1, 1]);
    }

    #[test]
    fn a_target_that_fails_stops_the_write_or_is_given_up() {
        for may_break in [false, true] {
            let full: Arc<dyn Storage> = Arc::new(LimitStorage::new(Arc::new(MemoryStorage::new()), 10));
            let mut rules = BeforeWrite::new(Arc::new(RawDisk::new(full, true).unwrap()));
            rules.may_break = may_break;
            let disk = CopyBeforeWrite::new(raw(vec![1; 100]), rules);
            assert_eq!(disk.write_at(GuestOffset::new(0), &[2]).is_ok(), may_break);
            assert_eq!(byte(&disk, 0), if may_break { 2 } else { 1 });
        }
    }

    #[test]
    fn holes_are_kept_as_zeroes() {
        let source: Arc<dyn Storage> = Arc::new(MemoryStorage::with_len(2 * STEP));
        let target: Arc<dyn Storage> = Arc::new(MemoryStorage::from(vec![9; 2 * STEP as usize]));
        let target: Arc<dyn GuestDisk> = Arc::new(RawDisk::new(target, true).unwrap());
        let disk = CopyBeforeWrite::new(
            Arc::new(RawDisk::new(source, true).unwrap()),
            BeforeWrite::new(target.clone()),
        );
        disk.write_at(GuestOffset::new(0), &[1]).unwrap();
        assert_eq!((byte(&*target, 0), byte(&*target, STEP)), (0, 9));
        let zero = target.extent_at(range(0, STEP)).unwrap();
        assert!(matches!(zero.state, ExtentState::Zero { .. }));
    }
}
