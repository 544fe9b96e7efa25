//! Refcount table entries and refcount blocks of every width. Spec: "Host cluster management".
//!
//! A refcount table entry: bits 0-8 reserved, bits 9-63 the host offset of a refcount block, 0 for none. A block is
//! one cluster of counts, each 1, 2, 4, 8, 16, 32 or 64 bits wide: below 8 bits packed from the least significant
//! bit of each byte, above 8 bits big-endian.

use crate::error::{FormatError, FormatErrorKind};
use crate::geometry::Geometry;
use crate::units::HostOffset;
use alloc::format;

const TABLE_OFFSET_MASK: u64 = !0x1ff;

/// How many bits one refcount has.
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

    /// The largest count that fits.
    pub const fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// The big-endian 64-bit word of a block that holds `slot`.
    pub const fn word_index(self, slot: u64) -> usize {
        (slot >> (6 - self.order)) as usize
    }

    const fn shift(self, slot: u64) -> u32 {
        let bit = ((slot << self.order) & 63) as u32;
        if self.order < 3 {
            // Packed from the low bit of each byte, while byte 0 is the word's most significant one.
            56 - (bit & !7) + (bit & 7)
        } else {
            64 - self.bits() - bit
        }
    }

    /// The count of `slot`, taken from the word at [`word_index`](Self::word_index).
    pub const fn extract(self, word: u64, slot: u64) -> u64 {
        word >> self.shift(slot) & self.max()
    }

    /// That word with the count of `slot` replaced. `count` must not pass [`max`](Self::max).
    pub const fn insert(self, word: u64, slot: u64, count: u64) -> u64 {
        debug_assert!(count <= self.max());
        let shift = self.shift(slot);
        word & !(self.max() << shift) | count << shift
    }
}

/// Reads a refcount table entry: the block's host offset or `None`. Errors: `Misaligned`; reserved bits are
/// ignored (see [`reserved_bits`]).
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

/// The 64 bits of a refcount table entry.
pub fn encode_table_entry(block: Option<HostOffset>) -> u64 {
    block.map_or(0, HostOffset::value)
}

/// The reserved bits that are set in a raw refcount table entry; 0 in a valid image.
pub const fn reserved_bits(raw: u64) -> u64 {
    raw & !TABLE_OFFSET_MASK
}
