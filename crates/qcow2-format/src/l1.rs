//! L1 table entries. Spec: "Cluster mapping".
//!
//! | bits | meaning |
//! |---|---|
//! | 0-8 | reserved, 0 |
//! | 9-55 | host offset of an L2 table, cluster aligned; 0: no table, the whole range is unallocated |
//! | 56-62 | reserved, 0 |
//! | 63 | copied: the L2 table's refcount is exactly one |

use crate::error::{FormatError, FormatErrorKind};
use crate::geometry::Geometry;
use crate::units::HostOffset;
use alloc::format;

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// A decoded L1 entry: the location of one L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry {
    /// Host offset of the L2 table; `None` if the whole range is unallocated.
    pub l2_table: Option<HostOffset>,
    /// True if the L2 table's refcount is exactly one, so that it may be changed in place. Always false
    /// without a table.
    pub copied: bool,
}

impl L1Entry {
    /// The entry of a range without an L2 table.
    pub const UNALLOCATED: Self = Self { l2_table: None, copied: false };

    /// Decodes an entry. Reserved bits are ignored (see [`reserved_bits`]). Errors: `Misaligned`.
    #[inline]
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Self, FormatError> {
        let offset = raw & OFFSET_MASK;
        if !geometry.is_aligned(offset) {
            return Err(misaligned(offset, geometry));
        }
        let l2_table = (offset != 0).then_some(HostOffset::new(offset));
        Ok(Self { l2_table, copied: l2_table.is_some() && raw & COPIED != 0 })
    }

    /// The raw entry.
    pub fn encode(&self) -> u64 {
        self.l2_table.map_or(0, HostOffset::value) | if self.copied { COPIED } else { 0 }
    }
}

#[cold]
fn misaligned(offset: u64, geometry: &Geometry) -> FormatError {
    FormatError::new(
        FormatErrorKind::Misaligned(offset),
        format!("l2 table offset {offset:#x} is not a multiple of {}", geometry.cluster_size()),
    )
}

/// A raw L1 entry with its copied flag set or cleared.
pub const fn with_copied(raw: u64, copied: bool) -> u64 {
    if copied { raw | COPIED } else { raw & !COPIED }
}

/// A raw L1 entry with the offset of its table rounded down to a cluster, and without reserved bits.
pub fn rounded(raw: u64, geometry: &Geometry) -> u64 {
    raw & COPIED | geometry.align_down(raw & OFFSET_MASK)
}

/// A raw L1 entry without its copied flag.
pub const fn without_copied(raw: u64) -> u64 {
    raw & !COPIED
}

/// The reserved bits set in a raw L1 entry; 0 in a valid image.
pub const fn reserved_bits(raw: u64) -> u64 {
    raw & RESERVED
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::GeometryFields;
    use proptest::prelude::*;

    fn geometry(cluster_bits: u32) -> Geometry {
        Geometry::new(GeometryFields { cluster_bits, refcount_order: 4, extended_l2: false }).unwrap()
    }

    #[test]
    fn decodes_an_entry_written_by_qemu() {
        let entry = L1Entry::decode(0x8000_0000_0004_0000, &geometry(16)).unwrap();
        assert_eq!(entry, L1Entry { l2_table: Some(HostOffset::new(0x40000)), copied: true });
        assert_eq!(
            L1Entry::decode(COPIED, &geometry(16)),
            Ok(L1Entry::UNALLOCATED),
            "the copied flag needs a table"
        );
    }

    #[test]
    fn unaligned_table_is_refused_and_reserved_bits_are_ignored() {
        let error = L1Entry::decode(0x40200, &geometry(16)).unwrap_err();
        assert_eq!(error.kind(), &FormatErrorKind::Misaligned(0x40200));
        let raw = 0x4000_0000_0004_0001;
        assert_eq!(L1Entry::decode(raw, &geometry(16)).unwrap().l2_table, Some(HostOffset::new(0x40000)));
        assert_eq!(reserved_bits(raw), 0x4000_0000_0000_0001);
    }

    proptest! {
        #[test]
        fn valid_entries_round_trip(raw in any::<u64>(), cluster_bits in 9..=21u32) {
            if let Ok(entry) = L1Entry::decode(raw, &geometry(cluster_bits)) {
                prop_assert_eq!(L1Entry::decode(entry.encode(), &geometry(cluster_bits)), Ok(entry));
                let flag = if entry.l2_table.is_none() { COPIED } else { 0 };
                prop_assert_eq!(entry.encode(), raw & !reserved_bits(raw) & !flag);
            }
        }
    }
}
