//! Ranges in blocks of the smallest size that a server takes, and in pieces of the largest one.

use super::MAX_RANGE;
use qcow2_nbd::client::Export;
use qcow2_nbd::proto::{DEFAULT_MAX_PAYLOAD, Mode};

/// How large requests may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Offsets and lengths are multiples of it, a power of two.
    pub(super) minimum: u32,
    /// The most bytes of one read or write; a multiple of `minimum`.
    pub(super) payload: usize,
    /// The longest range of a request without payload; a multiple of `minimum`.
    pub(super) range: u64,
}

impl Sizes {
    /// `has_status`: whether the export has block status, which servers have that take any byte.
    pub(super) fn of(export: &Export, has_status: bool) -> Self {
        let Some(sizes) = export.block_sizes else {
            // What the protocol advises for servers that tell nothing.
            let minimum = if has_status || !export.size.is_multiple_of(SECTOR) { 1 } else { SECTOR as u32 };
            return Self { minimum, payload: PIECE as usize, range: MAX_RANGE };
        };
        let whole = |size: u32| size / sizes.minimum * sizes.minimum;
        let range = match export.mode {
            // Such servers have no limit but for payloads.
            Mode::Extended => MAX_RANGE,
            _ => whole(sizes.maximum.min(DEFAULT_MAX_PAYLOAD)).into(),
        };
        Self { minimum: sizes.minimum, payload: whole(sizes.maximum.min(PIECE)) as usize, range }
    }

    /// Start and end of the whole blocks in a range; none where the start is not before the end.
    pub(super) fn blocks_inside(&self, offset: u64, len: u64) -> (u64, u64) {
        let (minimum, end) = (u64::from(self.minimum), offset + len);
        (offset.next_multiple_of(minimum), end - end % minimum)
    }

    /// Start and end of the blocks that a range touches, in an export of `size` bytes.
    pub(super) fn blocks_around(&self, offset: u64, len: u64, size: u64) -> (u64, u64) {
        let (minimum, end) = (u64::from(self.minimum), offset + len);
        (offset - offset % minimum, end.next_multiple_of(minimum).min(size))
    }
}

/// A range as a part of a first block, whole blocks, and a part of a last block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Split {
    minimum: usize,
    /// Offsets of the first block, of the whole blocks, and of the last block.
    pub(super) head: u64,
    pub(super) body: u64,
    pub(super) tail: u64,
    /// Bytes of the first block before the range.
    pub(super) skip: usize,
    /// Lengths of the first two parts of the range.
    first: usize,
    middle: usize,
}

impl Split {
    pub(super) fn of(offset: u64, len: usize, minimum: u32) -> Self {
        let minimum = minimum as usize;
        let skip = (offset % minimum as u64) as usize;
        let first = match skip {
            0 => 0,
            skip => len.min(minimum - skip),
        };
        let middle = (len - first) / minimum * minimum;
        let body = offset + first as u64;
        Self { minimum, head: offset - skip as u64, body, tail: body + middle as u64, skip, first, middle }
    }

    /// The three parts of a buffer for the range.
    pub(super) fn parts<'a>(&self, buf: &'a [u8]) -> (&'a [u8], &'a [u8], &'a [u8]) {
        let (first, rest) = buf.split_at(self.first);
        let (body, last) = rest.split_at(self.middle);
        (first, body, last)
    }

    pub(super) fn parts_mut<'a>(&self, buf: &'a mut [u8]) -> (&'a mut [u8], &'a mut [u8], &'a mut [u8]) {
        let (first, rest) = buf.split_at_mut(self.first);
        let (body, last) = rest.split_at_mut(self.middle);
        (first, body, last)
    }

    /// Length of the block that `part` is of; 0 for no part.
    pub(super) fn block(&self, part: &[u8]) -> usize {
        if part.is_empty() { 0 } else { self.minimum }
    }
}

const SECTOR: u64 = 512;
/// The longest payload of one request: several of them are in flight for a longer range.
const PIECE: u32 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn check(offset: u64, len: usize, expected: (usize, usize, usize)) {
        let (split, buf) = (Split::of(offset, len, 8), vec![0; len]);
        let (first, body, last) = split.parts(&buf);
        assert_eq!((first.len(), body.len(), last.len()), expected, "{offset} {len}");
        assert!(split.head <= offset && split.head.is_multiple_of(8));
        for (part, at) in [(body, split.body), (last, split.tail)] {
            assert!(part.is_empty() || at.is_multiple_of(8), "{offset} {len}");
        }
        assert_eq!(split.head + split.skip as u64, offset);
    }

    #[test]
    fn ranges_are_split_at_blocks() {
        check(0, 0, (0, 0, 0));
        check(0, 16, (0, 16, 0));
        check(0, 5, (0, 0, 5));
        check(3, 2, (2, 0, 0));
        check(3, 5, (5, 0, 0));
        check(3, 6, (5, 0, 1));
        check(9, 24, (7, 16, 1));
        check(u64::MAX - 16, 9, (1, 8, 0));
    }
}
