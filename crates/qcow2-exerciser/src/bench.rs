//! Requests at equal steps, timed: qemu-img's `bench`, as a library.

use qcow2_core::GuestDisk;
use qcow2_ops::{BenchOptions, Error, Executor, Progress};
use std::time::{Duration, Instant};

/// A run of requests to time. `qcow2_ops::bench` sends them; here are its depth, its clock and its end.
#[derive(Clone, Copy, Debug)]
pub struct Bench {
    /// The requests.
    pub requests: BenchOptions,
    /// How many requests may be in flight, at least 1.
    pub depth: usize,
}

/// What does not go together in a [`Bench`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BenchRefusal {
    /// Flushes between reads.
    FlushesWithoutWrites,
    /// Flushes more often than the requests in flight allow.
    FlushesWithinDepth,
}

/// How a run went.
#[derive(Debug)]
#[non_exhaustive]
pub struct BenchReport {
    /// From the first request to the end of the last one.
    pub elapsed: Duration,
    /// Whether all requests were made. Errors: the first that failed, which ended the run.
    pub sent: Result<(), BenchFailure>,
    /// Whether the image below could be closed; `Ok` for a disk that is none.
    pub closed: Result<(), qcow2_core::Error>,
}

/// Why a run ended early.
#[derive(Debug)]
pub enum BenchFailure {
    /// A request reached past the end of the disk, which a device refuses.
    PastEnd,
    /// The disk could not do what was asked.
    Request(Error),
}

impl Bench {
    /// qemu-img's own: 75000 reads of 4096 bytes, up to 64 in flight.
    pub fn new() -> Self {
        Self { requests: BenchOptions::new(), depth: 64 }
    }

    /// Checks what the disk plays no part in. A flush interval that is shorter than the depth would wait for
    /// requests that wait for it.
    pub fn check(&self) -> Result<(), BenchRefusal> {
        match self.requests.flush_interval {
            Some(_) if self.requests.pattern.is_none() => Err(BenchRefusal::FlushesWithoutWrites),
            Some(interval) if interval < self.depth as u64 => Err(BenchRefusal::FlushesWithinDepth),
            _ => Ok(()),
        }
    }

    /// How many threads the requests need where `wanted` are there: each has one request in flight.
    pub fn workers(&self, wanted: usize) -> usize {
        wanted.min(self.depth).max(1)
    }

    /// Sends the requests from as many threads as `executor` has and closes the image, if it is one. Disk:
    /// reads or overwrites guest bytes; closing makes durable what was written.
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
    fn requests_are_sent_and_timed() {
        let storage = Arc::new(TraceStorage::new(Arc::new(MemoryStorage::with_len(1 << 20))));
        let disk = RawDisk::new(storage.clone(), true).unwrap();
        let report = bench(10, Some(3)).run(&disk, &Inline, &Silent);
        assert!(report.sent.is_ok() && report.closed.is_ok() && report.elapsed > Duration::ZERO);
        assert_eq!(storage.counts().writes, 10);
    }

    #[test]
    fn the_end_of_the_disk_is_told_from_a_failure() {
        let disk = |len, writable| RawDisk::new(Arc::new(MemoryStorage::with_len(len)), writable).unwrap();
        let sent = |disk: RawDisk, bench: Bench| bench.run(&disk, &Inline, &Silent).sent;
        assert!(matches!(sent(disk(10_000, false), bench(3, None)), Err(BenchFailure::PastEnd)));
        assert!(matches!(sent(disk(1 << 20, false), bench(3, Some(1))), Err(BenchFailure::Request(_))));
    }

    #[test]
    fn what_does_not_go_together() {
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
