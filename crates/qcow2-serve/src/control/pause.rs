//! How long requests are held back while layers change.

use qcow2_core::HoldObserver;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// The pauses of a disk.
#[derive(Debug, Default)]
pub struct Pauses {
    begun: Mutex<Option<Instant>>,
    count: AtomicU64,
    last: AtomicU64,
    longest: AtomicU64,
}

impl Pauses {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// The last one in nanoseconds; 0 if there was none.
    pub fn last(&self) -> u64 {
        self.last.load(Ordering::Acquire)
    }

    /// The longest one in nanoseconds.
    pub fn longest(&self) -> u64 {
        self.longest.load(Ordering::Acquire)
    }
}

impl HoldObserver for Pauses {
    fn holding(&self) {
        *self.begun.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn released(&self) {
        let begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(begun) = begun else { return };
        let pause = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last.store(pause, Ordering::Release);
        self.longest.fetch_max(pause, Ordering::AcqRel);
        self.count.fetch_add(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_lasts_from_holding_to_release() {
        let pauses = Pauses::default();
        pauses.released();
        assert_eq!((pauses.count(), pauses.longest()), (0, 0));
        pauses.holding();
        std::thread::sleep(std::time::Duration::from_millis(2));
        pauses.released();
        assert!(pauses.last() >= 2_000_000 && pauses.longest() == pauses.last());
        let longest = pauses.longest();
        pauses.holding();
        pauses.released();
        assert_eq!((pauses.count(), pauses.longest().max(longest)), (2, pauses.longest()));
    }
}
