//! A disk that keeps what it reads from below: clusters without content of their own are written to the top
//! layer.

use qcow2_core::{DiskExtent, ExtentState, GuestDisk, GuestOffset, GuestRange, Image, Result, ZeroMode};
use std::any::Any;
use std::sync::{Arc, PoisonError, RwLock};

/// Wraps a disk. Copies meet no other change: they hold the lock alone, changes share it.
pub(super) struct CopyOnRead {
    inner: Arc<dyn GuestDisk>,
    changes: RwLock<()>,
}

/// Bytes that are copied at once.
const MAX_COPY: u64 = 1 << 20;

impl CopyOnRead {
    /// `inner` must be open for writing.
    pub(super) fn new(inner: Arc<dyn GuestDisk>) -> Self {
        Self { inner, changes: RwLock::new(()) }
    }

    /// Copies what the clusters that `offset..offset + len` touches do not have themselves.
    fn copy_up(&self, offset: u64, len: u64) -> Result<()> {
        let step = self.inner.cluster_size();
        if step == 0 || len == 0 || self.inner.backing().is_none() {
            return Ok(());
        }
        let mut at = offset - offset % step;
        let end = (offset + len).next_multiple_of(step).min(self.inner.size());
        let _alone = self.changes.write().unwrap_or_else(PoisonError::into_inner);
        while at < end {
            let Some(range) = GuestRange::new(GuestOffset::new(at), (end - at).min(MAX_COPY)) else {
                return Ok(());
            };
            let extent = self.inner.extent_at(range)?;
            if extent.state == ExtentState::Unallocated {
                let mut bytes = vec![0; extent.len as usize];
                self.inner.read_at(range.start(), &mut bytes)?;
                self.inner.write_at(range.start(), &bytes)?;
            }
            at += extent.len;
        }
        Ok(())
    }

    fn change<T>(&self, what: impl FnOnce(&dyn GuestDisk) -> Result<T>) -> Result<T> {
        let _shared = self.changes.read().unwrap_or_else(PoisonError::into_inner);
        what(&*self.inner)
    }
}

impl GuestDisk for CopyOnRead {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(offset, buf)?;
        self.copy_up(offset.value(), buf.len() as u64)
    }

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        self.change(|disk| disk.write_at(offset, buf))
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        self.change(|disk| disk.write_zeroes(range, mode))
    }

    fn discard(&self, range: GuestRange) -> Result<()> {
        self.change(|disk| disk.discard(range))
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

    fn as_any(&self) -> Option<&dyn Any> {
        self.inner.as_any().filter(|disk| disk.is::<Image>())
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.change(|disk| disk.resize(size))
    }
}
