//! Bounded reads of a file that may be of any length.

use qcow2_core::{HostOffset, Storage, StorageError};
use std::sync::Arc;

/// The file that is looked at.
pub(super) struct Bytes<'a> {
    storage: &'a Arc<dyn Storage>,
    len: u64,
}

impl<'a> Bytes<'a> {
    pub(super) fn new(storage: &'a Arc<dyn Storage>) -> Result<Self, StorageError> {
        Ok(Self { storage, len: storage.len()? })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The bytes from `at` on: `len` of them, at most [`MAX_READ`], fewer at the end of the file, none behind
    /// it.
    pub(super) fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, StorageError> {
        let there = self.len.saturating_sub(at).min(len).min(MAX_READ);
        let mut bytes = vec![0; there as usize];
        if there > 0 {
            let read = self.storage.read_at(HostOffset::new(at), &mut bytes)?;
            bytes.truncate(read);
        }
        Ok(bytes)
    }

    /// The last `len` bytes, or all of a shorter file.
    pub(super) fn tail(&self, len: u64) -> Result<Vec<u8>, StorageError> {
        self.read(self.len.saturating_sub(len), len)
    }

    /// The place of the first byte that is not zero in `from..`, looked for in [`MAX_SCAN`] bytes behind
    /// `from` and in as many before the end.
    pub(super) fn first_nonzero(&self, from: u64) -> Result<Option<u64>, StorageError> {
        let last = self.len.saturating_sub(MAX_SCAN).max(from.saturating_add(MAX_SCAN));
        for (mut at, end) in [(from, from.saturating_add(MAX_SCAN).min(self.len)), (last, self.len)] {
            while at < end {
                let piece = self.read(at, MAX_READ.min(end - at))?;
                if let Some(index) = piece.iter().position(|&byte| byte != 0) {
                    return Ok(Some(at + index as u64));
                }
                if piece.is_empty() {
                    break;
                }
                at += piece.len() as u64;
            }
        }
        Ok(None)
    }
}

/// The largest piece that is read at once.
pub(super) const MAX_READ: u64 = 1 << 20;
/// How many bytes are looked through for content behind the end of an image.
const MAX_SCAN: u64 = 8 << 20;

/// The little-endian number in `len` bytes at `at`, at most 8; missing bytes are zeroes.
pub(super) fn little(bytes: &[u8], at: usize, len: usize) -> u64 {
    let part = bytes.get(at..).unwrap_or_default();
    part.iter().take(len).rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

/// The big-endian number in `len` bytes at `at`, at most 8; 0 if any of them is missing.
pub(super) fn big(bytes: &[u8], at: usize, len: usize) -> u64 {
    let part = bytes.get(at..at.saturating_add(len)).unwrap_or_default();
    part.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
}

/// Text of 16-bit units up to the first zero; `unit` makes one of two bytes.
pub(super) fn wide_text(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> String {
    let units = bytes.chunks_exact(2).map(|pair| unit([pair[0], pair[1]])).take_while(|&unit| unit != 0);
    char::decode_utf16(units).map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
}
