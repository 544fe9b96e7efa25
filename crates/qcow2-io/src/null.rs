//! A null device: reads return zeroes, writes are dropped.

use crate::error::Call;
use qcow2_core::{
    HostOffset, Length, Limits, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode,
};
use std::thread;
use std::time::Duration;

/// A storage of fixed length that stores nothing. Reads return zeroes; `promises_zeroes` only decides what
/// `extent_at` reports.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NullStorage {
    /// Length in bytes.
    pub len: u64,
    /// True if extents are reported as holes (known zeroes), false if as data.
    pub promises_zeroes: bool,
    /// Delay of each request.
    pub latency: Duration,
}

impl NullStorage {
    /// A null device of `len` bytes, without delay, reported as data.
    pub fn new(len: u64) -> Self {
        Self { len, promises_zeroes: false, latency: Duration::ZERO }
    }

    fn request(&self, call: Call) -> Result<(), StorageError> {
        if call.end()? > self.len {
            return Err(call.past_end(self.len));
        }
        if !self.latency.is_zero() {
            thread::sleep(self.latency);
        }
        Ok(())
    }
}

impl Storage for NullStorage {
    fn len(&self) -> Result<u64, StorageError> {
        Ok(self.len)
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        let inside = self.len.saturating_sub(offset.value()).min(buf.len() as u64);
        if inside > 0 {
            self.request(Call::new("read", offset, inside))?;
        }
        // Always clear the buffer, so that stale memory never leaks to the caller.
        buf[..inside as usize].fill(0);
        Ok(inside as usize)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.request(Call::new("write", offset, buf.len() as u64))
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, _mode: ZeroMode) -> Result<(), StorageError> {
        self.request(Call::new("zero", offset, len))
    }

    fn discard(&self, _offset: HostOffset, _len: u64) -> Result<(), StorageError> {
        Ok(())
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.request(Call::new("allocate", offset, len))
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        if len == self.len {
            return Ok(());
        }
        let message = format!("resize to {len} bytes: a null device has a fixed size of {} bytes", self.len);
        Err(StorageError::new(StorageErrorKind::FixedLength(Length::Fixed), message))
    }

    fn flush(&self) -> Result<(), StorageError> {
        self.request(Call::new("flush", HostOffset::new(0), 0))
    }

    fn extent_at(&self, _offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        Ok(StorageExtent { len, data: !self.promises_zeroes })
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.length = Length::Fixed;
        limits.fast_zeroes = true;
        limits
    }

    fn used_bytes(&self) -> Result<Option<u64>, StorageError> {
        Ok(Some(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_dropped_and_the_size_is_fixed() {
        let disk = NullStorage::new(1000);
        disk.write_at(HostOffset::new(990), &[1; 10]).unwrap();
        let mut buf = [7; 20];
        assert_eq!(disk.read_at(HostOffset::new(990), &mut buf).unwrap(), 10);
        assert_eq!(buf[..11], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
        assert!(disk.write_at(HostOffset::new(991), &[1; 10]).is_err());
        assert!(disk.set_len(1).is_err());
    }
}
