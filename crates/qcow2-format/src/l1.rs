//! L1 table entries. Spec: "Cluster mapping".
//!
//! | bits | meaning |
//! |---|---|
//! | 0-8 | reserved, 0 |
//! | 9-55 | host offset of an L2 table, cluster aligned; 0: the whole range is unallocated |
//! | 56-62 | reserved, 0 |
//! | 63 | copied: the L2 table's refcount is exactly one |

use crate::error::{FormatError, FormatErrorKind};
use crate::geometry::Geometry;
use crate::units::HostOffset;
use alloc::format;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// Where one L2 table lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry {
    /// The L2 table's host offset; `None` where the whole range is unallocated.
    pub l2_table: Option<HostOffset>,
    /// Whether the L2 table's refcount is exactly one, so that it may be changed in place.
    pub copied: bool,
}

impl L1Entry {
    /// The entry of a range that has no L2 table.
    pub const UNALLOCATED: Self = Self { l2_table: None, copied: false };

    /// Reads an entry; reserved bits are ignored (see [`reserved_bits`]). Errors: `Misaligned`.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, FormatError> {
        let offset = raw & OFFSET_MASK;
        if !geometry.is_aligned(offset) {
            return Err(FormatError::new(
                FormatErrorKind::Misaligned(offset),
                format!("l2 table offset {offset:#x} is not a multiple of {}", geometry.cluster_size()),
            ));
        }
        let l2_table = (offset != 0).then_some(HostOffset::new(offset));
        Ok(Self { l2_table, copied: raw & COPIED != 0 })
    }

    /// The entry's 64 bits.
    pub fn encode(&self) -> u64 {
        self.l2_table.map_or(0, HostOffset::value) | if self.copied { COPIED } else { 0 }
    }
}

/// The reserved bits that are set in a raw L1 entry; 0 in a valid image.
pub const fn reserved_bits(raw: u64) -> u64 {
    raw & RESERVED
}
