//! Refcount table entries and refcount blocks of every width. Spec: "Host cluster management".
//!
//! A refcount table entry: bits 0-8 are reserved, bits 9-63 hold the host offset of a refcount block, 0 for
//! none. A block is one cluster of refcounts of 1, 2, 4, 8, 16, 32 or 64 bits. Widths below 8 bits are packed
//! from the least significant bit of each byte; widths above 8 bits are big-endian.

mod run;

use crate::error::{FormatError, FormatErrorKind};
use crate::geometry::Geometry;
use crate::units::HostOffset;
use alloc::format;

const TABLE_OFFSET_MASK: u64 = !0x1ff;

/// The width of one refcount in bits.
///
/// ```
/// use qcow2_format::refcount::RefcountWidth;
///
/// let width = RefcountWidth::from_order(1)?; // 2 bits
/// let block = [0x55, 0x6a, 0x01, 0, 0, 0, 0, 0];
/// let counts: Vec<u64> = (0..9).map(|slot| width.extract(u64::from_be_bytes(block), slot)).collect();
/// assert_eq!(counts, [1, 1, 1, 1, 2, 2, 2, 1, 1]);
/// # Ok::<(), qcow2_format::FormatError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountWidth {
    order: u32,
}

impl RefcountWidth {
    /// The width of 2^`order` bits, `order` from 0 to 6. Errors: `RefcountOrder`.
    pub fn from_order(order: u32) -> Result<Self, FormatError> {
        if order > 6 {
            return Err(FormatError::new(
                FormatErrorKind::RefcountOrder(order),
                format!("header: refcount_order is {order}, allowed are 0 to 6"),
            ));
        }
        Ok(Self { order })
    }

    /// log2 of the width in bits.
    pub const fn order(self) -> u32 {
        self.order
    }

    /// The width in bits.
    pub const fn bits(self) -> u32 {
        1 << self.order
    }

    /// The largest refcount that fits.
    pub const fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Index of the big-endian 64-bit word that holds `slot` within its block.
    pub const fn word_index(self, slot: u64) -> usize {
        (slot >> (6 - self.order)) as usize
    }

    const fn shift(self, slot: u64) -> u32 {
        let bit = ((slot << self.order) & 63) as u32;
        if self.order < 3 {
            // Refcounts are packed from the low bit of each byte, but byte 0 is the most significant byte of
            // the word.
            56 - (bit & !7) + (bit & 7)
        } else {
            64 - self.bits() - bit
        }
    }

    /// The refcount of `slot` from the word at [`word_index`](Self::word_index).
    pub const fn extract(self, word: u64, slot: u64) -> u64 {
        word >> self.shift(slot) & self.max()
    }

    /// That word with the refcount of `slot` replaced. `count` must not exceed [`max`](Self::max).
    pub const fn insert(self, word: u64, slot: u64, count: u64) -> u64 {
        debug_assert!(count <= self.max());
        let shift = self.shift(slot);
        word & !(self.max() << shift) | count << shift
    }
}

/// Decodes a refcount table entry: the block's host offset, or `None`. Reserved bits are ignored (see
/// [`reserved_bits`]). Errors: `Misaligned`.
pub fn decode_table_entry(raw: u64, geometry: &Geometry) -> Result<Option<HostOffset>, FormatError> {
    let offset = raw & TABLE_OFFSET_MASK;
    if !geometry.is_aligned(offset) {
        return Err(FormatError::new(
            FormatErrorKind::Misaligned(offset),
            format!("refcount block offset {offset:#x} is not a multiple of {}", geometry.cluster_size()),
        ));
    }
    Ok((offset != 0).then_some(HostOffset::new(offset)))
}

/// The raw refcount table entry.
pub fn encode_table_entry(block: Option<HostOffset>) -> u64 {
    block.map_or(0, HostOffset::value)
}

