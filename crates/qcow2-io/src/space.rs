//! Holes, zeroing and preallocation of one file; remembers what its file system does not support.

use crate::sys::{self, Run};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Each operation is tried until the file system refuses it once. `false` (or `None`) means "not supported,
/// use the slow way".
#[derive(Debug, Default)]
pub(crate) struct Space {
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_reserve: AtomicBool,
    no_seek_data: AtomicBool,
    /// A device may refuse a single range for its alignment, so a refusal is not remembered for devices.
    is_device: bool,
    known: Mutex<Known>,
}

/// The data extent seen last. Some file systems (tmpfs among them) scan every page up to the next hole when
/// asked how far data reach, so asking piece by piece would take quadratic time.
#[derive(Debug, Default)]
struct Known {
    data: Range<u64>,
    /// Counts the changes that may have created a hole. Compared before and after an extent is read, so that
    /// an extent read during such a change is not cached.
    changes: u64,
}

impl Space {
    pub(crate) fn new(is_device: bool) -> Self {
        Self { is_device, ..Self::default() }
    }

    /// Punches a hole at `start..end`, inside the file.
    pub(crate) fn punch(&self, file: &File, start: u64, end: u64) -> io::Result<bool> {
        let done = self.attempt(&self.no_punch, || sys::punch_hole(file, start, end - start));
        self.forget_data();
        done
    }

    /// Zeroes `start..end` and keeps it allocated; grows the file to `end` if needed.
    pub(crate) fn zero(&self, file: &File, start: u64, end: u64) -> io::Result<bool> {
        let done = self.attempt(&self.no_zero_range, || sys::zero_range(file, start, end - start));
        self.forget_data();
        done
    }

    /// Reserves space for `start..end`; grows the file to `end` if needed.
    pub(crate) fn reserve(&self, file: &File, start: u64, end: u64) -> io::Result<bool> {
        self.attempt(&self.no_reserve, || sys::reserve(file, start, end - start))
    }

    /// The extent at `offset`. A cached data extent does not show holes that another program punched since.
    pub(crate) fn run_at(&self, file: &File, offset: u64) -> io::Result<Option<Run>> {
        let changes = {
            let known = self.known();
            if known.data.contains(&offset) {
                return Ok(Some(Run::DataUntil(known.data.end)));
            }
            known.changes
        };
        let mut run = None;
        self.attempt(&self.no_seek_data, || {
            run = Some(sys::run_at(file, offset)?);
            Ok(())
        })?;
        if let Some(Run::DataUntil(end)) = run {
            let mut known = self.known();
            // Otherwise a hole may have been made after the extent was read.
            if known.changes == changes {
                known.data = offset..end;
            }
        }
        Ok(run)
    }

    /// Drops the cached extent. Call it after any change that may have created a hole.
    pub(crate) fn forget_data(&self) {
        let mut known = self.known();
        *known = Known { data: 0..0, changes: known.changes + 1 };
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False once both zeroing a range and punching a hole have turned out to be unsupported.
    pub(crate) fn has_fast_zeroes(&self) -> bool {
        !self.no_zero_range.load(Ordering::Relaxed) || !self.no_punch.load(Ordering::Relaxed)
    }

    fn attempt(&self, missing: &AtomicBool, what: impl FnOnce() -> io::Result<()>) -> io::Result<bool> {
        if missing.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match what() {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                missing.store(!self.is_device, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsupported_operations_are_tried_once() {
        let space = Space::new(false);
        let refuse = || Err(io::ErrorKind::Unsupported.into());
        assert!(!space.attempt(&space.no_punch, refuse).unwrap());
        assert!(!space.attempt(&space.no_punch, || unreachable!()).unwrap());
        let device = Space::new(true);
        assert!(!device.attempt(&device.no_punch, refuse).unwrap());
        assert!(device.attempt(&device.no_punch, || Ok(())).unwrap());
    }

    #[test]
    fn other_errors_are_returned() {
        let space = Space::new(false);
        let full = || Err(io::ErrorKind::StorageFull.into());
        assert_eq!(space.attempt(&space.no_reserve, full).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(space.attempt(&space.no_reserve, || Ok(())).unwrap());
    }
}
