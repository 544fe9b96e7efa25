//! Tells by its bytes alone whether a cluster can be an L2 table. For searches after a lost one.

use super::{COMPRESSED, COPIED, L2Entry, L2Format, RESERVED};
use crate::units::HostOffset;
use alloc::vec::Vec;

/// What a cluster holds, taken for an L2 table. Every entry of it is one that a writer makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L2Shape {
    /// Entries with a host cluster or a compressed stream.
    pub mapped: u64,
    /// Those of them with the copied flag.
    pub copied: u64,
    /// Those of them that are compressed.
    pub compressed: u64,
    /// Those of them that begin before the end of the file.
    pub inside: u64,
    /// Entries that read as zeroes and have no host cluster.
    pub zero: u64,
}

impl L2Format {
    /// What `table` is like, taken for an L2 table or the beginning of one. `file_len`: bytes of the file
    /// with the data. `None` if any entry is not one that a writer makes: reserved bits, a misaligned or
    /// impossible offset, a bitmap that contradicts itself, a flag that does not go with the rest, an offset
    /// far past the end of the file (which may have been cut), or a host cluster that occurs twice.
    pub fn shape(&self, table: &[u8], file_len: u64) -> Option<L2Shape> {
        let end = file_len.saturating_mul(MAX_CUT);
        let (mut shape, mut hosts) = (L2Shape::default(), Vec::new());
        for entry in table.chunks_exact(self.geometry.l2_entry_size() as usize) {
            let (raw, bitmap) = self.entry_words(entry);
            if raw == 0 && bitmap == 0 {
                continue;
            }
            let host = self.writers_entry(raw, bitmap, &mut shape)?;
            let Some(host) = host else { continue };
            if host.value() >= end || (!self.external_data && host.value() < self.geometry.cluster_size()) {
                return None;
            }
            shape.mapped += 1;
            shape.inside += u64::from(host.value() < file_len);
            hosts.push(raw & !COPIED);
        }
        hosts.sort_unstable();
        let twice = hosts.windows(2).any(|pair| pair[0] == pair[1] && pair[0] & COMPRESSED == 0);
        (!twice).then_some(shape)
    }

    /// The host offset of an entry, counting its kind in `shape`; `None` if no writer makes such an entry.
    fn writers_entry(&self, raw: u64, bitmap: u64, shape: &mut L2Shape) -> Option<Option<HostOffset>> {
        match self.decode(raw, bitmap).ok()? {
            L2Entry::Compressed(_) if raw & COPIED != 0 || self.external_data => None,
            // Readers ignore it, writers leave it at 0.
            L2Entry::Compressed(_) if self.geometry.extended_l2() && bitmap != 0 => None,
            L2Entry::Compressed(stream) => {
                shape.compressed += 1;
                Some(Some(stream.host))
            }
            L2Entry::Standard(entry) => {
                let plausible = raw & RESERVED == 0 && (entry.host.is_some() || raw & COPIED == 0);
                // Bit 0 is the zero flag, and reserved where the bitmap has that part.
                if !plausible || (self.geometry.extended_l2() && raw & 1 != 0) {
                    return None;
                }
                shape.copied += u64::from(entry.copied);
                shape.zero += u64::from(entry.host.is_none());
                Some(entry.host)
            }
        }
    }
}

/// A file that was cut is taken to have been at most so many times as long. Origin: ours.
pub const MAX_CUT: u64 = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::{Geometry, GeometryFields};

    const MIB: u64 = 1 << 20;

    fn shape(extended_l2: bool, words: &[u64]) -> Option<L2Shape> {
        let fields = GeometryFields { cluster_bits: 16, refcount_order: 4, extended_l2 };
        let geometry = Geometry::new(fields).unwrap();
        let format = L2Format { geometry, zero_flag: true, external_data: false };
        let table: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        format.shape(&table, MIB)
    }

    #[test]
    fn tables_that_writers_make_have_a_shape() {
        let words = [0, COPIED | 0x50000, 1, 0x60000, COMPRESSED | 0x71234, COPIED | (2 * MIB)];
        let expected = L2Shape { mapped: 4, copied: 2, compressed: 1, inside: 3, zero: 1 };
        assert_eq!(shape(false, &words), Some(expected));
        let words = [COPIED | 0x50000, 7, 0, 7 << 32];
        assert_eq!(
            shape(true, &words),
            Some(L2Shape { mapped: 1, copied: 1, inside: 1, zero: 1, ..Default::default() })
        );
        assert_eq!(shape(false, &[0; 8]), Some(L2Shape::default()));
    }

    #[test]
    fn one_impossible_entry_is_enough() {
        for word in [
            COPIED | 0x50200,           // misaligned
            COPIED | 0x60000 | 1 << 60, // reserved bits
            COPIED,                     // the flag without a cluster
            COPIED | COMPRESSED | 0x60000,
            COPIED | (16 * MIB), // far past the end
            COPIED | 0x50000,    // the cluster of the entry before
            u64::from_be_bytes(*b"some tex"),
        ] {
            assert_eq!(shape(false, &[COPIED | 0x50000, word]), None, "{word:#x}");
        }
        for bitmap in [1 | 1 << 32, 0x8000_0000_8000_0000] {
            assert_eq!(shape(true, &[COPIED | 0x50000, bitmap]), None, "{bitmap:#x}");
        }
        assert_eq!(shape(true, &[0, 1]), None, "allocated without a cluster");
        assert_eq!(shape(true, &[COMPRESSED | 0x50000, 1]), None, "a stream has no bitmap");
    }
}
