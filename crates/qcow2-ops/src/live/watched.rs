//! A disk whose changes somebody watches.

use super::layer::range;
use qcow2_core::{DiskExtent, Error, ErrorKind, GuestDisk, GuestOffset, GuestRange, Result, ZeroMode};
use std::sync::Arc;

/// Is told of every change, in the thread that makes it. It returns no errors: a change fails only if the
/// disk itself fails.
pub(super) trait Watcher: Send + Sync {
    /// These bytes are about to change.
    fn before(&self, bytes: GuestRange) {
        let _ = bytes;
    }

    /// These bytes have changed, or a part of them has, as after an error.
    fn after(&self, bytes: GuestRange) {
        let _ = bytes;
    }
}

/// `disk`, with `watcher` told of its changes. It hides what kind of disk it is, so that nobody writes past
/// the watcher.
pub(super) struct Watched {
    pub(super) disk: Arc<dyn GuestDisk>,
    pub(super) watcher: Arc<dyn Watcher>,
}

impl Watched {
    fn change(&self, start: GuestOffset, len: u64, make: impl FnOnce() -> Result<()>) -> Result<()> {
        // What is outside of the disk cannot change.
        let end = start.value().saturating_add(len).min(self.size());
        let inside = range(start.value().min(end), end);
        if inside.is_empty() {
            return make();
        }
        self.watcher.before(inside);
        let made = make();
        self.watcher.after(inside);
        made
    }
}

impl GuestDisk for Watched {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.disk.read_at(offset, buf)
    }

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        self.change(offset, buf.len() as u64, || self.disk.write_at(offset, buf))
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        self.change(range.start(), range.len(), || self.disk.write_zeroes(range, mode))
    }

    fn discard(&self, range: GuestRange) -> Result<()> {
        self.change(range.start(), range.len(), || self.disk.discard(range))
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        self.disk.extent_at(range)
    }

    fn backing(&self) -> Option<&Arc<dyn GuestDisk>> {
        self.disk.backing()
    }

    fn cluster_size(&self) -> u64 {
        self.disk.cluster_size()
    }

    fn zero_granularity(&self) -> u64 {
        self.disk.zero_granularity()
    }

    fn resize(&self, _size: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Busy, "the layers of this disk are being changed already"))
    }
}
