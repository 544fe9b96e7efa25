//! The bits of one bitmap in memory: which granules of the disk were changed.

use crate::error::{Error, ErrorKind, Result};
use crate::sync::atomic::{AtomicU64, Ordering};
use ::alloc::boxed::Box;
use ::alloc::format;
use ::alloc::vec::Vec;

/// Bytes of bits that one bitmap may have in memory: the most that the format allows. Origin: QEMU.
const MAX_BYTES: u64 = qcow2_format::limit::MAX_BITMAP_DATA_SIZE;

/// The bits of a bitmap. Any thread may mark while others look.
#[derive(Debug)]
pub struct Bits {
    granularity_bits: u8,
    size: u64,
    words: Box<[AtomicU64]>,
}

impl Clone for Bits {
    fn clone(&self) -> Self {
        let words = self.words.iter().map(|word| AtomicU64::new(word.load(Ordering::Relaxed))).collect();
        Self { words, ..*self }
    }
}

impl Bits {
    /// No bit set, for a disk of `size` bytes. Errors: `NoSpace` above 512 MiB of bits.
    pub(crate) fn new(granularity_bits: u8, size: u64) -> Result<Self> {
        let bytes = size.div_ceil(1 << granularity_bits).div_ceil(8);
        if bytes > MAX_BYTES {
            let message = format!("bitmap would have {bytes} bytes of bits, allowed are {MAX_BYTES}");
            return Err(Error::new(ErrorKind::NoSpace, message));
        }
        let words = (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { granularity_bits, size, words })
    }

    /// Bytes that one bit stands for: a power of two.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Bytes of the disk that the bits are about.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many bits there are.
    fn count(&self) -> u64 {
        self.size.div_ceil(self.granularity())
    }

    /// Whether the granule that holds byte `offset` is marked.
    pub fn is_marked(&self, offset: u64) -> bool {
        let bit = offset >> self.granularity_bits;
        self.words
            .get((bit / 64) as usize)
            .is_some_and(|word| word.load(Ordering::Relaxed) >> (bit % 64) & 1 == 1)
    }

    /// The marked runs of the disk as start and length, in order; the last one is cut at the disk's end.
    pub fn marked_runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let granularity = self.granularity();
        let mut bit = 0;
        core::iter::from_fn(move || {
            let first = self.next_bit(bit, true)?;
            let end = self.next_bit(first, false).unwrap_or(self.count());
            bit = end;
            let start = first * granularity;
            Some((start, (end * granularity).min(self.size) - start))
        })
    }

    /// The first bit from `from` on that is set (or, not `set`, clear).
    fn next_bit(&self, from: u64, set: bool) -> Option<u64> {
        let mut bit = from;
        while bit < self.count() {
            let word = self.words.get((bit / 64) as usize)?.load(Ordering::Relaxed);
            let word = if set { word } else { !word } >> (bit % 64);
            if word != 0 {
                return Some(bit + u64::from(word.trailing_zeros())).filter(|&bit| bit < self.count());
            }
            bit = (bit / 64 + 1) * 64;
        }
        None
    }

    /// Marks the granules that `len` bytes from `start` on touch; what lies past the disk's end is left out.
    pub(crate) fn mark(&self, start: u64, len: u64) {
        let end = start.saturating_add(len).min(self.size);
        if start >= end {
            return;
        }
        let (first, last) = (start >> self.granularity_bits, (end - 1) >> self.granularity_bits);
        for index in first / 64..=last / 64 {
            let low = if index == first / 64 { first % 64 } else { 0 };
            let high = if index == last / 64 { last % 64 } else { 63 };
            let mask = (u64::MAX >> (63 - high)) & (u64::MAX << low);
            if let Some(word) = self.words.get(index as usize)
                && word.load(Ordering::Relaxed) & mask != mask
            {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// Marks everything that is marked in `other`.
    pub(crate) fn merge(&self, other: &Self) {
        other.marked_runs().for_each(|(start, len)| self.mark(start, len));
    }

    /// The same bits for a disk of another size: what is new is not marked.
    pub(crate) fn resized(&self, size: u64) -> Result<Self> {
        let new = Self::new(self.granularity_bits, size)?;
        new.merge(self);
        Ok(new)
    }

    /// Bytes of the bits as they are stored, from byte `start` on, at most `len`.
    pub(crate) fn stored(&self, start: u64, len: u64) -> Vec<u8> {
        let words = self.words.get((start / 8) as usize..).unwrap_or_default();
        let mut bytes: Vec<u8> = Vec::with_capacity(len as usize);
        for word in words.iter().take(len.div_ceil(8) as usize) {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        bytes
    }

    /// Bytes of the bits as they are stored.
    pub(crate) fn stored_len(&self) -> u64 {
        self.count().div_ceil(8)
    }

    /// Takes stored bytes in, from byte `start` of the bits on; bits past the end do not count.
    pub(crate) fn load(&self, start: u64, bytes: &[u8]) {
        let words = self.words.get((start / 8) as usize..).unwrap_or_default();
        for (word, chunk) in words.iter().zip(bytes.chunks(8)) {
            let mut le = [0; 8];
            le[..chunk.len()].copy_from_slice(chunk);
            word.store(u64::from_le_bytes(le), Ordering::Relaxed);
        }
        self.cut_tail();
    }

    fn cut_tail(&self) {
        let count = self.count();
        if let (Some(last), used @ 1..) = (self.words.last(), count % 64)
            && self.words.len() as u64 == count.div_ceil(64)
        {
            last.fetch_and(u64::MAX >> (64 - used), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model(bits: &Bits) -> Vec<bool> {
        (0..bits.count()).map(|bit| bits.is_marked(bit * bits.granularity())).collect()
    }

    proptest! {
        #[test]
        fn bits_are_a_list_of_granules(
            size in 1..200_000u64,
            marks in proptest::collection::vec((0..220_000u64, 0..5000u64), 0..12),
            other_size in 1..200_000u64,
        ) {
            let bits = Bits::new(9, size).unwrap();
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
            let copy = Bits::new(9, size).unwrap();
            let stored = bits.stored(0, bits.stored_len());
            copy.load(0, &stored[..bits.stored_len() as usize]);
            prop_assert_eq!(&model(&copy), &wanted);
            let other = bits.resized(other_size).unwrap();
            wanted.resize(other_size.div_ceil(512) as usize, false);
            prop_assert_eq!(model(&other), wanted);
        }

        #[test]
        fn bits_past_the_end_do_not_count(size in 1..100_000u64) {
            let bits = Bits::new(9, size).unwrap();
            bits.load(0, &[0xff; 32]);
            let marked: u64 = bits.marked_runs().map(|(_, len)| len).sum();
            prop_assert_eq!(marked, size.min(32 * 8 * 512));
            // And are not stored again.
            let ones: u32 = bits.stored(0, 32).iter().map(|byte| byte.count_ones()).sum();
            prop_assert_eq!(u64::from(ones), size.div_ceil(512).min(32 * 8));
        }
    }
}
