//! The bits of one bitmap in memory: which granules of the disk have changed.

use super::room::Room;
use super::tree::{FAN_OUT, LEAF_BITS, Tree, Words};
use crate::error::{Error, ErrorKind, Result};
use ::alloc::format;
use ::alloc::vec;
use ::alloc::vec::Vec;

/// Size limit of one bitmap's bits, in bytes: the limit of the format crate. Origin: QEMU.
const MAX_BYTES: u64 = qcow2_format::limit::MAX_BITMAP_DATA_SIZE;

/// The bits of a bitmap, a copy to read: what [`Image::bitmap_bits`](crate::Image::bitmap_bits) returns.
/// Threads may mark and read concurrently. Ranges that are all clear or all marked take
/// no memory; mixed ranges do, up to a limit for all bitmaps of an image. Past the limit whole nodes of the
/// tree are marked, so that a bitmap may have more marks than there were changes, never fewer.
#[derive(Clone, Debug)]
pub struct Bits {
    granularity_bits: u8,
    size: u64,
    tree: Tree,
}

impl Bits {
    /// Bits for a disk of `size` bytes, all clear. Memory is taken from `room`. Errors: `NoSpace` above 512
    /// MiB of bits.
    pub(super) fn new(granularity_bits: u8, size: u64, room: &Room) -> Result<Self> {
        let count = checked_count(granularity_bits, size)?;
        Ok(Self { granularity_bits, size, tree: Tree::new(count, room) })
    }

    /// Checks that a disk of `size` bytes can have a bitmap of this granularity. Errors: as
    /// [`new`](Self::new).
    pub(super) fn check_size(granularity_bits: u8, size: u64) -> Result<()> {
        checked_count(granularity_bits, size).map(drop)
    }

    /// Bytes per bit, a power of two.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// The size of the disk, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// True if the granule of guest byte `offset` is marked.
    pub fn is_marked(&self, offset: u64) -> bool {
        self.tree.is_set(offset >> self.granularity_bits)
    }

    /// The marked ranges of the disk as start and length in bytes, in ascending order. The last one is cut at
    /// the end of the disk.
    pub fn marked_runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let granularity = self.granularity();
        let mut bit = 0;
        core::iter::from_fn(move || {
            let first = self.tree.next(bit, true)?;
            let end = self.tree.next(first, false).unwrap_or(self.tree.count());
            bit = end;
            let start = first * granularity;
            debug_assert!(first < end && start < self.size, "marks from {start:#x} on, past the disk's end");
            Some((start, (end * granularity).min(self.size) - start))
        })
    }

    /// Marks the granules that `len` bytes at `start` touch, up to the end of the disk. Returns false if
    /// memory ran out and other granules were marked too.
    pub(super) fn mark(&self, start: u64, len: u64) -> bool {
        let end = start.saturating_add(len).min(self.size);
        start >= end || self.tree.set(start >> self.granularity_bits, (end - 1) >> self.granularity_bits)
    }

    /// Marks everything that is marked in `other`. Returns false as [`mark`](Self::mark).
    pub(super) fn merge(&self, other: &Self) -> bool {
        if (self.granularity_bits, self.size) == (other.granularity_bits, other.size) {
            return self.tree.merge(&other.tree);
        }
        other.marked_runs().fold(true, |exact, (start, len)| self.mark(start, len) && exact)
    }

    /// The same bits for a disk of another size; new granules are clear. Errors: as [`new`](Self::new).
    pub(super) fn resized(self, size: u64) -> Result<Self> {
        let count = checked_count(self.granularity_bits, size)?;
        Ok(Self { tree: self.tree.resized(count), size, ..self })
    }

    /// Splits the stored bits into pieces of `len` bytes and returns those with a set bit: the piece's index,
    /// and true if all its bits are set.
    pub(super) fn marked_pieces(&self, len: u64) -> impl Iterator<Item = (u64, bool)> + '_ {
        let bits = len * 8;
        let mut at = 0;
        core::iter::from_fn(move || {
            let start = self.tree.next(at, true)? / bits * bits;
            at = start + bits;
            Some((start / bits, self.tree.next(start, false).is_none_or(|clear| clear >= at)))
        })
    }

    /// `len` bytes of the bits in their stored form, from byte `start` on, zeroes past the end. `start`: a
    /// multiple of 512.
    pub(super) fn stored(&self, start: u64, len: u64) -> Vec<u8> {
        debug_assert!((start * 8).is_multiple_of(LEAF_BITS));
        let mut bytes = vec![0; len as usize];
        for (index, piece) in (0u64..).zip(bytes.chunks_mut((LEAF_BITS / 8) as usize)) {
            let words = self.tree.words(start * 8 + index * LEAF_BITS);
            for (word, place) in words.iter().zip(piece.chunks_mut(8)) {
                place.copy_from_slice(&word.to_le_bytes()[..place.len()]);
            }
        }
        bytes
    }

    /// Length of the bits in their stored form, in bytes.
    pub(super) fn stored_len(&self) -> u64 {
        self.tree.count().div_ceil(8)
    }

    /// Sets the bits that are set in `bytes`, the stored form from byte `start` on. Ignores bits past the
    /// end. `start`: a multiple of 512. Returns false as [`mark`](Self::mark).
    pub(super) fn load(&self, start: u64, bytes: &[u8]) -> bool {
        debug_assert!((start * 8).is_multiple_of(LEAF_BITS));
        let mut exact = true;
        for (index, piece) in (0u64..).zip(bytes.chunks((LEAF_BITS / 8) as usize)) {
            let base = start * 8 + index * LEAF_BITS;
            if base >= self.tree.count() {
                break;
            }
            let mut words: Words = [0; FAN_OUT];
            for (word, chunk) in words.iter_mut().zip(piece.chunks(8)) {
                let mut le = [0; 8];
                le[..chunk.len()].copy_from_slice(chunk);
                *word = u64::from_le_bytes(le);
            }
            exact &= match words {
                words if words.iter().all(|&word| word == 0) => true,
                words if words.iter().all(|&word| word == u64::MAX) => {
                    self.load_ones(base / 8, LEAF_BITS / 8)
                }
                words => self.tree.set_words(base, &words),
            };
        }
        exact
    }

    /// [`load`](Self::load) of `len` bytes of ones.
    pub(super) fn load_ones(&self, start: u64, len: u64) -> bool {
        let end = self.tree.count().min((start + len) * 8);
        start * 8 >= end || self.tree.set(start * 8, end - 1)
    }
}

