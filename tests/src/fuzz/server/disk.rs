//! A disk in memory with a range that fails, and what should be on it.

use qcow2_nbd::blocking::server::{Disk, PIECE};
use qcow2_nbd::proto::{Command, ErrorCode, Extent, Request};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// The meta contexts; their ids are their positions.
pub(super) const CONTEXTS: [&str; 3] = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b"];

/// What block status says of a byte.
pub(super) fn flags_of(context: u32, byte: u8) -> u64 {
    match context {
        0 if byte == 0 => 3,
        0 => 0,
        1 => u64::from(byte != 0),
        _ => u64::from(byte >> 7),
    }
}

/// Bytes of which nothing can be read or changed.
fn bad(size: u64) -> Range<u64> {
    let start = size / 8 * 5;
    start..start + 512
}

/// True if the range has a byte that fails.
pub(super) fn is_bad(size: u64, offset: u64, len: u64) -> bool {
    let bad = bad(size);
    len > 0 && offset < bad.end && offset.saturating_add(len) > bad.start
}

/// The disk that is served.
pub(super) struct Recorded {
    bytes: Mutex<Vec<u8>>,
    pub(super) flushes: AtomicU64,
}

impl Recorded {
    pub(super) fn new(size: u64) -> Self {
        Self { bytes: Mutex::new(vec![0; size as usize]), flushes: AtomicU64::new(0) }
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Calls `work` with the range. A range outside the disk is a fault of the server.
    fn with<T>(&self, offset: u64, len: u64, work: impl FnOnce(&mut [u8]) -> T) -> Result<T, ErrorCode> {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(len > 0, "a range of no bytes");
        if is_bad(bytes.len() as u64, offset, len) {
            return Err(ErrorCode::IO);
        }
        Ok(work(&mut bytes[offset as usize..(offset + len) as usize]))
    }
}

impl Disk for Recorded {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ErrorCode> {
        self.with(offset, buf.len() as u64, |bytes| buf.copy_from_slice(bytes))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), ErrorCode> {
        self.with(offset, data.len() as u64, |bytes| bytes.copy_from_slice(data))
    }

    fn flush(&self) -> Result<(), ErrorCode> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn trim(&self, offset: u64, len: u64) -> Result<(), ErrorCode> {
        self.with(offset, len, |bytes| bytes.fill(0))
    }

    fn write_zeroes(&self, offset: u64, len: u64, _no_hole: bool, fast: bool) -> Result<(), ErrorCode> {
        if fast {
            return Err(ErrorCode::NOT_SUPPORTED);
        }
        self.with(offset, len, |bytes| bytes.fill(0))
    }

    fn cache(&self, offset: u64, len: u64) -> Result<(), ErrorCode> {
        self.with(offset, len, |_| ())
    }

    fn status(
        &self,
        context: u32,
        (offset, len): (u64, u64),
        most: usize,
        extents: &mut Vec<Extent>,
    ) -> Result<(), ErrorCode> {
        self.with(offset, len, |bytes| {
            for part in bytes.chunk_by(|a, b| flags_of(context, *a) == flags_of(context, *b)).take(most) {
                extents.push(Extent { len: part.len() as u64, flags: flags_of(context, part[0]) });
            }
        })
    }

    fn zero_run(&self, offset: u64, len: u64) -> Result<(u64, bool), ErrorCode> {
        self.with(offset, len, |bytes| {
            let is_zero = bytes[0] == 0;
            let run = bytes.iter().position(|byte| (*byte == 0) != is_zero).unwrap_or(bytes.len());
            (run as u64, is_zero)
        })
    }
}

/// What acknowledged requests leave on a disk.
pub(super) struct Model {
    bytes: Vec<u8>,
    /// Ranges of writes in several pieces that were not acknowledged: they may have old bytes or new ones.
    unknown: Vec<Range<usize>>,
}

impl Model {
    pub(super) fn new(size: u64) -> Self {
        Self { bytes: vec![0; size as usize], unknown: Vec::new() }
    }

    /// A write, a trim, or zeroes were acknowledged.
    pub(super) fn change(&mut self, request: &Request, payload: &[u8]) {
        let target = &mut self.bytes[range(request)];
        match request.command {
            Command::WRITE => target.copy_from_slice(payload),
            _ => target.fill(0),
        }
    }

    /// A write, inside the disk, was not acknowledged.
    pub(super) fn fail(&mut self, request: &Request) {
        if request.command == Command::WRITE && request.len > PIECE as u64 {
            self.unknown.push(range(request));
        }
    }

    pub(super) fn bytes(&self, request: &Request) -> &[u8] {
        &self.bytes[range(request)]
    }

    /// Panics if `seen` is not what the disk has from `start` on.
    pub(super) fn compare(&self, start: u64, seen: &[u8]) {
        let start = start as usize;
        let expected = &self.bytes[start..start + seen.len()];
        if seen == expected {
            return;
        }
        for (at, (seen, expected)) in (start..).zip(seen.iter().zip(expected)) {
            let is_known = !self.unknown.iter().any(|range| range.contains(&at));
            assert!(seen == expected || !is_known, "byte {at} is {seen:#x} instead of {expected:#x}");
        }
    }
}

fn range(request: &Request) -> Range<usize> {
    request.offset as usize..(request.offset + request.len) as usize
}
