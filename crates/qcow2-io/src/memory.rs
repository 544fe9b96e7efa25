//! Growable storage in memory: for tests, tools, and temporary images.
//!
//! Content is kept in pages of 64 KiB, allocated when something other than zeroes is first written to them,
//! so a large sparse image costs little memory. Pages are spread over shards with one lock each, so that
//! threads at different offsets rarely contend.

use crate::error::Call;
use qcow2_core::{HostOffset, Limits, Storage, StorageError, StorageExtent, ZeroMode};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Bytes in a page.
const PAGE_LEN: u64 = 64 * 1024;
/// Number of shards, each with its own lock.
const SHARD_COUNT: u64 = 16;

type Page = Box<[u8]>;
type Shard = RwLock<BTreeMap<u64, Page>>;

/// A [`Storage`] in memory. Share it with `Arc`. `flush` does nothing: the content ends with the process
/// anyway.
///
/// ```
/// use qcow2_core::{HostOffset, Storage};
/// use qcow2_io::MemoryStorage;
///
/// let storage = MemoryStorage::new();
/// storage.write_at(HostOffset::new(1 << 40), b"far away")?;
/// assert_eq!(storage.len()?, (1 << 40) + 8);
/// assert_eq!(storage.used_bytes()?, Some(64 * 1024));
/// # Ok::<(), qcow2_core::StorageError>(())
/// ```
#[derive(Debug, Default)]
pub struct MemoryStorage {
    /// Held shared by every call and exclusively by `set_len`, so that no write runs half before and half
    /// after a truncation.
    resize: RwLock<()>,
    len: AtomicU64,
    shards: [Shard; SHARD_COUNT as usize],
}

impl MemoryStorage {
    /// An empty storage.
    pub fn new() -> Self {
        Self::default()
    }

    /// A storage of `len` zero bytes, all of them a hole.
    pub fn with_len(len: u64) -> Self {
        Self { len: AtomicU64::new(len), ..Self::default() }
    }

    /// A copy of the whole content. Meant for small storages: running out of memory aborts the process.
    pub fn to_vec(&self) -> Vec<u8> {
        let _guard = read(&self.resize);
        let mut bytes = vec![0; self.length() as usize];
        self.copy_out(0, &mut bytes);
        bytes
    }

    fn length(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn shard(&self, page: u64) -> &Shard {
        &self.shards[(page % SHARD_COUNT) as usize]
    }

    /// Copies the bytes from `start` on, holes as zeroes; does not check the storage's length.
    fn copy_out(&self, start: u64, out: &mut [u8]) {
        for piece in pieces(start, out.len() as u64) {
            let target = &mut out[piece.done..piece.done + piece.len];
            match read(self.shard(piece.page)).get(&piece.page) {
                Some(page) => target.copy_from_slice(&page[piece.at..piece.at + piece.len]),
                None => target.fill(0),
            }
        }
    }

    fn copy_in(&self, start: u64, data: &[u8]) {
        for piece in pieces(start, data.len() as u64) {
            let data = &data[piece.done..piece.done + piece.len];
            let mut pages = write(self.shard(piece.page));
            // Zeroes are what there is already, in a page that does not exist or that nothing was written to:
            // the memory of new tables is not even touched.
            if is_zero(data) && pages.get(&piece.page).is_none_or(|page| is_zero(&page[piece.range()])) {
                continue;
            }
            let page = pages.entry(piece.page).or_insert_with(|| vec![0; PAGE_LEN as usize].into());
            page[piece.range()].copy_from_slice(data);
        }
    }

    /// Makes `start..end` read as zeroes: drops whole pages and zeroes the edges in pages that exist.
    fn clear(&self, start: u64, end: u64) {
        let edge = |from: u64, to: u64| {
            for piece in pieces(from, to.saturating_sub(from)) {
                if let Some(page) = write(self.shard(piece.page)).get_mut(&piece.page) {
                    page[piece.at..piece.at + piece.len].fill(0);
                }
            }
        };
        let first_whole = start.div_ceil(PAGE_LEN);
        let end_whole = end / PAGE_LEN;
        if first_whole >= end_whole {
            return edge(start, end);
        }
        edge(start, first_whole * PAGE_LEN);
        for shard in &self.shards {
            let mut pages = write(shard);
            let gone: Vec<u64> = pages.range(first_whole..end_whole).map(|(&page, _)| page).collect();
            for page in gone {
                pages.remove(&page);
            }
        }
        edge(end_whole * PAGE_LEN, end);
    }

    fn has_page(&self, page: u64) -> bool {
        read(self.shard(page)).contains_key(&page)
    }

    /// The first existing page at or after `page`.
    fn next_page(&self, page: u64) -> Option<u64> {
        self.shards.iter().filter_map(|s| read(s).range(page..).next().map(|(&p, _)| p)).min()
    }
}

impl From<Vec<u8>> for MemoryStorage {
    fn from(bytes: Vec<u8>) -> Self {
        let storage = Self::with_len(bytes.len() as u64);
        storage.copy_in(0, &bytes);
        storage
    }
}

impl Storage for MemoryStorage {
    fn len(&self) -> Result<u64, StorageError> {
        Ok(self.length())
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        let _guard = read(&self.resize);
        let available = self.length().saturating_sub(offset.value());
        let count = available.min(buf.len() as u64) as usize;
        self.copy_out(offset.value(), &mut buf[..count]);
        Ok(count)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        let end = Call::new("write", offset, buf.len() as u64).end()?;
        if buf.is_empty() {
            return Ok(());
        }
        let _guard = read(&self.resize);
        // Content before length: a reader that sees the new length must find the bytes.
        self.copy_in(offset.value(), buf);
        self.len.fetch_max(end, Ordering::AcqRel);
        Ok(())
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, _mode: ZeroMode) -> Result<(), StorageError> {
        let end = Call::new("zero", offset, len).end()?;
        if len == 0 {
            return Ok(());
        }
        let _guard = read(&self.resize);
        self.clear(offset.value(), end);
        self.len.fetch_max(end, Ordering::AcqRel);
        Ok(())
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let end = Call::new("discard", offset, len).end()?;
        let _guard = read(&self.resize);
        self.clear(offset.value(), end.min(self.length()));
        Ok(())
    }

