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
    /// How many backing files are copied from; `None`: all, and zeroes that none of them has.
    layers: Option<usize>,
    /// Held alone by a copy and shared by changes, so that a copy never writes over newer bytes. Only changes
    /// through this wrapper count.
    changes: RwLock<()>,
}

/// Bytes that are copied at once.
const MAX_COPY: u64 = 1 << 20;

impl CopyOnRead {
    /// Wraps `inner`, which must be open for writing.
    pub fn new(inner: Arc<dyn GuestDisk>) -> Self {
        Self { inner, layers: None, changes: RwLock::new(()) }
    }

    /// The same, which copies only what one of the first `layers` backing files has itself; `None`:
    /// everything.
    #[must_use]
    pub fn from_layers(self, layers: Option<usize>) -> Self {
        Self { layers, ..self }
    }

    /// How long the run at the start of `range` is, and whether it is to be copied.
    fn missing_at(&self, range: GuestRange) -> Result<(u64, bool)> {
        let extent = self.inner.extent_at(range)?;
        let (mut len, is_missing) = (extent.len, extent.state == ExtentState::Unallocated);
        let Some(layers) = self.layers.filter(|_| is_missing) else { return Ok((len, is_missing)) };
        let mut below = self.inner.backing();
        for _ in 0..layers {
            let Some(layer) = below else { break };
            let inside = layer.size().saturating_sub(range.start().value()).min(len);
            let Some(range) = GuestRange::new(range.start(), inside).filter(|_| inside > 0) else { break };
            let extent = layer.extent_at(range)?;
            len = extent.len;
            if extent.state != ExtentState::Unallocated {
                return Ok((len, true));
            }
            below = layer.backing();
        }
        Ok((len, false))
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
            let (len, is_missing) = self.missing_at(range)?;
            if is_missing {
                self.copy(range.start(), len)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Copies `len` bytes at `start`; zeroes are stored as such.
    fn copy(&self, start: GuestOffset, len: u64) -> Result<()> {
        let mut bytes = vec![0; len as usize];
        self.inner.read_at(start, &mut bytes)?;
        match GuestRange::new(start, len) {
            Some(range) if is_zero(&bytes) => self.inner.write_zeroes(range, ZeroMode::MayUnmap),
            _ => self.inner.write_at(start, &bytes),
        }
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

    fn filtered(&self) -> Option<&Arc<dyn GuestDisk>> {
        Some(&self.inner)
    }
}

/// True if every byte is zero.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
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
    fn zeroes_are_stored_as_zeroes() {
        const CLUSTER: u64 = 64 * 1024;
        let mut below = vec![0; 3 * CLUSTER as usize];
        below[0] = 1;
        let (inner, _) = overlay(below);
        let disk = CopyOnRead::new(inner.clone());
        read(&disk, 5, 1);
        read(&disk, 2 * CLUSTER, 1);
        let state = |at: u64| {
            let range = GuestRange::new(GuestOffset::new(at), CLUSTER).unwrap();
            inner.extent_at(range).unwrap().state
        };
        assert!(matches!(state(0), ExtentState::Data { .. }));
        assert_eq!(state(CLUSTER), ExtentState::Unallocated);
        assert_eq!(state(2 * CLUSTER), ExtentState::Zero { host: None });
    }

    #[test]
    fn only_what_the_given_layers_have_is_copied() {
        let (inner, _) = overlay(vec![5; 3 * 65_536]);
        let allocated = |disk: &CopyOnRead| {
            read(disk, 0, 1);
            let range = GuestRange::new(GuestOffset::new(0), 1).unwrap();
            inner.extent_at(range).unwrap().state != ExtentState::Unallocated
        };
        assert!(!allocated(&CopyOnRead::new(inner.clone()).from_layers(Some(0))));
        assert!(allocated(&CopyOnRead::new(inner.clone()).from_layers(Some(1))));
    }

    #[test]
    fn a_disk_without_backing_file_is_left_alone() {
        let storage = Arc::new(crate::TraceStorage::new(Arc::new(MemoryStorage::with_len(1 << 20))));
        let disk = CopyOnRead::new(Arc::new(qcow2_core::RawDisk::new(storage.clone(), true).unwrap()));
        assert_eq!(read(&disk, 10, 2), [0, 0]);
        assert_eq!(storage.counts().writes, 0);
    }
}
