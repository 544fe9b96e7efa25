//! A disk that keeps what it reads from below.

use qcow2_core::{
    ExtentState, GuestDisk, GuestOffset, GuestRange, Image, Result, ZeroMode, forward_guest_disk,
};
use std::any::Any;
use std::sync::{Arc, PoisonError, RwLock};

/// Wraps a disk with a backing file: every cluster that a read touches and that the top layer does not have
/// is written there, so that the next read does not need the backing file. A disk without backing file, or
/// without clusters, is left as it is.
///
/// A read returns once its clusters are copied; where copying fails, the read fails. Copies are durable after
/// the next flush.
pub struct CopyOnRead {
    inner: Arc<dyn GuestDisk>,
    /// Held alone by a copy and shared by changes, so that a copy never writes over newer bytes. Only changes
    /// through this wrapper count.
    changes: RwLock<()>,
}

/// Bytes that are copied at once.
const MAX_COPY: u64 = 1 << 20;

impl CopyOnRead {
    /// Wraps `inner`, which must be open for writing.
    pub fn new(inner: Arc<dyn GuestDisk>) -> Self {
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
    forward_guest_disk!(inner: size flush extent_at backing cluster_size zero_granularity);

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

    fn as_any(&self) -> Option<&dyn Any> {
        self.inner.as_any().filter(|disk| disk.is::<Image>())
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.change(|disk| disk.resize(size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStorage;
    use qcow2_core::{
        CreateOptions, ImageFormat, OpenOptions, Reference, ResolveError, ResolvedSource, Resolver,
    };

    /// Resolves every name to the same bytes.
    struct Below(Arc<MemoryStorage>);

    impl Resolver for Below {
        fn resolve(&self, _: Reference<'_>, _: bool) -> std::result::Result<ResolvedSource, ResolveError> {
            Ok(ResolvedSource::new(self.0.clone(), ImageFormat::Raw, "below"))
        }
    }

    /// An overlay on `bytes`, which tells reads that reach them apart by changing them later.
    fn overlay(bytes: Vec<u8>) -> (Arc<dyn GuestDisk>, Arc<MemoryStorage>) {
        let size = bytes.len() as u64;
        let below = Arc::new(MemoryStorage::from(bytes));
        let storage: Arc<dyn qcow2_core::Storage> = Arc::new(MemoryStorage::new());
        let mut options = CreateOptions::new(size);
        options = options.with_backing("below", "raw");
        qcow2_core::create(&storage, None, &options).unwrap();
        let source = ResolvedSource::new(storage, ImageFormat::Qcow2, "top");
        let mut options = OpenOptions::default();
        options.writable = true;
        let source = source.with_resolver(Arc::new(Below(below.clone())));
        (qcow2_core::open_disk(source, &options).unwrap(), below)
    }

    fn read(disk: &dyn GuestDisk, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        disk.read_at(GuestOffset::new(offset), &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_was_read_needs_the_backing_file_no_more() {
        const CLUSTER: u64 = 64 * 1024;
        let (inner, below) = overlay(vec![5; 3 * CLUSTER as usize + 100]);
        let disk = CopyOnRead::new(inner.clone());
        disk.write_at(GuestOffset::new(CLUSTER), &[9; 10]).unwrap();
        // Two clusters, of which one is there, and the last, which the end cuts.
        assert_eq!(read(&disk, CLUSTER - 1, 3), [5, 9, 9]);
        assert_eq!(read(&disk, 3 * CLUSTER, 1), [5]);
        qcow2_core::Storage::write_at(&*below, qcow2_core::HostOffset::new(0), &[1; 3 * 65536 + 100])
            .unwrap();
        assert_eq!(read(&disk, 0, 2), [5, 5]);
        assert_eq!(read(&disk, 2 * CLUSTER - 1, 2), [5, 1]);
        assert_eq!(read(&disk, 3 * CLUSTER + 98, 2), [5, 5]);
        assert_eq!(read(&*inner, CLUSTER + 9, 2), [9, 5]);
    }

    #[test]
    fn a_disk_without_backing_file_is_left_alone() {
        let storage = Arc::new(crate::TraceStorage::new(Arc::new(MemoryStorage::with_len(1 << 20))));
        let disk = CopyOnRead::new(Arc::new(qcow2_core::RawDisk::new(storage.clone(), true).unwrap()));
        assert_eq!(read(&disk, 10, 2), [0, 0]);
        assert_eq!(storage.counts().writes, 0);
    }
}
