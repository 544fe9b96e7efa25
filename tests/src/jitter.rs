//! A storage that yields to other threads at random moments, to widen race windows.

use qcow2_core::{HostOffset, Limits, Storage, StorageError, StorageExtent, ZeroMode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Forwards every call, with a pause before or after some.
pub struct JitterStorage {
    inner: Arc<dyn Storage>,
    calls: AtomicU64,
}

impl JitterStorage {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, calls: AtomicU64::new(0) }
    }

    /// Usually nothing, sometimes a yield, rarely a sleep long enough for another thread's whole operation.
    fn pause(&self) {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let draw = (call ^ 0x5bd1_e995).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
        match draw {
            0 => std::thread::sleep(Duration::from_micros(draw + 20)),
            1..60 => std::thread::yield_now(),
            _ => {}
        }
    }

    fn around<R>(&self, call: impl FnOnce() -> R) -> R {
        self.pause();
        let result = call();
        self.pause();
        result
    }
}

impl Storage for JitterStorage {
    fn len(&self) -> Result<u64, StorageError> {
        self.inner.len()
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        self.around(|| self.inner.read_at(offset, buf))
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.around(|| self.inner.write_at(offset, buf))
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        self.around(|| self.inner.write_vectored_at(offset, bufs))
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        self.around(|| self.inner.write_zeroes(offset, len, mode))
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.around(|| self.inner.discard(offset, len))
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.around(|| self.inner.allocate(offset, len))
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        self.around(|| self.inner.set_len(len))
    }

    fn flush(&self) -> Result<(), StorageError> {
        self.around(|| self.inner.flush())
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        self.inner.extent_at(offset, len)
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn used_bytes(&self) -> Result<Option<u64>, StorageError> {
        self.inner.used_bytes()
    }
}
