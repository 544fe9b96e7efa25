//! A storage on a simulated file system with limited free space: written or reserved blocks count, holes do
//! not.

use qcow2_core::{HostOffset, Storage, StorageError, StorageErrorKind, ZeroMode, forward_storage};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes in a file system block.
const BLOCK: u64 = 4096;

/// A growable storage whose blocks use up free space once they are written or reserved.
pub struct RoomStorage {
    inner: Arc<dyn Storage>,
    state: Mutex<Room>,
}

#[derive(Debug, Default)]
struct Room {
    /// Free blocks.
    free: u64,
    taken: BTreeSet<u64>,
}

impl RoomStorage {
    /// Wraps `inner`, which must be empty, with `free` free blocks of 4096 bytes.
    pub fn new(inner: Arc<dyn Storage>, free: u64) -> Self {
        Self { inner, state: Mutex::new(Room { free, taken: BTreeSet::new() }) }
    }

    /// Sets the number of free blocks.
    pub fn set_free(&self, free: u64) {
        self.locked().free = free;
    }

    /// Number of used blocks.
    pub fn taken(&self) -> u64 {
        self.locked().taken.len() as u64
    }

    fn locked(&self) -> MutexGuard<'_, Room> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates the blocks of a range. Errors: how many bytes of it fit, if not all do.
    fn take(&self, offset: HostOffset, len: u64) -> Result<(), u64> {
        let start = offset.value();
        let mut room = self.locked();
        for block in start / BLOCK..(start + len).div_ceil(BLOCK) {
            if room.taken.contains(&block) {
                continue;
            }
            if room.free == 0 {
                return Err((block * BLOCK).saturating_sub(start));
            }
            room.free -= 1;
            room.taken.insert(block);
        }
        Ok(())
    }

    fn give_back(&self, blocks: Range<u64>) {
        let mut room = self.locked();
        for block in blocks {
            room.free += u64::from(room.taken.remove(&block));
        }
    }
}

fn full() -> StorageError {
    StorageError::new(StorageErrorKind::NoSpace, "no room on the disk")
}

impl Storage for RoomStorage {
    forward_storage!(inner: len read_at flush extent_at limits);

    /// Writes as much as fits, then fails with `NoSpace`.
    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        match self.take(offset, buf.len() as u64) {
            Ok(()) => self.inner.write_at(offset, buf),
            Err(fits) => {
                self.inner.write_at(offset, &buf[..fits as usize])?;
                Err(full())
            }
        }
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        if mode == ZeroMode::KeepAllocated {
            self.take(offset, len).map_err(|_| full())?;
        }
        self.inner.write_zeroes(offset, len, mode)
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.inner.discard(offset, len)?;
        self.give_back(offset.value().div_ceil(BLOCK)..(offset.value() + len) / BLOCK);
        Ok(())
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.take(offset, len).map_err(|_| full())?;
        self.inner.allocate(offset, len)
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        self.inner.set_len(len)?;
        let mut room = self.locked();
        let cut = room.taken.split_off(&len.div_ceil(BLOCK));
        room.free += cut.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::PageStorage;

    #[test]
    fn holes_use_no_blocks() {
        let storage = RoomStorage::new(Arc::new(PageStorage::default()), 2);
        let at = HostOffset::new;
        storage.set_len(1 << 20).unwrap();
        storage.write_at(at(4000), &[1; 200]).unwrap();
        assert_eq!(storage.taken(), 2);
        storage.write_at(at(5000), &[2; 10]).unwrap();
        let part = storage.write_at(at(8000), &[3; 1000]).unwrap_err();
        assert_eq!(part.kind(), StorageErrorKind::NoSpace);
        let mut seen = [0; 400];
        storage.read_at(at(7996), &mut seen).unwrap();
        assert_eq!((seen[3], seen[4], seen[195], seen[196]), (0, 3, 3, 0));
        storage.discard(at(0), 4096).unwrap();
        storage.allocate(at(100 << 10), 1).unwrap();
        assert!(storage.allocate(at(200 << 10), 1).is_err());
        storage.set_len(0).unwrap();
        assert_eq!(storage.taken(), 0);
    }
}