/// The reserved bits set in a raw refcount table entry; 0 in a valid image.
pub const fn reserved_bits(raw: u64) -> u64 {
    raw & !TABLE_OFFSET_MASK
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes;
    use crate::geometry::GeometryFields;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn counts(order: u32, block: &[u8], slots: u64) -> Vec<u64> {
        let width = RefcountWidth::from_order(order).unwrap();
        let words: Vec<u64> = bytes::words(block).collect();
        (0..slots).map(|slot| width.extract(words[width.word_index(slot)], slot)).collect()
    }

    /// The refcounts that qemu-img 10.0.2 wrote for clusters 0 to 8 of an image with one snapshot, in each
    /// width.
    #[test]
    fn decodes_blocks_written_by_qemu_in_every_width() {
        let expected = [1, 1, 1, 1, 2, 2, 2, 1, 1];
        let pad = |bytes: &[u8]| {
            let mut block = bytes.to_vec();
            block.resize(128, 0);
            block
        };
        assert_eq!(counts(1, &pad(&[0x55, 0x6a, 0x01]), 9), expected);
        assert_eq!(counts(2, &pad(&[0x11, 0x11, 0x22, 0x12, 0x01]), 9), expected);
        assert_eq!(counts(3, &pad(&[1, 1, 1, 1, 2, 2, 2, 1, 1]), 9), expected);
        let be16: Vec<u8> = expected.iter().flat_map(|&n| (n as u16).to_be_bytes()).collect();
        assert_eq!(counts(4, &pad(&be16), 9), expected);
        let be32: Vec<u8> = expected.iter().flat_map(|&n| (n as u32).to_be_bytes()).collect();
        assert_eq!(counts(5, &pad(&be32), 9), expected);
        let be64: Vec<u8> = expected.iter().flat_map(|&n| n.to_be_bytes()).collect();
        assert_eq!(counts(6, &pad(&be64), 9), expected);
        assert_eq!(counts(0, &pad(&[0b1000_0101, 1]), 9), [1, 0, 1, 0, 0, 0, 0, 1, 1]);
    }

    #[test]
    fn max_refcount_of_every_width() {
        let max: Vec<u64> = (0..=6).map(|order| RefcountWidth::from_order(order).unwrap().max()).collect();
        assert_eq!(max, [1, 3, 15, 255, 65535, u64::from(u32::MAX), u64::MAX]);
        assert_eq!(RefcountWidth::from_order(7).unwrap_err().kind(), &FormatErrorKind::RefcountOrder(7));
    }

    proptest! {
        /// Compares the specification's formula, byte by byte, with the packing by words used here.
        #[test]
        fn insert_changes_one_slot(order in 0..=6u32, slot in 0..64u64, count: u64, fill: u64) {
            let width = RefcountWidth::from_order(order).unwrap();
            let count = count & width.max();
            let mut block: Vec<u8> = (0..64u64 * 8).map(|i| (fill >> (i % 57)) as u8).collect();
            let before = counts(order, &block, 64);
            let index = width.word_index(slot);
            let word = bytes::read_u64(&block, index * 8).unwrap();
            bytes::write_u64(&mut block, index * 8, width.insert(word, slot, count)).unwrap();
            let mut expected = before;
            expected[slot as usize] = count;
            prop_assert_eq!(&counts(order, &block, 64), &expected);
            let by_bytes = |slot: u64| {
                let bit = slot << order;
                let byte = (bit / 8) as usize;
                match width.bits() {
                    bits @ ..8 => u64::from(block[byte]) >> (bit % 8) & ((1 << bits) - 1),
                    bits => {
                        let bytes = &block[byte..byte + bits as usize / 8];
                        bytes.iter().fold(0, |n, &b| n << 8 | u64::from(b))
                    }
                }
            };
            prop_assert_eq!((0..64).map(by_bytes).collect::<Vec<_>>(), expected);
        }

        #[test]
        fn valid_table_entries_round_trip(raw: u64, cluster_bits in 9..=21u32) {
            let fields = GeometryFields { cluster_bits, refcount_order: 4, extended_l2: false };
            let geometry = Geometry::new(fields).unwrap();
            match decode_table_entry(raw, &geometry) {
                Ok(block) => prop_assert_eq!(encode_table_entry(block), raw & !reserved_bits(raw)),
                Err(error) => {
                    prop_assert_eq!(error.kind(), &FormatErrorKind::Misaligned(raw & TABLE_OFFSET_MASK));
                    prop_assert!(!geometry.is_aligned(raw & TABLE_OFFSET_MASK));
                }
            }
        }
    }
}
