//! Scans an L2 table for a check. Reports what each entry refers to and every fault, where
//! [`decode`](super::L2Format::decode) would return an error for the first one.

use super::{
    COMPRESSED, COPIED, CompressedCluster, L2Format, MAX_HOST_OFFSET, OFFSET_MASK, RESERVED, SECTOR, ZERO,
};
use crate::bytes;
use crate::units::{HostOffset, L2Index};

/// A fault of an L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum L2Fault {
    /// Reserved bits of a standard entry are set.
    ReservedBits,
    /// The copied flag of a compressed cluster is set.
    CompressedCopied,
    /// A cluster is compressed although the image has an external data file. It is not reported as a
    /// reference.
    CompressedInDataFile,
    /// A compressed cluster has a subcluster bitmap. It is not reported as a reference.
    CompressedWithBitmap,
    /// A subcluster is both allocated and zero.
    SubclusterBitmap,
    /// Subclusters are allocated in a cluster without a host offset.
    UnallocatedWithBitmap,
    /// The host offset of a data cluster is not cluster aligned.
    DataMisaligned,
    /// The host offset of a preallocated zero or unallocated cluster, whose bytes are not used, is not
    /// aligned.
    PreallocatedMisaligned,
}

/// A reference or a fault found by [`scan`](L2Format::scan).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Item {
    /// A run of `count` entries from `index` that refer to consecutive host clusters from `host`, all with
    /// the same copied flag. `host` is cluster aligned unless `count` is 1.
    Clusters {
        /// Index of the first entry.
        index: L2Index,
        /// Host offset of the first cluster.
        host: HostOffset,
        /// Number of clusters, at least 1.
        count: u64,
        /// Whether the copied flag is set.
        copied: bool,
    },
    /// A reference to a compressed stream. Its host offset is not checked.
    Compressed {
        /// Index of the entry.
        index: L2Index,
        /// Location of the stream.
        stream: CompressedCluster,
    },
    /// A fault. It is reported before the reference of the same entry, if that has one.
    Fault {
        /// Index of the entry.
        index: L2Index,
        /// The fault.
        fault: L2Fault,
        /// The entry's first word.
        raw: u64,
    },
}

impl L2Format {
    /// Calls `visit` for every reference and fault in `table`, in entry order. `table`: the bytes of an L2
    /// table or a prefix of it; a partial entry at the end is ignored. Entries without a host cluster and
    /// without faults are skipped.
    pub fn scan(&self, table: &[u8], mut visit: impl FnMut(L2Item)) {
        let step = self.geometry.l2_entry_size() as usize;
        let mut entries = table.chunks_exact(step).enumerate().peekable();
        while let Some((index, entry)) = entries.next() {
            let (raw, bitmap) = self.entry_words(entry);
            if raw == 0 && bitmap == 0 {
                continue;
            }
            let index = L2Index::new(index as u64);
            let Some(host) = self.scan_entry(index, raw, bitmap, &mut visit) else { continue };
            let mut count = 1;
            if self.geometry.is_aligned(host.value()) {
                let size = self.geometry.cluster_size();
                let mut expected = raw.wrapping_add(size);
                let mut end = host.value() + size;
                while end <= MAX_HOST_OFFSET && raw & RESERVED == 0 {
                    let follows = |entry: &[u8]| {
                        let (raw, bitmap) = self.entry_words(entry);
                        raw == expected && bitmap as u32 & (bitmap >> 32) as u32 == 0
                    };
                    if entries.next_if(|(_, entry)| follows(entry)).is_none() {
                        break;
                    }
                    expected = expected.wrapping_add(size);
                    end += size;
                    count += 1;
                }
            }
            visit(L2Item::Clusters { index, host, count, copied: raw & COPIED != 0 });
        }
    }

    /// The two words of entry `index`; the second is 0 without extended L2 entries. `None` if the entry is
    /// outside `table`.
    pub fn words_at(&self, table: &[u8], index: L2Index) -> Option<(u64, u64)> {
        let step = self.geometry.l2_entry_size() as usize;
        let at = usize::try_from(index.value()).ok()?.checked_mul(step)?;
        table.get(at..at.checked_add(step)?).map(|entry| self.entry_words(entry))
    }

