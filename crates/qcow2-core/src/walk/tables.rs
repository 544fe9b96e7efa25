//! Reads tables in large sequential pieces and skips holes.

use super::{PIECE_SIZE, Walk};
use crate::error::Result;
use ::alloc::vec::Vec;
use qcow2_format::HostOffset;

/// Reads a range of 8-byte entries piece by piece. It skips holes of the storage and everything past the end
/// of the file: those entries are zero.
pub struct Pieces<'a> {
    walk: &'a Walk<'a>,
    at: u64,
    end: u64,
    /// The last data extent that the storage has reported. Kept across tables, because on some file systems
    /// the cost of a query grows with the length of the extent.
    data: core::ops::Range<u64>,
    buffer: Vec<u8>,
}

/// What is known of holes in the file, for [`Walk::is_hole`].
#[derive(Debug, Default)]
pub struct Holes {
    /// The last extent that the storage has reported, and whether it is a hole. Kept as in [`Pieces`].
    known: core::ops::Range<u64>,
    hole: bool,
}

impl<'a> Walk<'a> {
    /// True if `len` bytes at `offset` are in one hole, or past the end of the file: a table there has no
    /// entries and need not be read. Errors: `Storage`.
    pub fn is_hole(&self, holes: &mut Holes, offset: HostOffset, len: u64) -> Result<bool> {
        let at = offset.value();
        if at >= self.file_len {
            return Ok(true);
        }
        if !holes.known.contains(&at) {
            let extent = self.storage.extent_at(offset, self.file_len - at)?;
            *holes = Holes { known: at..at.saturating_add(extent.len.max(1)), hole: !extent.data };
        }
        Ok(holes.hole && at.saturating_add(len).min(self.file_len) <= holes.known.end)
    }

    /// A reader of tables; [`Pieces::start`] gives it a range.
    pub fn pieces(&'a self) -> Pieces<'a> {
        Pieces { walk: self, at: 0, end: 0, data: 0..0, buffer: Vec::new() }
    }
}

impl Pieces<'_> {
    /// Starts reading `len` bytes at `offset`, both multiples of 8.
    pub fn start(&mut self, offset: HostOffset, len: u64) {
        self.at = offset.value();
        self.end = self.at.saturating_add(len);
    }

    /// The next piece that may have nonzero bytes: its offset and its bytes, a multiple of 8. `None` after
    /// the last one. Errors: `Storage`.
    pub fn read_next(&mut self) -> Result<Option<(HostOffset, &[u8])>> {
        let file_end = self.walk.file_len.next_multiple_of(8).min(self.end);
        while self.at < file_end {
            if !self.data.contains(&self.at) && !self.find_data()? {
                continue;
            }
            let len = (self.data.end.min(file_end) - self.at).min(PIECE_SIZE).next_multiple_of(8);
            debug_assert!(len > 0 && len.is_multiple_of(8), "a piece of {len} bytes");
            let offset = HostOffset::new(self.at);
            self.buffer.resize(len as usize, 0);
            self.walk.read(offset, &mut self.buffer)?;
            self.at += len;
            return Ok(Some((offset, &self.buffer)));
        }
        Ok(None)
    }

    /// Queries the extent at `at`, which may reach past the current range. Returns false for a hole, after
    /// moving `at` behind it.
    fn find_data(&mut self) -> Result<bool> {
        let left = self.walk.file_len.saturating_sub(self.at);
        if left == 0 {
            self.at = self.end;
            return Ok(false);
        }
        let extent = self.walk.storage.extent_at(HostOffset::new(self.at), left)?;
        let whole_entries = extent.len / 8 * 8;
        // A hole shorter than an entry: the entry has data in its other bytes, so it is read.
        if extent.data || whole_entries == 0 {
            self.data = self.at..self.at.saturating_add(extent.len.max(8));
            return Ok(true);
        }
        self.at += whole_entries;
        Ok(false)
    }
}
