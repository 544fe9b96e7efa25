//! Bytes in memory as a storage: for crash images and small test images.

use crate::pages::{MAX_LEN, PageBytes};
use qcow2_core::{HostOffset, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A growable storage in memory whose content can be copied out at any time.
#[derive(Debug, Default)]
pub struct PageStorage {
    bytes: Mutex<PageBytes>,
}

impl PageStorage {
    /// A storage that holds `bytes`.
    pub fn new(bytes: PageBytes) -> Self {
        Self { bytes: Mutex::new(bytes) }
    }

    /// The bytes as they are now.
    pub fn bytes(&self) -> PageBytes {
        self.locked().clone()
    }

    fn locked(&self) -> MutexGuard<'_, PageBytes> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of a change. Errors: `NoSpace` past the largest simulated length.
fn check_end(offset: HostOffset, len: u64) -> Result<u64, StorageError> {
    offset.value().checked_add(len).filter(|&end| end <= MAX_LEN).ok_or_else(|| {
        StorageError::new(StorageErrorKind::NoSpace, format!("{len} bytes at {offset} end past {MAX_LEN:#x}"))
    })
}

impl Storage for PageStorage {
    fn len(&self) -> Result<u64, StorageError> {
        Ok(self.locked().len())
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        Ok(self.locked().read(offset.value(), buf))
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        check_end(offset, buf.len() as u64)?;
        self.locked().write(offset.value(), buf);
        Ok(())
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, _mode: ZeroMode) -> Result<(), StorageError> {
        check_end(offset, len)?;
        self.locked().zero(offset.value(), len);
        Ok(())
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let mut bytes = self.locked();
        let len = len.min(bytes.len().saturating_sub(offset.value()));
        if len > 0 {
            bytes.zero(offset.value(), len);
        }
        Ok(())
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let end = check_end(offset, len)?;
        let mut bytes = self.locked();
        if end > bytes.len() {
            bytes.set_len(end);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        check_end(HostOffset::new(len), 0)?;
        self.locked().set_len(len);
        Ok(())
    }

    fn flush(&self) -> Result<(), StorageError> {
        Ok(())
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let (len, data) = self.locked().run_at(offset.value(), len);
        Ok(StorageExtent { len, data })
    }

    fn used_bytes(&self) -> Result<Option<u64>, StorageError> {
        Ok(Some(self.locked().used()))
    }
}
