//! What clients have done with an export.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Latencies are counted by their magnitude: four steps for each power of two nanoseconds, so that a told
/// latency is at most a quarter too large.
const STEPS: usize = 4;
const CLASSES: usize = 40 * STEPS;

/// Requests of one kind.
#[derive(Debug)]
pub struct Counter {
    bytes: AtomicU64,
    latencies: Box<[AtomicU64]>,
}

impl Default for Counter {
    fn default() -> Self {
        Self { bytes: AtomicU64::new(0), latencies: (0..CLASSES).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl Counter {
    /// Runs a request of `bytes` bytes and counts it, with the time that it takes.
    pub(super) fn time<T>(&self, bytes: u64, request: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let done = request();
        self.add(bytes, begin.elapsed());
        done
    }

    /// Counts a request of `bytes` bytes that took so long.
    pub fn add(&self, bytes: u64, latency: Duration) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.latencies[class_of(latency)].fetch_add(1, Ordering::Relaxed);
    }

    /// How many there were.
    pub fn requests(&self) -> u64 {
        self.latencies.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// Bytes of their ranges.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// A time in nanoseconds within which `share` of the requests (0 to 1) ended, at most a quarter too
    /// large; 0 if there were none.
    pub fn latency(&self, share: f64) -> u64 {
        let counts: Vec<u64> = self.latencies.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let wanted = (counts.iter().sum::<u64>() as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (class, count) in counts.into_iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return end_of(class);
            }
        }
        0
    }
}

/// The class of a latency.
fn class_of(latency: Duration) -> usize {
    let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX).max(STEPS as u64);
    let magnitude = nanoseconds.ilog2();
    // The two bits below the highest one.
    let step = (nanoseconds >> (magnitude - 2)) as usize & (STEPS - 1);
    (magnitude as usize * STEPS + step).min(CLASSES - 1)
}

/// Nanoseconds that all latencies of a class are below.
fn end_of(class: usize) -> u64 {
    let (magnitude, step) = (class / STEPS, class % STEPS);
    ((STEPS + step + 1) as u64) << magnitude.saturating_sub(2)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latency_is_told_at_most_a_quarter_too_large() {
        for nanoseconds in [4_u64, 5, 7, 8, 1000, 1023, 1024, 65_537, 3_000_000, 999_999_999] {
            let told = end_of(class_of(Duration::from_nanos(nanoseconds)));
            assert!(told > nanoseconds && told <= nanoseconds + nanoseconds / 4 + 1, "{nanoseconds}: {told}");
        }
        class_of(Duration::MAX);
        class_of(Duration::ZERO);
    }

    #[test]
    fn shares_of_requests() {
        let counter = Counter::default();
        assert_eq!(counter.latency(0.5), 0);
        for _ in 0..99 {
            counter.latencies[class_of(Duration::from_micros(1))].fetch_add(1, Ordering::Relaxed);
        }
        counter.latencies[class_of(Duration::from_millis(1))].fetch_add(1, Ordering::Relaxed);
        assert_eq!(counter.requests(), 100);
        assert_eq!(counter.latency(0.99), 1024);
        assert!(counter.latency(0.999) > 1_000_000);
    }
}
