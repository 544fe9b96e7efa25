//! A disk in memory and an offer of two exports.
#![allow(dead_code, reason = "not every suite uses all of it")]

use qcow2_nbd::blocking::server::Disk;
use qcow2_nbd::proto::*;
use qcow2_nbd::server::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// `disk`, writable, of 64 KiB with two contexts; and the default one, read-only, of 4 KiB.
pub(crate) fn offer() -> Offer {
    use transmission_flag::*;
    let all = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | SEND_CACHE | SEND_FAST_ZERO;
    let mut disk = Facts::new("disk", 65536, all);
    disk.description = "a disk".to_owned();
    disk.contexts = vec!["base:allocation".to_owned(), "qemu:dirty-bitmap:b".to_owned()];
    Offer::new(vec![Arc::new(disk), Arc::new(Facts::new("", 4096, READ_ONLY))])
}

/// A disk of bytes. Ranges whose first byte is 0xee fail; each call may take its time.
pub(crate) struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// How long each call takes.
    pub(crate) delay: Duration,
    /// From this call on each waits until two have run at once, or for a minute.
    pub(crate) meets_from: usize,
    calls: AtomicUsize,
    /// Calls that run, and the most that ran at once.
    pub(crate) running: AtomicUsize,
    pub(crate) most: AtomicUsize,
    pub(crate) flushes: AtomicUsize,
}

impl Memory {
    pub(crate) fn new(size: usize) -> Self {
        let (bytes, delay) = (Mutex::new(vec![0; size]), Duration::ZERO);
        let (running, most, flushes, calls) = Default::default();
        Self { bytes, delay, meets_from: usize::MAX, calls, running, most, flushes }
    }

    fn with<T>(&self, offset: u64, len: u64, change: impl FnOnce(&mut [u8]) -> T) -> Result<T, ErrorCode> {
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(running, Ordering::SeqCst);
        if !self.delay.is_zero() {
            std::thread::sleep(self.delay);
        }
        if self.calls.fetch_add(1, Ordering::SeqCst) >= self.meets_from {
            let begun = Instant::now();
            while self.most.load(Ordering::SeqCst) < 2 && begun.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.running.fetch_sub(1, Ordering::SeqCst);
        let mut bytes = self.bytes.lock().unwrap();
        let range = &mut bytes[offset as usize..(offset + len) as usize];
        if range.first() == Some(&0xee) {
            return Err(ErrorCode::IO);
        }
        Ok(change(range))
    }
}

impl Disk for Memory {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ErrorCode> {
        self.with(offset, buf.len() as u64, |bytes| buf.copy_from_slice(bytes))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), ErrorCode> {
        self.with(offset, data.len() as u64, |bytes| bytes.copy_from_slice(data))
    }

    fn flush(&self) -> Result<(), ErrorCode> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
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
            for byte in bytes {
                let flags = u64::from(*byte == 0) + u64::from(context);
                let is_full = extents.len() == most;
                match extents.last_mut() {
                    Some(last) if last.flags == flags => last.len += 1,
                    _ if is_full => return,
                    _ => extents.push(Extent { len: 1, flags }),
                }
            }
        })
    }

    fn zero_run(&self, offset: u64, len: u64) -> Result<(u64, bool), ErrorCode> {
        self.with(offset, len, |bytes| {
            let is_zero = bytes[0] == 0;
            let run = bytes.iter().take_while(|byte| (**byte == 0) == is_zero).count();
            (run as u64, is_zero)
        })
    }
}
