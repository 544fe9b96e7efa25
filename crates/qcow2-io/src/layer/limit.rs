//! A storage that may not grow past a length: a full disk to order.

use crate::error::Call;
use qcow2_core::{HostOffset, Storage, StorageError, StorageErrorKind, ZeroMode, forward_storage};
use std::sync::Arc;

/// Wraps a storage; every change that would make it longer than the limit fails with
/// [`StorageErrorKind::NoSpace`] and changes nothing.
pub struct LimitStorage {
    inner: Arc<dyn Storage>,
    max_len: u64,
}

impl LimitStorage {
    /// Wraps `inner`, which may reach `max_len` bytes.
    pub fn new(inner: Arc<dyn Storage>, max_len: u64) -> Self {
        Self { inner, max_len }
    }

    fn check(&self, call: Call) -> Result<(), StorageError> {
        if call.end()? <= self.max_len {
            return Ok(());
        }
        Err(StorageError::new(
            StorageErrorKind::NoSpace,
            format!(
                "{} of {} bytes at {}: at most {} bytes fit",
                call.name, call.len, call.offset, self.max_len
            ),
        ))
    }
}

impl Storage for LimitStorage {
    forward_storage!(inner:
        len read_at discard flush extent_at status_at limits used_bytes events guest_disk
    );

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.check(Call::new("write", offset, buf.len() as u64))?;
        self.inner.write_at(offset, buf)
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        let len = bufs.iter().fold(0u64, |sum, buf| sum.saturating_add(buf.len() as u64));
        self.check(Call::new("write", offset, len))?;
        self.inner.write_vectored_at(offset, bufs)
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        self.check(Call::new("zero", offset, len))?;
        self.inner.write_zeroes(offset, len, mode)
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.check(Call::new("allocate", offset, len))?;
        self.inner.allocate(offset, len)
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        self.check(Call::new("resize", HostOffset::new(0), len))?;
        self.inner.set_len(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStorage;

    #[test]
    fn nothing_passes_the_limit() {
        let storage = LimitStorage::new(Arc::new(MemoryStorage::new()), 1000);
        storage.write_at(HostOffset::new(990), &[1; 10]).unwrap();
        let at = HostOffset::new(991);
        let kinds = [
            storage.write_at(at, &[1; 10]),
            storage.write_vectored_at(at, &[&[1; 5], &[1; 5]]),
            storage.write_zeroes(at, 10, ZeroMode::MayUnmap),
            storage.allocate(at, 10),
            storage.set_len(1001),
        ];
        for result in kinds {
            assert_eq!(result.unwrap_err().kind(), StorageErrorKind::NoSpace);
        }
        assert_eq!(storage.len().unwrap(), 1000);
    }
}
