//! A storage that takes no more than so many bytes a second.

use qcow2_core::{HostOffset, Storage, StorageError, forward_storage};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Wraps a storage and delays writes. Reading, zeroing and discarding are not delayed: they move no data. The
/// system copies nothing into it by itself, since those bytes would not be counted.
pub struct ThrottleStorage {
    inner: Arc<dyn Storage>,
    bytes_per_second: u64,
    /// When the bytes taken so far are paid for.
    paid: Mutex<Instant>,
}

impl ThrottleStorage {
    /// Wraps `inner`, which takes `bytes_per_second` at most, and at least 1.
    pub fn new(inner: Arc<dyn Storage>, bytes_per_second: u64) -> Self {
        Self { inner, bytes_per_second: bytes_per_second.max(1), paid: Mutex::new(Instant::now()) }
    }

    /// Waits until `len` more bytes may go.
    fn wait_for(&self, len: usize) {
        let price = Duration::from_secs_f64(len as f64 / self.bytes_per_second as f64);
        let wait = {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            let start = (*paid).max(Instant::now());
            *paid = start.checked_add(price).unwrap_or(start);
            start.saturating_duration_since(Instant::now())
        };
        thread::sleep(wait);
    }
}

impl Storage for ThrottleStorage {
    forward_storage!(inner:
        len read_at write_zeroes discard allocate set_len flush extent_at status_at limits used_bytes
        guest_disk
    );

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.wait_for(buf.len());
        self.inner.write_at(offset, buf)
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        self.wait_for(bufs.iter().map(|buf| buf.len()).sum());
        self.inner.write_vectored_at(offset, bufs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStorage;

    #[test]
    fn writes_take_their_time() {
        let storage = ThrottleStorage::new(Arc::new(MemoryStorage::new()), 1_000_000);
        let start = Instant::now();
        for i in 0..4 {
            storage.write_at(HostOffset::new(i * 50_000), &[1; 50_000]).unwrap();
        }
        // The first one goes at once, each of the others waits for the one before.
        assert!(start.elapsed() >= Duration::from_millis(150));
        let mut back = [0; 10];
        assert_eq!(storage.read_at(HostOffset::new(199_990), &mut back).unwrap(), 10);
        assert_eq!(back, [1; 10]);
    }
}
