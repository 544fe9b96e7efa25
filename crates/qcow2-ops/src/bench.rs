//! Sends requests at equal distances, to measure the throughput of a disk. The caller measures the time.

use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::progress::Progress;
use qcow2_core::{GuestDisk, GuestOffset};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

/// The requests to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BenchOptions {
    /// Number of requests.
    pub count: u64,
    /// Length of a request in bytes, at least 1.
    pub buffer_size: u64,
    /// Distance between the starts of two requests in bytes. Offsets wrap around at the end of the disk.
    pub step: u64,
    /// Guest offset of the first request.
    pub start: u64,
    /// Byte to write; `None` reads.
    pub pattern: Option<u8>,
    /// Number of requests between two flushes; `None`: no flushes.
    pub flush_interval: Option<u64>,
    /// Wait until no request is running before each flush, like a guest that orders its writes.
    pub drain: bool,
}

impl BenchOptions {
    /// 75000 consecutive reads of 4096 bytes.
    pub fn new() -> Self {
        Self {
            count: 75_000,
            buffer_size: 4096,
            step: 4096,
            start: 0,
            pattern: None,
            flush_interval: None,
            drain: true,
        }
    }

    /// With this many requests.
    #[must_use]
    pub fn with_count(self, count: u64) -> Self {
        Self { count, ..self }
    }

    /// With requests of this many bytes.
    #[must_use]
    pub fn with_buffer_size(self, buffer_size: u64) -> Self {
        Self { buffer_size, ..self }
    }

    /// With this many bytes from the start of one request to that of the next.
    #[must_use]
    pub fn with_step(self, step: u64) -> Self {
        Self { step, ..self }
    }

    /// From another guest offset on.
    #[must_use]
    pub fn with_start(self, start: u64) -> Self {
        Self { start, ..self }
    }

    /// Writing this byte; `None`: reading.
    #[must_use]
    pub fn with_pattern(self, pattern: Option<u8>) -> Self {
        Self { pattern, ..self }
    }

    /// With a flush after this many requests; `None`: no flushes.
    #[must_use]
    pub fn with_flush_interval(self, flush_interval: Option<u64>) -> Self {
        Self { flush_interval, ..self }
    }

    /// With no request running during a flush, or with some.
    #[must_use]
    pub fn with_drain(self, drain: bool) -> Self {
        Self { drain, ..self }
    }
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self::new()
    }
}

struct Run<'a> {
    disk: &'a dyn GuestDisk,
    options: &'a BenchOptions,
    progress: &'a dyn Progress,
    next: AtomicU64,
    /// Locked for reading by each request, and for writing by a flush that drains.
    requests: RwLock<()>,
    failed: Mutex<Option<Error>>,
}