    /// Only grows the length: memory cannot be reserved.
    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let end = Call::new("allocate", offset, len).end()?;
        if len > 0 {
            let _guard = read(&self.resize);
            self.len.fetch_max(end, Ordering::AcqRel);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        Call::new("resize", HostOffset::new(0), len).end()?;
        let _guard = write(&self.resize);
        let old = self.len.swap(len, Ordering::AcqRel);
        if len < old {
            // Rounded up, so that the old last page is dropped whole.
            self.clear(len, old.next_multiple_of(PAGE_LEN));
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), StorageError> {
        Ok(())
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let start = offset.value();
        let end = Call::new("map", offset, len).end()?;
        let first = start / PAGE_LEN;
        let data = self.has_page(first);
        let stop = if data {
            let mut page = first + 1;
            while page * PAGE_LEN < end && self.has_page(page) {
                page += 1;
            }
            page * PAGE_LEN
        } else {
            self.next_page(first).map_or(end, |page| page * PAGE_LEN)
        };
        Ok(StorageExtent { len: stop.min(end) - start, data })
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.fast_zeroes = true;
        limits
    }

    fn used_bytes(&self) -> Result<Option<u64>, StorageError> {
        let pages: usize = self.shards.iter().map(|shard| read(shard).len()).sum();
        Ok(Some(pages as u64 * PAGE_LEN))
    }
}

/// The part of a range in one page.
struct Piece {
    page: u64,
    /// Offset in the page.
    at: usize,
    len: usize,
    /// Bytes of the range before this piece.
    done: usize,
}

impl Piece {
    /// The bytes in the page.
    fn range(&self) -> Range<usize> {
        self.at..self.at + self.len
    }
}

/// True if all bytes are zero. Stops soon where they are not.
fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(256).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Splits `len` bytes from `start` at page boundaries.
fn pieces(start: u64, len: u64) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = (start + done) % PAGE_LEN;
        let piece = Piece {
            page: (start + done) / PAGE_LEN,
            at: at as usize,
            len: (PAGE_LEN - at).min(len - done) as usize,
            done: done as usize,
        };
        done += piece.len as u64;
        Some(piece)
    })
}

/// Read lock. Poisoning is ignored: a panicking thread leaves whole pages behind, so the content stays
/// usable.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: HostOffset = HostOffset::new(100_000);

    #[test]
    fn a_write_across_pages_reads_back() {
        let storage = MemoryStorage::new();
        let data: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
        storage.write_at(AT, &data).unwrap();
        assert_eq!(storage.len().unwrap(), 300_000);
        let bytes = storage.to_vec();
        assert!(bytes[..100_000].iter().all(|&b| b == 0));
        assert_eq!(&bytes[100_000..], data);
    }

    #[test]
    fn holes_take_no_memory() {
        let storage = MemoryStorage::with_len(1 << 44);
        storage.write_zeroes(HostOffset::new(0), 1 << 44, ZeroMode::KeepAllocated).unwrap();
        storage.write_at(HostOffset::new(1 << 43), &[1]).unwrap();
        assert_eq!(storage.used_bytes().unwrap(), Some(PAGE_LEN));
        let hole = storage.extent_at(HostOffset::new(5), 1 << 43).unwrap();
        assert_eq!(hole, StorageExtent { len: (1 << 43) - 5, data: false });
        let data = storage.extent_at(HostOffset::new(1 << 43), 1 << 43).unwrap();
        assert_eq!(data, StorageExtent { len: PAGE_LEN, data: true });
        storage.discard(HostOffset::new(0), 1 << 44).unwrap();
        assert_eq!(storage.used_bytes().unwrap(), Some(0));
    }

    #[test]
    fn zeroing_keeps_bytes_outside_the_range() {
        let storage = MemoryStorage::from(vec![7; 5 * PAGE_LEN as usize]);
        storage.write_zeroes(HostOffset::new(10), 4 * PAGE_LEN, ZeroMode::MayUnmap).unwrap();
        let bytes = storage.to_vec();
        assert!(bytes[..10].iter().all(|&b| b == 7));
        assert!(bytes[10..10 + 4 * PAGE_LEN as usize].iter().all(|&b| b == 0));
        assert!(bytes[10 + 4 * PAGE_LEN as usize..].iter().all(|&b| b == 7));
        assert_eq!(storage.used_bytes().unwrap(), Some(2 * PAGE_LEN));
    }

    #[test]
    fn truncated_bytes_read_as_zeroes_after_growing_again() {
        let storage = MemoryStorage::from(vec![7; 1000]);
        storage.set_len(10).unwrap();
        storage.set_len(1000).unwrap();
        assert_eq!(storage.to_vec()[..10], [7; 10]);
        assert!(storage.to_vec()[10..].iter().all(|&b| b == 0));
    }
}