/// How many bits a bitmap has.
fn checked_count(granularity_bits: u8, size: u64) -> Result<u64> {
    let count = size.div_ceil(1 << granularity_bits);
    let bytes = count.div_ceil(8);
    if bytes > MAX_BYTES {
        let message = format!("bitmap would have {bytes} bytes of bits, allowed are {MAX_BYTES}");
        return Err(Error::new(ErrorKind::NoSpace, message));
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model(bits: &Bits) -> Vec<bool> {
        (0..bits.tree.count()).map(|bit| bits.is_marked(bit * bits.granularity())).collect()
    }

    proptest! {
        #[test]
        fn bits_behave_like_a_bool_per_granule(
            size in 1..200_000u64,
            marks in proptest::collection::vec((0..220_000u64, 0..5000u64), 0..12),
            other_size in 1..200_000u64,
        ) {
            let bits = Bits::new(9, size, &Room::default()).unwrap();
            let mut wanted = ::std::vec![false; size.div_ceil(512) as usize];
            for (start, len) in marks {
                bits.mark(start, len);
                for (index, marked) in wanted.iter_mut().enumerate() {
                    let at = index as u64 * 512;
                    *marked |= len > 0 && start < (at + 512).min(size) && at < start + len;
                }
            }
            prop_assert_eq!(&model(&bits), &wanted);
            let mut seen = ::std::vec![false; wanted.len()];
            for (start, len) in bits.marked_runs() {
                prop_assert!(len > 0 && start + len <= size);
                seen[(start / 512) as usize..(start + len).div_ceil(512) as usize].fill(true);
            }
            prop_assert_eq!(&seen, &wanted);
            let copy = Bits::new(9, size, &Room::default()).unwrap();
            let stored = bits.stored(0, bits.stored_len());
            copy.load(0, &stored[..bits.stored_len() as usize]);
            prop_assert_eq!(&model(&copy), &wanted);
            let other = bits.resized(other_size).unwrap();
            wanted.resize(other_size.div_ceil(512) as usize, false);
            prop_assert_eq!(model(&other), wanted);
        }

        /// Several leaves, other granularities, and the pieces that a bitmap table would have.
        #[test]
        fn merge_and_stored_pieces_agree_with_the_bits(
            size in 1..60_000_000u64,
            marks in proptest::collection::vec(
                (0..60_000_000u64, prop_oneof![1..5000u64, 1..30_000_000u64]), 0..6
            ),
            granularity_bits in 9..20u8,
            cluster_bits in 9..13u32,
        ) {
            let room = Room::default();
            let bits = Bits::new(granularity_bits, size, &room).unwrap();
            marks.iter().for_each(|&(start, len)| assert!(bits.mark(start, len)));
            let wanted = model(&bits);
            let fine = Bits::new(9, size, &room).unwrap();
            prop_assert!(fine.merge(&bits));
            for (start, len) in fine.marked_runs() {
                prop_assert!((start..start + len).step_by(512).all(|at| bits.is_marked(at)));
            }
            let back = Bits::new(granularity_bits, size, &room).unwrap();
            prop_assert!(back.merge(&fine));
            prop_assert_eq!(&model(&back), &wanted);
            let len = 1u64 << cluster_bits;
            let mut pieces = bits.marked_pieces(len).peekable();
            let copy = Bits::new(granularity_bits, size, &room).unwrap();
            for start in (0..bits.stored_len()).step_by(len as usize) {
                let bytes = bits.stored(start, len);
                let piece = pieces.next_if(|(index, _)| *index == start / len);
                prop_assert_eq!(piece.is_some(), bytes.iter().any(|&byte| byte != 0));
                let end = ((start + len) * 8).min(wanted.len() as u64);
                let inside = (start * 8..end).map(|bit| wanted[bit as usize]);
                let full = piece.is_some_and(|(_, all)| all);
                prop_assert_eq!(full, inside.into_iter().all(|marked| marked));
                let exact = if full { copy.load_ones(start, len) } else { copy.load(start, &bytes) };
                prop_assert!(exact);
            }
            prop_assert_eq!(&model(&copy), &wanted);
        }

        #[test]
        fn loading_ignores_bits_past_the_end(size in 1..100_000u64) {
            let bits = Bits::new(9, size, &Room::default()).unwrap();
            bits.load(0, &[0xff; 32]);
            let marked: u64 = bits.marked_runs().map(|(_, len)| len).sum();
            prop_assert_eq!(marked, size.min(32 * 8 * 512));
            // And are not stored again.
            let ones: u32 = bits.stored(0, 32).iter().map(|byte| byte.count_ones()).sum();
            prop_assert_eq!(u64::from(ones), size.div_ceil(512).min(32 * 8));
        }
    }
}