    /// The host offset in an entry's first word, unchecked. Exact to the byte for a compressed cluster.
    pub const fn offset_bits(&self, raw: u64) -> HostOffset {
        let mask = if raw & COMPRESSED != 0 { (1 << self.compressed_shift()) - 1 } else { OFFSET_MASK };
        HostOffset::new(raw & mask)
    }

    pub(super) fn entry_words(&self, entry: &[u8]) -> (u64, u64) {
        let word = |at| bytes::read_u64(entry, at).unwrap_or_default();
        (word(0), if self.geometry.extended_l2() { word(8) } else { 0 })
    }

    /// Visits all of an entry but the standard cluster that it refers to, which is returned.
    fn scan_entry(
        &self,
        index: L2Index,
        raw: u64,
        bitmap: u64,
        visit: &mut impl FnMut(L2Item),
    ) -> Option<HostOffset> {
        if raw & COMPRESSED != 0 {
            self.scan_compressed(index, raw, bitmap, visit);
            return None;
        }
        let mut fault = |fault| visit(L2Item::Fault { index, fault, raw });
        if raw & RESERVED != 0 {
            fault(L2Fault::ReservedBits);
        }
        let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        let extended = self.geometry.extended_l2();
        let zero_flag = raw & ZERO != 0 && !extended;
        let offset = raw & OFFSET_MASK;
        if offset == 0 && !(self.external_data && raw & COPIED != 0 && !zero_flag) {
            if allocated != 0 {
                fault(L2Fault::UnallocatedWithBitmap);
            }
            return None;
        }
        if allocated & zero != 0 {
            fault(L2Fault::SubclusterBitmap);
        }
        if !self.geometry.is_aligned(offset) {
            let holds_data = if extended { allocated != 0 } else { !zero_flag };
            fault(if holds_data { L2Fault::DataMisaligned } else { L2Fault::PreallocatedMisaligned });
        }
        Some(HostOffset::new(offset))
    }

    fn scan_compressed(&self, index: L2Index, raw: u64, bitmap: u64, visit: &mut impl FnMut(L2Item)) {
        let mut fault = |fault, raw| visit(L2Item::Fault { index, fault, raw });
        if raw & COPIED != 0 {
            fault(L2Fault::CompressedCopied, raw);
        }
        let raw = raw & !COPIED;
        if self.external_data {
            return fault(L2Fault::CompressedInDataFile, raw);
        }
        if bitmap != 0 {
            return fault(L2Fault::CompressedWithBitmap, raw);
        }
        let shift = self.compressed_shift();
        let offset = raw & ((1 << shift) - 1);
        let sectors = (raw & !COMPRESSED) >> shift;
        let len = (sectors + 1) * SECTOR - offset % SECTOR;
        visit(L2Item::Compressed { index, stream: CompressedCluster { host: HostOffset::new(offset), len } });
    }
}

#[cfg(test)]
mod tests {
    use super::super::{ClusterEntry, L2Entry};
    use super::*;
    use crate::geometry::{Geometry, GeometryFields};
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn format(cluster_bits: u32, extended_l2: bool) -> L2Format {
        let geometry =
            Geometry::new(GeometryFields { cluster_bits, refcount_order: 4, extended_l2 }).unwrap();
        L2Format { geometry, zero_flag: true, external_data: false }
    }

    fn scan(format: &L2Format, words: &[u64]) -> Vec<L2Item> {
        let table: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
        let mut items = Vec::new();
        format.scan(&table, |item| items.push(item));
        items
    }

    fn run(index: u64, host: u64, count: u64, copied: bool) -> L2Item {
        L2Item::Clusters { index: L2Index::new(index), host: HostOffset::new(host), count, copied }
    }

    fn faults(format: &L2Format, words: &[u64]) -> Vec<L2Fault> {
        let fault = |item| if let L2Item::Fault { fault, .. } = item { Some(fault) } else { None };
        scan(format, words).into_iter().filter_map(fault).collect()
    }

    #[test]
    fn runs_join_what_follows_on_the_host_with_equal_flags() {
        let words = [
            COPIED | 0x50000,
            COPIED | 0x60000,
            COPIED | 0x70001, // zero flag: another state, the same kind of reference
            0x80000,
            0x90000,
            0,
            0xa0000,
            1,
            COPIED,
        ];
        let expected = [
            run(0, 0x50000, 2, true),
            run(2, 0x70001 & !1, 1, true),
            run(3, 0x80000, 2, false),
            run(6, 0xa0000, 1, false),
        ];
        assert_eq!(scan(&format(16, false), &words), expected);
    }

