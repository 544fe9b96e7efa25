//! A guest disk as the bytes of what stands on it.

use core::any::Any;
use qcow2_core::{
    ExtentState, GuestDisk, GuestOffset, GuestRange, HostOffset, Length, Limits, Storage, StorageError,
    StorageErrorKind, StorageExtent, ZeroMode,
};
use std::sync::Arc;

/// A guest disk as a storage: an image inside an image. It does not grow by being written to. Dropping it
/// closes the image underneath, if it is one.
pub struct DiskStorage {
    disk: Arc<dyn GuestDisk>,
}

impl DiskStorage {
    /// The bytes of `disk`.
    pub fn new(disk: Arc<dyn GuestDisk>) -> Self {
        Self { disk }
    }

    fn range(&self, offset: HostOffset, len: u64) -> Result<GuestRange, StorageError> {
        let range = GuestRange::new(GuestOffset::new(offset.value()), len);
        range.filter(|range| range.end().value() <= self.disk.size()).ok_or_else(|| {
            StorageError::new(
                StorageErrorKind::OutOfRange,
                format!("{len} bytes at {offset} pass the disk's end"),
            )
        })
    }
}

/// The storage error that the engine met below, or one of its own.
fn passed_on(error: qcow2_core::Error) -> StorageError {
    let kind = error.storage_error().map_or(StorageErrorKind::Io, StorageError::kind);
    let code = error.storage_error().and_then(StorageError::os_code);
    let wrapped = StorageError::new(kind, "the image below").with_source(error);
    code.into_iter().fold(wrapped, StorageError::with_os_code)
}

impl Storage for DiskStorage {
    fn len(&self) -> Result<u64, StorageError> {
        Ok(self.disk.size())
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        let inside = self.disk.size().saturating_sub(offset.value()).min(buf.len() as u64) as usize;
        if inside > 0 {
            self.disk.read_at(GuestOffset::new(offset.value()), &mut buf[..inside]).map_err(passed_on)?;
        }
        Ok(inside)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        let range = self.range(offset, buf.len() as u64)?;
        self.disk.write_at(range.start(), buf).map_err(passed_on)
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        self.disk.write_zeroes(self.range(offset, len)?, mode).map_err(passed_on)
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let inside = self.disk.size().saturating_sub(offset.value()).min(len);
        if inside == 0 {
            return Ok(());
        }
        self.disk.discard(self.range(offset, inside)?).map_err(passed_on)
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.range(offset, len)?;
        Err(StorageError::new(StorageErrorKind::Unsupported, "space cannot be reserved through an image"))
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        if len == self.disk.size() { Ok(()) } else { self.disk.resize(len).map_err(passed_on) }
    }

    fn flush(&self) -> Result<(), StorageError> {
        self.disk.flush().map_err(passed_on)
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let range = self.range(offset, len)?;
        let extent = self.disk.extent_at(range).map_err(passed_on)?;
        let data = match extent.state {
            ExtentState::Zero { .. } => false,
            ExtentState::Unallocated => self.disk.backing().is_some(),
            ExtentState::Data { .. } | ExtentState::Compressed => true,
        };
        Ok(StorageExtent { len: extent.len, data })
    }

    fn guest_disk(&self) -> Option<(&dyn Any, GuestOffset)> {
        Some((&self.disk, GuestOffset::new(0)))
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.length = Length::Fixed;
        limits.fast_zeroes = true;
        limits
    }
}

impl Drop for DiskStorage {
    fn drop(&mut self) {
        // Whoever stood on it has flushed what matters; this leaves the image as tidy as can be.
        if let Some(image) = self.disk.as_image() {
            let _ = image.close();
        }
    }
}
