//! Timed requests at equal steps: qemu-img's `bench`, as a library.

use qcow2_core::GuestDisk;
use qcow2_ops::{BenchOptions, Error, Executor, Progress};
use std::time::{Duration, Instant};

/// A timed series of requests. `qcow2_ops::bench` sends them; this type adds the queue depth, the clock and
/// closing the image.
#[derive(Clone, Copy, Debug)]
pub struct Bench {
    /// Kind, size, step and number of the requests.
    pub requests: BenchOptions,
    /// Maximum number of requests in flight, at least 1.
    pub depth: usize,
}

/// Contradictions in a [`Bench`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BenchRefusal {
    /// A flush interval without writes.
    FlushesWithoutWrites,
    /// A flush interval shorter than the queue depth.
    FlushesWithinDepth,
}

/// Result of a run.
#[derive(Debug)]
#[non_exhaustive]
pub struct BenchReport {
    /// Time from the first request to the end of the last one, without closing the image.
    pub elapsed: Duration,
    /// `Ok` if all requests succeeded. Errors: the first failure, which ended the run.
    pub sent: Result<(), BenchFailure>,
    /// Result of closing the image; `Ok` if the disk is not an image.
    pub closed: Result<(), qcow2_core::Error>,
}

/// Why a run ended early.
#[derive(Debug)]
pub enum BenchFailure {
    /// A request reached past the end of the disk, which a device refuses.
    PastEnd,
    /// The disk failed a request.
    Request(Error),
}

impl Bench {
    /// qemu-img's defaults: 75000 reads of 4096 bytes, up to 64 in flight.
    pub fn new() -> Self {
        Self { requests: BenchOptions::new(), depth: 64 }
    }

    /// Checks the options that don't depend on the disk. A flush interval below the
    /// depth is refused, as in qemu-img: a flush that waits until no request is in flight would keep the
    /// queue from ever filling.
    pub fn check(&self) -> Result<(), BenchRefusal> {
        match self.requests.flush_interval {
            Some(_) if self.requests.pattern.is_none() => Err(BenchRefusal::FlushesWithoutWrites),
            Some(interval) if interval < self.depth as u64 => Err(BenchRefusal::FlushesWithinDepth),
            _ => Ok(()),
        }
    }

    /// Number of threads to use if `wanted` are available. Each thread has one request in flight, so more
    /// than `depth` threads would exceed the queue depth.
    pub fn workers(&self, wanted: usize) -> usize {
        wanted.min(self.depth).max(1)
    }

    /// Sends the requests from as many threads as `executor` has, then closes the disk if it is an image.
    /// Disk: reads or overwrites guest data; closing makes the writes durable.
    pub fn run(&self, disk: &dyn GuestDisk, executor: &dyn Executor, progress: &dyn Progress) -> BenchReport {
        let began = Instant::now();
        let sent = qcow2_ops::bench(disk, &self.requests, executor, progress);
        let elapsed = began.elapsed();
        let closed = disk.as_image().map_or(Ok(()), |image| image.close());
        let past_end = |error: &Error| {
            error.core_error().is_some_and(|error| error.kind() == qcow2_core::ErrorKind::OutOfRange)
        };
        let sent = sent.map_err(|error| match past_end(&error) {
            true => BenchFailure::PastEnd,
            false => BenchFailure::Request(error),
        });
        BenchReport { elapsed, sent, closed }
    }
}

impl Default for Bench {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::RawDisk;
    use qcow2_io::{MemoryStorage, TraceStorage};
    use qcow2_ops::Silent;
    use qcow2_ops::executor::Inline;
    use std::sync::Arc;

    fn bench(count: u64, pattern: Option<u8>) -> Bench {
        let mut bench = Bench::new();
        bench.requests.count = count;
        bench.requests.pattern = pattern;
        bench
    }

    #[test]
    fn run_sends_every_request_and_measures_the_time() {
        let storage = Arc::new(TraceStorage::new(Arc::new(MemoryStorage::with_len(1 << 20))));
        let disk = RawDisk::new(storage.clone(), true).unwrap();
        let report = bench(10, Some(3)).run(&disk, &Inline, &Silent);
        assert!(report.sent.is_ok() && report.closed.is_ok() && report.elapsed > Duration::ZERO);
        assert_eq!(storage.counts().writes, 10);
    }

    #[test]
    fn past_end_is_distinguished_from_a_failed_request() {
        let disk = |len, writable| RawDisk::new(Arc::new(MemoryStorage::with_len(len)), writable).unwrap();
        let sent = |disk: RawDisk, bench: Bench| bench.run(&disk, &Inline, &Silent).sent;
        assert!(matches!(sent(disk(10_000, false), bench(3, None)), Err(BenchFailure::PastEnd)));
        assert!(matches!(sent(disk(1 << 20, false), bench(3, Some(1))), Err(BenchFailure::Request(_))));
    }

    #[test]
    fn flush_interval_needs_writes_and_must_not_be_below_the_depth() {
        let flushes = |pattern, interval, depth| {
            let mut bench = Bench { depth, ..bench(1, pattern) };
            bench.requests.flush_interval = Some(interval);
            bench.check()
        };
        assert_eq!(flushes(None, 100, 1), Err(BenchRefusal::FlushesWithoutWrites));
        assert_eq!(flushes(Some(0), 63, 64), Err(BenchRefusal::FlushesWithinDepth));
        assert_eq!(flushes(Some(0), 64, 64), Ok(()));
        assert_eq!((Bench::new().workers(8), Bench { depth: 2, ..Bench::new() }.workers(8)), (8, 2));
    }
}