/// Sends the requests, one at a time per worker of `executor`. Disk: reads or overwrites guest bytes; writes
/// are flushed only as the options say. Nothing is read or written if a request would pass the end of the
/// disk. Errors: `Read` or `Write` of that request, or of the first one that failed.
pub fn bench(
    disk: &dyn GuestDisk,
    options: &BenchOptions,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<()> {
    let (next, requests, failed) = (AtomicU64::new(0), RwLock::new(()), Mutex::new(None));
    let run = Run { disk, options, progress, next, requests, failed };
    if let Some(index) = run.first_past_end() {
        return run.request(index, &mut run.buffer());
    }
    executor.run(&|_| run.work());
    match run.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

impl Run<'_> {
    fn work(&self) {
        let mut buffer = self.buffer();
        while !self.progress.should_stop() {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.options.count {
                return;
            }
            if let Err(error) = self.request(index, &mut buffer) {
                self.next.store(self.options.count, Ordering::Relaxed);
                self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                return;
            }
        }
    }

    fn buffer(&self) -> Vec<u8> {
        vec![self.options.pattern.unwrap_or(0); self.options.buffer_size as usize]
    }

    /// The first request that passes the end of the disk, which the disk refuses. Requests come at the same
    /// offsets again after as many as the disk has bytes, at most.
    fn first_past_end(&self) -> Option<u64> {
        let (size, len) = (self.size(), self.options.buffer_size);
        let passes = |index: &u64| self.offset(*index).value().saturating_add(len) > size;
        (0..self.options.count.min(size.max(1).saturating_add(1))).find(passes)
    }

    fn request(&self, index: u64, buffer: &mut [u8]) -> Result<()> {
        let offset = self.offset(index);
        {
            let _running = self.requests.read().unwrap_or_else(PoisonError::into_inner);
            let (done, kind) = match self.options.pattern {
                Some(_) => (self.write(offset, buffer), ErrorKind::Write),
                None => (self.read(offset, buffer), ErrorKind::Read),
            };
            done.map_err(|e| {
                Error::new(kind, format!("request at guest offset {offset} failed")).with_source(e)
            })?;
        }
        match self.options.flush_interval {
            Some(interval) if (index + 1).is_multiple_of(interval) => self.flush(),
            _ => Ok(()),
        }
    }

    /// Reads what of a request is inside the disk; past the end, up to a whole sector, there is nothing.
    fn read(&self, offset: GuestOffset, buffer: &mut [u8]) -> qcow2_core::Result<()> {
        let inside = match self.is_padded(offset, buffer) {
            true => self.disk.size().saturating_sub(offset.value()).min(buffer.len() as u64),
            false => buffer.len() as u64,
        };
        match inside {
            0 => Ok(()),
            inside => self.disk.read_at(offset, &mut buffer[..inside as usize]),
        }
    }

    /// Writes; a disk that ends inside a sector is completed first where that is written to.
    fn write(&self, offset: GuestOffset, bytes: &[u8]) -> qcow2_core::Result<()> {
        if self.is_padded(offset, bytes) {
            self.disk.resize(self.size())?;
        }
        self.disk.write_at(offset, bytes)
    }

    /// True if a request passes the end of the disk, but not the last sector.
    fn is_padded(&self, offset: GuestOffset, bytes: &[u8]) -> bool {
        let end = offset.value().saturating_add(bytes.len() as u64);
        (self.disk.size() + 1..=self.size()).contains(&end)
    }

    /// Size of the disk in bytes, in whole sectors.
    fn size(&self) -> u64 {
        let size = self.disk.size();
        size.checked_next_multiple_of(512).unwrap_or(size)
    }

    fn flush(&self) -> Result<()> {
        let _alone =
            self.options.drain.then(|| self.requests.write().unwrap_or_else(PoisonError::into_inner));
        self.disk.flush().map_err(|e| Error::new(ErrorKind::Write, "flush failed").with_source(e))
    }

    /// Guest offset of request `index`. Wraps around past the end; a request that crosses the end fails.
    fn offset(&self, index: u64) -> GuestOffset {
        let size = self.size();
        let at = u128::from(self.options.start) + u128::from(index) * u128::from(self.options.step);
        if index == 0 || size == 0 {
            return GuestOffset::new(self.options.start);
        }
        GuestOffset::new((at % u128::from(size)) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Inline;
    use crate::progress::Silent;
    use crate::testing::{TestDisk, Threads};

    #[test]
    fn requests_wrap_around_at_the_end() {
        for workers in [1, 3] {
            let disk = TestDisk::data(vec![0; 12_288]);
            let options =
                BenchOptions { count: 5, pattern: Some(7), flush_interval: Some(2), ..BenchOptions::new() };
            bench(&disk, &options, &Threads(workers), &Silent).unwrap();
            let bytes = disk.bytes.lock().unwrap();
            assert!(bytes.iter().all(|&b| b == 7), "the first three requests cover the disk");
        }
    }

    #[test]
    fn request_across_the_end_fails() {
        let options = BenchOptions { count: 3, ..BenchOptions::new() };
        let error = bench(&TestDisk::data(vec![0; 10_000]), &options, &Inline, &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Read);
    }

    #[test]
    fn nothing_is_written_if_a_later_request_passes_the_end() {
        for (count, fails) in [(2, false), (3, true), (1 << 40, true)] {
            let disk = TestDisk::data(vec![0; 10_240]);
            let options = BenchOptions { count, pattern: Some(7), ..BenchOptions::new() };
            let sent = bench(&disk, &options, &Threads(2), &Silent);
            assert_eq!(sent.is_err_and(|error| error.kind() == ErrorKind::Write), fails);
            assert_eq!(disk.bytes.lock().unwrap().iter().all(|&byte| byte == 0), fails);
        }
    }

    #[test]
    fn a_last_sector_counts_as_a_whole_one() {
        let disk = TestDisk::data(vec![1; 1000]);
        let options = BenchOptions { count: 3, buffer_size: 512, step: 512, ..BenchOptions::new() };
        bench(&disk, &options, &Inline, &Silent).unwrap();
        assert_eq!(disk.size(), 1000);
        let options = BenchOptions { pattern: Some(7), ..options };
        bench(&disk, &options, &Inline, &Silent).unwrap();
        assert_eq!(*disk.bytes.lock().unwrap(), [7; 1024]);
        let options = BenchOptions { buffer_size: 1000, step: 1000, ..options };
        let error = bench(&TestDisk::data(vec![1; 1000]), &options, &Inline, &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Write);
    }

    #[test]
    fn start_past_the_end_fails() {
        let options = BenchOptions { start: 20_000, ..BenchOptions::new() };
        let error = bench(&TestDisk::data(vec![0; 10_000]), &options, &Inline, &Silent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Read);
    }
}
