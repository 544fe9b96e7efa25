//! A part of a storage as a storage of its own.

use crate::error::Call;
use core::any::Any;
use qcow2_core::{
    Events, GuestOffset, HostOffset, Length, Limits, Storage, StorageError, StorageErrorKind, StorageExtent,
    StorageStatus, ZeroMode, forward_storage,
};
use std::sync::Arc;

/// The bytes of a storage from an offset on, so many of them; byte 0 of the window is that offset. The
/// storage counts in whole sectors of 512 bytes: what its last one lacks reads as zeroes.
pub struct WindowStorage {
    inner: Arc<dyn Storage>,
    start: u64,
    /// `None`: up to the end of the storage, which may grow.
    len: Option<u64>,
}

impl WindowStorage {
    /// The window of `inner` from byte `start` on. `len`: its bytes; `None`: all up to the end. Errors:
    /// `OutOfRange` where the window passes the end of the storage's last sector.
    pub fn new(inner: Arc<dyn Storage>, start: u64, len: Option<u64>) -> Result<Self, StorageError> {
        let end = start.checked_add(len.unwrap_or(0));
        if end.is_none_or(|end| end > i64::MAX as u64) || end > Some(sectors(inner.len()?)) {
            let message = format!("a window of {len:?} bytes at {start} passes the end of the storage");
            return Err(StorageError::new(StorageErrorKind::OutOfRange, message));
        }
        Ok(Self { inner, start, len })
    }

    /// The place of `call` underneath.
    fn place(&self, call: Call) -> Result<HostOffset, StorageError> {
        let end = call.end()?;
        if let Some(len) = self.len.filter(|&len| end > len) {
            return Err(call.past_end(len));
        }
        let place = call.offset.value().checked_add(self.start);
        let place =
            place.filter(|place| place.checked_add(call.len).is_some_and(|end| end <= i64::MAX as u64));
        Ok(HostOffset::new(place.ok_or_else(|| call.past_end(i64::MAX as u64))?))
    }

    fn visible(&self, inner: u64) -> u64 {
        let rest = sectors(inner).saturating_sub(self.start);
        self.len.map_or(rest, |len| len.min(rest))
    }
}

impl Storage for WindowStorage {
    forward_storage!(inner: flush used_bytes);

    fn len(&self) -> Result<u64, StorageError> {
        Ok(self.visible(self.inner.len()?))
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        let inside = self.len()?.saturating_sub(offset.value()).min(buf.len() as u64);
        if inside == 0 {
            return Ok(0);
        }
        let place = self.place(Call::new("read", offset, inside))?;
        let buf = &mut buf[..inside as usize];
        let read = self.inner.read_at(place, buf)?;
        buf[read..].fill(0);
        Ok(buf.len())
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.inner.write_at(self.place(Call::new("write", offset, buf.len() as u64))?, buf)
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        let len = bufs.iter().fold(0u64, |sum, buf| sum.saturating_add(buf.len() as u64));
        self.inner.write_vectored_at(self.place(Call::new("write", offset, len))?, bufs)
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        self.inner.write_zeroes(self.place(Call::new("zero", offset, len))?, len, mode)
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let inside = self.len()?.saturating_sub(offset.value()).min(len);
        let place = self.place(Call::new("discard", offset, inside))?;
        match self.inner.len()?.saturating_sub(place.value()).min(inside) {
            0 => Ok(()),
            inside => self.inner.discard(place, inside),
        }
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.inner.allocate(self.place(Call::new("allocate", offset, len))?, len)
    }

    /// A window of a given length has that length; one up to the end moves the end.
    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        let call = Call::new("resize", HostOffset::new(0), len);
        match self.len {
            Some(own) if own == len => Ok(()),
            Some(own) => Err(StorageError::new(
                StorageErrorKind::FixedLength(Length::Window),
                format!("resize to {len} bytes: the window has {own} and cannot change"),
            )),
            None => self.inner.set_len(self.place(call)?.value() + len),
        }
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let place = self.place(Call::new("map", offset, len))?;
        match self.inner.len()?.saturating_sub(place.value()) {
            0 => Ok(StorageExtent { len, data: false }),
            rest => self.inner.extent_at(place, len.min(rest)),
        }
    }

    fn status_at(&self, offset: HostOffset, len: u64) -> Result<Option<StorageStatus>, StorageError> {
        let place = self.place(Call::new("map", offset, len))?;
        match self.inner.len()?.saturating_sub(place.value()) {
            0 => Ok(None),
            rest => self.inner.status_at(place, len.min(rest)),
        }
    }

    fn limits(&self) -> Limits {
        let mut limits = self.inner.limits();
        if self.len.is_some() {
            limits.length = Length::Window;
        }
        // What is aligned here need not be aligned there.
        if !self.start.is_multiple_of(u64::from(limits.alignment.max(1))) {
            limits.alignment = 1;
        }
        limits
    }

    fn guest_disk(&self) -> Option<(&dyn Any, GuestOffset)> {
        let (disk, start) = self.inner.guest_disk()?;
        Some((disk, start.checked_add(self.start)?))
    }

    fn events(&self) -> Option<Arc<dyn Events>> {
        self.inner.events()
    }
}

/// `bytes` in whole sectors.
fn sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(SECTOR).unwrap_or(bytes)
}

const SECTOR: u64 = 512;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStorage;

    #[test]
    fn the_last_sector_is_a_whole_one() {
        let inner = Arc::new(MemoryStorage::from(vec![7, 8, 9]));
        let window = WindowStorage::new(inner.clone(), 1, None).unwrap();
        assert_eq!(window.len().unwrap(), 511);
        let mut buf = [1; 600];
        assert_eq!(window.read_at(HostOffset::new(0), &mut buf).unwrap(), 511);
        assert_eq!(buf[..3], [8, 9, 0]);
        assert_eq!(window.extent_at(HostOffset::new(2), 9).unwrap(), StorageExtent { len: 9, data: false });
        let window = WindowStorage::new(inner.clone(), 200, Some(312)).unwrap();
        window.write_at(HostOffset::new(0), &[4]).unwrap();
        assert_eq!((inner.len().unwrap(), window.len().unwrap()), (201, 312));
        window.discard(HostOffset::new(0), 312).unwrap();
        assert!(WindowStorage::new(inner.clone(), 200, Some(313)).is_err());
        assert!(WindowStorage::new(inner, 512, None).is_ok());
    }

    #[test]
    fn a_window_shows_its_part_and_no_more() {
        let inner = Arc::new(MemoryStorage::from((0..100).collect::<Vec<u8>>()));
        let window = WindowStorage::new(inner.clone(), 10, Some(20)).unwrap();
        let mut buf = [0; 30];
        assert_eq!(window.read_at(HostOffset::new(5), &mut buf).unwrap(), 15);
        assert_eq!(buf[..15], (15..30).collect::<Vec<u8>>());
        window.write_at(HostOffset::new(0), &[99]).unwrap();
        inner.read_at(HostOffset::new(9), &mut buf[..3]).unwrap();
        assert_eq!(buf[..3], [9, 99, 11]);
        assert_eq!(
            window.write_at(HostOffset::new(19), &[1, 2]).unwrap_err().kind(),
            StorageErrorKind::OutOfRange
        );
        assert_eq!(window.set_len(19).unwrap_err().kind(), StorageErrorKind::FixedLength(Length::Window));
        assert!(WindowStorage::new(inner.clone(), 90, Some(423)).is_err());
        assert!(WindowStorage::new(inner, 513, None).is_err());
    }
}
