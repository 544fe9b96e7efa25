//! A disk behind a filter.

use qcow2_core::{DiskExtent, GuestDisk, GuestOffset, GuestRange, Result, ZeroMode};
use std::sync::Arc;

/// Wraps a disk: its content and its layers are seen, and what kind of disk it is not, so that nobody works
/// on the image around the filter. Dropping it closes the image.
pub struct FilteredDisk {
    inner: Arc<dyn GuestDisk>,
}

impl FilteredDisk {
    /// Wraps `inner`, which nobody else closes.
    pub fn new(inner: Arc<dyn GuestDisk>) -> Self {
        Self { inner }
    }
}

impl GuestDisk for FilteredDisk {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        self.inner.write_at(offset, buf)
    }

    fn write_parts(&self, parts: &[(GuestOffset, &[u8])]) -> Result<()> {
        self.inner.write_parts(parts)
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        self.inner.write_zeroes(range, mode)
    }

    fn discard(&self, range: GuestRange) -> Result<()> {
        self.inner.discard(range)
    }

    fn flush(&self) -> Result<()> {
        self.inner.flush()
    }

    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        self.inner.extent_at(range)
    }

    fn backing(&self) -> Option<&Arc<dyn GuestDisk>> {
        self.inner.backing()
    }

    fn cluster_size(&self) -> u64 {
        self.inner.cluster_size()
    }

    fn zero_granularity(&self) -> u64 {
        self.inner.zero_granularity()
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.inner.resize(size)
    }
}

impl Drop for FilteredDisk {
    fn drop(&mut self) {
        // Whoever wrote through it has flushed what matters; this leaves the image as tidy as can be.
        if let Some(image) = self.inner.as_image() {
            let _ = image.close();
        }
    }
}
