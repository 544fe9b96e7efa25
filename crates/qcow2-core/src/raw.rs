//! A raw disk: a storage as a guest disk.

use crate::error::{Error, ErrorKind, Result};
use crate::port::disk::{DiskExtent, ExtentState, GuestDisk};
use crate::port::event::{Event, Events};
use crate::port::storage::{Storage, ZeroMode};
use crate::sync::atomic::{AtomicU64, Ordering};
use ::alloc::format;
use ::alloc::sync::Arc;
use core::any::Any;
use qcow2_format::{GuestOffset, GuestRange, HostOffset};

/// A raw disk: guest offset and host offset are the same, and the size is the storage's length in bytes.
pub struct RawDisk {
    storage: Arc<dyn Storage>,
    size: AtomicU64,
    writable: bool,
    events: Option<Arc<dyn Events>>,
}

impl RawDisk {
    /// A disk of the storage's present length. Disk: only queries the length. Errors: `Storage`.
    pub fn new(storage: Arc<dyn Storage>, writable: bool) -> Result<Self> {
        let size = AtomicU64::new(storage.len()?);
        let events = storage.events();
        Ok(Self { storage, size, writable, events })
    }

    /// The storage.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// True if the disk was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    fn event(&self, event: Event) {
        if let Some(events) = &self.events {
            events.event(event);
        }
    }

    fn check(&self, range: Option<GuestRange>) -> Result<GuestRange> {
        let size = self.size();
        range.filter(|r| r.end().value() <= size).ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange, format!("range passes the end of the disk at {size:#x}"))
        })
    }

    fn check_change(&self, range: Option<GuestRange>) -> Result<GuestRange> {
        if !self.writable {
            return Err(Error::new(ErrorKind::ReadOnly, "disk is opened for reading only"));
        }
        self.check(range)
    }
}

fn host(offset: GuestOffset) -> HostOffset {
    HostOffset::new(offset.value())
}

impl dyn GuestDisk + '_ {
    /// This disk as a raw disk, or `None` if it is of another kind.
    pub fn as_raw(&self) -> Option<&RawDisk> {
        self.as_any()?.downcast_ref()
    }
}

/// The guest disk whose bytes `storage` shows, and the guest offset of its byte 0.
pub fn shown_disk(storage: &dyn Storage) -> Option<(Arc<dyn GuestDisk>, GuestOffset)> {
    let (disk, start) = storage.guest_disk()?;
    Some((Arc::clone(disk.downcast_ref()?), start))
}

/// Length of the run at the start of `range`, at most that of the range, and whether the top layer of `disk`
/// has it allocated. A raw disk that shows the bytes of an image has those that the top layer of that image
/// has; all others have all of their bytes. Disk: may read tables. Errors: as [`GuestDisk::extent_at`].
pub fn allocated_at(disk: &dyn GuestDisk, range: GuestRange) -> Result<(u64, bool)> {
    let extent = disk.extent_at(range)?;
    let shown = disk.unfiltered().as_raw().and_then(|raw| shown_disk(&**raw.storage()));
    if let Some((inner, start)) = shown
        && let Some(start) = start.checked_add(range.start().value())
        && start.value() < inner.size()
    {
        let left = extent.len.min(inner.size() - start.value());
        if let Some(range) = GuestRange::new(start, left) {
            return allocated_at(&*inner, range);
        }
    }
    Ok((extent.len, extent.state != ExtentState::Unallocated))
}

impl GuestDisk for RawDisk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.check(GuestRange::new(offset, buf.len() as u64))?;
        self.event(Event::ReadAio);
        Ok(self.storage.read_padded(host(offset), buf)?)
    }

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        self.check_change(GuestRange::new(offset, buf.len() as u64))?;
        self.event(Event::WriteAio);
        Ok(self.storage.write_at(host(offset), buf)?)
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        self.check_change(Some(range))?;
        Ok(self.storage.write_zeroes(host(range.start()), range.len(), mode)?)
    }

    fn discard(&self, range: GuestRange) -> Result<()> {
        self.check_change(Some(range))?;
        Ok(self.storage.discard(host(range.start()), range.len())?)
    }

    fn flush(&self) -> Result<()> {
        self.event(Event::FlushToDisk);
        Ok(self.storage.flush()?)
    }

    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        self.check(Some(range))?;
        let stored = self.storage.len()?.saturating_sub(range.start().value());
        if stored == 0 {
            return Ok(DiskExtent {
                len: range.len(),
                state: ExtentState::Zero { host: Some(host(range.start())) },
            });
        }
        let extent = self.storage.extent_at(host(range.start()), range.len().min(stored))?;
        let host = Some(host(range.start()));
        let state = if extent.data { ExtentState::Data { host } } else { ExtentState::Zero { host } };
        Ok(DiskExtent { len: extent.len, state })
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.check_change(GuestRange::new(GuestOffset::new(0), 0))?;
        self.storage.set_len(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