    #[test]
    fn a_run_ends_before_the_last_host_offset_overflows() {
        let last = (1 << 56) - 0x10000;
        let items = scan(&format(16, false), &[COPIED | last, COPIED | (1 << 56)]);
        let fault =
            L2Item::Fault { index: L2Index::new(1), fault: L2Fault::ReservedBits, raw: COPIED | 1 << 56 };
        assert_eq!(items, [run(0, last, 1, true), fault]);
    }

    #[test]
    fn faults_without_subclusters() {
        let format = format(16, false);
        assert_eq!(faults(&format, &[0x50000 | 1 << 60]), [L2Fault::ReservedBits]);
        assert_eq!(faults(&format, &[0x50200]), [L2Fault::DataMisaligned]);
        assert_eq!(faults(&format, &[0x50201]), [L2Fault::PreallocatedMisaligned]);
        assert_eq!(faults(&format, &[COPIED | COMPRESSED]), [L2Fault::CompressedCopied]);
        assert_eq!(scan(&format, &[0x50200, 0x60200]).len(), 4, "misaligned clusters are not joined");
        let external = L2Format { external_data: true, ..format };
        assert_eq!(faults(&external, &[COMPRESSED]), [L2Fault::CompressedInDataFile]);
        assert_eq!(scan(&external, &[COPIED, COPIED | 0x10000]), [run(0, 0, 2, true)]);
    }

    #[test]
    fn faults_with_subclusters() {
        let format = format(16, true);
        assert_eq!(faults(&format, &[0x50000, 0x1_0000_0001]), [L2Fault::SubclusterBitmap]);
        assert_eq!(faults(&format, &[0, 0x1_0000_0001]), [L2Fault::UnallocatedWithBitmap]);
        assert_eq!(faults(&format, &[0x50200, 0]), [L2Fault::PreallocatedMisaligned]);
        assert_eq!(faults(&format, &[0x50200, 1]), [L2Fault::DataMisaligned]);
        assert_eq!(faults(&format, &[COMPRESSED, 4]), [L2Fault::CompressedWithBitmap]);
        let items = scan(&format, &[0x50000, 1, 0x60000, 0x1_0000_0001, 0x70000, 0]);
        assert_eq!((items[0], items[2]), (run(0, 0x50000, 1, false), run(1, 0x60000, 2, false)));
        assert!(matches!(items[1], L2Item::Fault { .. }), "a broken bitmap ends the run");
    }

    proptest! {
        /// Without faults, a scan finds exactly what decoding entry by entry finds.
        #[test]
        fn a_scan_agrees_with_decoding(
            extended: bool,
            words in proptest::collection::vec((0..40u64, 0..8u8, any::<u64>()), 0..64),
        ) {
            let format = format(16, extended);
            let raws: Vec<u64> = words.iter().flat_map(|&(cluster, kind, other)| match kind {
                0 => [0, 0],
                1 => [COMPRESSED | other & 0x00ff_ffff_ffff_ffff, 0],
                2 => [COPIED | cluster << 16, other & 0xffff],
                3 => [cluster << 16 | 1, 0],
                4 => [other, other.rotate_left(9)],
                _ => [cluster << 16, 0],
            }.into_iter().take(if extended { 2 } else { 1 })).collect();
            let mut expected = Vec::new();
            let mut clean = true;
            for (index, entry) in raws.chunks(if extended { 2 } else { 1 }).enumerate() {
                match format.decode(entry[0], entry.get(1).copied().unwrap_or(0)) {
                    Ok(L2Entry::Standard(ClusterEntry { host: Some(host), copied, .. })) => {
                        expected.push((index as u64, host.value(), copied));
                    }
                    Ok(_) => {}
                    Err(_) => clean = false,
                }
            }
            let mut found = Vec::new();
            for item in scan(&format, &raws) {
                match item {
                    L2Item::Clusters { index, host, count, copied } => found.extend(
                        (0..count).map(|i| (index.value() + i, host.value() + i * 65536, copied)),
                    ),
                    L2Item::Fault { .. } => {}
                    L2Item::Compressed { stream, .. } => prop_assert!(stream.len >= 1),
                }
            }
            if clean {
                prop_assert_eq!(found, expected);
            }
        }
    }
}
