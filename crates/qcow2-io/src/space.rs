//! Holes, zeroes and reserved space of one file, with a memory for what its file system cannot do.

use crate::sys::{self, Run};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// Each operation is tried until the file system refuses it once; `false` (or `None`) means "do it the slower way".
#[derive(Debug, Default)]
pub(crate) struct Space {
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_reserve: AtomicBool,
    no_seek_data: AtomicBool,
    /// A device refuses single ranges, for their alignment: that says nothing about the next one.
    is_device: bool,
}

impl Space {
    pub(crate) fn new(is_device: bool) -> Self {
        Self { is_device, ..Self::default() }
    }

    /// Turns `start..end` (inside the file) into a hole.
    pub(crate) fn punch(&self, file: &File, start: u64, end: u64) -> io::Result<bool> {
        self.attempt(&self.no_punch, || sys::punch_hole(file, start, end - start))
    }

    /// Makes `start..end` zeroes that keep their space; a file grows to `end`.
    pub(crate) fn zero(&self, file: &File, start: u64, end: u64) -> io::Result<bool> {
        self.attempt(&self.no_zero_range, || sys::zero_range(file, start, end - start))
    }

    /// Reserves space for `start..end`; a file grows to `end`.
    pub(crate) fn reserve(&self, file: &File, start: u64, end: u64) -> io::Result<bool> {
        self.attempt(&self.no_reserve, || sys::reserve(file, start, end - start))
    }

    /// What the file holds from `offset` on.
    pub(crate) fn run_at(&self, file: &File, offset: u64) -> io::Result<Option<Run>> {
        let mut run = None;
        self.attempt(&self.no_seek_data, || {
            run = Some(sys::run_at(file, offset)?);
            Ok(())
        })?;
        Ok(run)
    }

    /// Whether zeroes are known to cost as much as data.
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
    fn what_a_file_system_refuses_is_asked_once() {
        let space = Space::new(false);
        let refuse = || Err(io::ErrorKind::Unsupported.into());
        assert!(!space.attempt(&space.no_punch, refuse).unwrap());
        assert!(!space.attempt(&space.no_punch, || unreachable!()).unwrap());
        let device = Space::new(true);
        assert!(!device.attempt(&device.no_punch, refuse).unwrap());
        assert!(device.attempt(&device.no_punch, || Ok(())).unwrap());
    }

    #[test]
    fn other_errors_stay_errors() {
        let space = Space::new(false);
        let full = || Err(io::ErrorKind::StorageFull.into());
        assert_eq!(space.attempt(&space.no_reserve, full).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(space.attempt(&space.no_reserve, || Ok(())).unwrap());
    }
}
