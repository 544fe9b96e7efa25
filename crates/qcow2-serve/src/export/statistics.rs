//! What clients have done with an export.

use std::sync::atomic::{AtomicU64, Ordering};

/// Requests of one kind.
#[derive(Debug, Default)]
pub struct Counter {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Counter {
    pub(super) fn count(&self, bytes: u64) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many there were.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Bytes of their ranges.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// Requests that reached the disk, by kind. Pieces of a long request count as one each.
#[derive(Debug, Default)]
pub struct Statistics {
    /// Reads.
    pub reads: Counter,
    /// Writes.
    pub writes: Counter,
    /// Flushes, those of durable writes too.
    pub flushes: Counter,
    /// Trims.
    pub trims: Counter,
    /// Zeroed ranges.
    pub zeroes: Counter,
}
