//! Work that is told to stop.

use qcow2_ops::Progress;
use std::sync::atomic::{AtomicU64, Ordering};

/// Asks the work to stop once it has asked this many times whether it should.
#[derive(Debug)]
pub struct StopsAfter(AtomicU64);

impl StopsAfter {
    /// Lets the work ask `left` times.
    pub fn new(left: u64) -> Self {
        Self(AtomicU64::new(left))
    }
}

impl Progress for StopsAfter {
    fn set_total(&self, _bytes: u64) {}

    fn advance(&self, _bytes: u64) {}

    fn should_stop(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err()
    }
}
