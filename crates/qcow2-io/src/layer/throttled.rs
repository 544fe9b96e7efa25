//! Storages and disks whose requests wait for a group's limits.

use super::throttle_group::{RequestKind, ThrottleGroup};
use qcow2_core::{
    GuestDisk, GuestOffset, GuestRange, HostOffset, Result, Storage, StorageError, ZeroMode,
    forward_guest_disk, forward_storage,
};
use std::sync::Arc;

/// Wraps a storage: each read, write, zeroing and discard waits until the group lets it go.
pub struct ThrottledStorage {
    inner: Arc<dyn Storage>,
    group: Arc<ThrottleGroup>,
}

impl ThrottledStorage {
    /// Wraps `inner`, which keeps the limits of `group`.
    pub fn new(inner: Arc<dyn Storage>, group: Arc<ThrottleGroup>) -> Self {
        Self { inner, group }
    }
}

impl Storage for ThrottledStorage {
    forward_storage!(inner:
        len allocate set_len flush extent_at status_at limits used_bytes events guest_disk
    );

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> std::result::Result<usize, StorageError> {
        self.group.pass(RequestKind::Read, buf.len() as u64);
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> std::result::Result<(), StorageError> {
        self.group.pass(RequestKind::Write, buf.len() as u64);
        self.inner.write_at(offset, buf)
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> std::result::Result<(), StorageError> {
        self.group.pass(RequestKind::Write, bufs.iter().map(|buf| buf.len() as u64).sum());
        self.inner.write_vectored_at(offset, bufs)
    }

    fn write_zeroes(
        &self,
        offset: HostOffset,
        len: u64,
        mode: ZeroMode,
    ) -> std::result::Result<(), StorageError> {
        self.group.pass(RequestKind::Write, len);
        self.inner.write_zeroes(offset, len, mode)
    }

    fn discard(&self, offset: HostOffset, len: u64) -> std::result::Result<(), StorageError> {
        self.group.pass(RequestKind::Write, len);
        self.inner.discard(offset, len)
    }
}

/// The same for a guest disk.
pub struct ThrottledDisk {
    inner: Arc<dyn GuestDisk>,
    group: Arc<ThrottleGroup>,
}

impl ThrottledDisk {
    /// Wraps `inner`, which keeps the limits of `group`.
    pub fn new(inner: Arc<dyn GuestDisk>, group: Arc<ThrottleGroup>) -> Self {
        Self { inner, group }
    }
}

impl GuestDisk for ThrottledDisk {
    forward_guest_disk!(inner: size flush extent_at backing cluster_size zero_granularity resize);

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.group.pass(RequestKind::Read, buf.len() as u64);
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        self.group.pass(RequestKind::Write, buf.len() as u64);
        self.inner.write_at(offset, buf)
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        self.group.pass(RequestKind::Write, range.len());
        self.inner.write_zeroes(range, mode)
    }

    fn discard(&self, range: GuestRange) -> Result<()> {
        self.group.pass(RequestKind::Write, range.len());
        self.inner.discard(range)
    }

    fn filtered(&self) -> Option<&Arc<dyn GuestDisk>> {
        Some(&self.inner)
    }
}
