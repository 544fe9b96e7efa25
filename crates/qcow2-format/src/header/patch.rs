//! Single fields of a header, changed in its first sector. Spec: "Header".
//!
//! | bytes | field |
//! |---|---|
//! | 24-31 | size |
//! | 36-39, 40-47 | entries and place of the L1 table |
//! | 48-55, 56-59 | place and clusters of the refcount table |
//! | 60-63, 64-71 | how many snapshots, and where their table is |
//! | 72-79 | incompatible features, version 3 |
//! | 88-95 | autoclear features, version 3 |
//!
//! All lie in the first sector, so that one write of it changes any number of them at once.

use super::Header;
use crate::feature::{AutoclearFeatures, IncompatibleFeatures};
use crate::units::HostOffset;

/// Bytes that hold every field; a sector.
pub const SECTOR_LEN: usize = 512;

/// A field with its new value. The feature words exist in version 3 only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeaderField {
    /// Bytes of the disk.
    Size(u64),
    /// The active L1 table.
    L1 {
        /// How many entries it has.
        entries: u32,
        /// Where it is.
        offset: HostOffset,
    },
    /// The refcount table.
    RefcountTable {
        /// Where it is.
        offset: HostOffset,
        /// How many clusters it has.
        clusters: u32,
    },
    /// The snapshot table.
    Snapshots {
        /// How many snapshots there are.
        count: u32,
        /// Where the table is.
        offset: HostOffset,
    },
    /// The incompatible features.
    Incompatible(IncompatibleFeatures),
    /// The autoclear features.
    Autoclear(AutoclearFeatures),
}

impl HeaderField {
    /// Changes the field in `header` and in `sector`, the bytes that it was parsed from.
    pub fn apply(self, header: &mut Header, sector: &mut [u8; SECTOR_LEN]) {
        let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
        match self {
            Self::Size(size) => {
                header.size = size;
                put(24, &size.to_be_bytes());
            }
            Self::L1 { entries, offset } => {
                header.l1_size = entries;
                header.l1_table_offset = offset;
                put(36, &entries.to_be_bytes());
                put(40, &offset.value().to_be_bytes());
            }
            Self::RefcountTable { offset, clusters } => {
                header.refcount_table_offset = offset;
                header.refcount_table_clusters = clusters;
                put(48, &offset.value().to_be_bytes());
                put(56, &clusters.to_be_bytes());
            }
            Self::Snapshots { count, offset } => {
                header.nb_snapshots = count;
                header.snapshots_offset = offset;
                put(60, &count.to_be_bytes());
                put(64, &offset.value().to_be_bytes());
            }
            Self::Incompatible(features) => {
                header.incompatible_features = features;
                put(72, &features.bits().to_be_bytes());
            }
            Self::Autoclear(features) => {
                header.autoclear_features = features;
                put(88, &features.bits().to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Version;

    /// What is patched parses as what was set, and nothing else differs.
    #[test]
    fn a_patched_sector_is_the_header_with_that_field() {
        let mut start = Header::new(Version::V3, 16);
        (start.size, start.l1_size) = (1 << 30, 2);
        start.l1_table_offset = HostOffset::new(0x30000);
        start.refcount_table_offset = HostOffset::new(0x10000);
        start.refcount_table_clusters = 1;
        let offset = HostOffset::new(0x50000);
        for field in [
            HeaderField::Size(1 << 29),
            HeaderField::L1 { entries: 3, offset },
            HeaderField::RefcountTable { offset, clusters: 2 },
            HeaderField::Snapshots { count: 1, offset },
            HeaderField::Incompatible(IncompatibleFeatures::DIRTY),
            HeaderField::Autoclear(AutoclearFeatures::BITMAPS),
        ] {
            let mut cluster = start.encode_cluster().unwrap();
            let mut sector: [u8; SECTOR_LEN] = cluster[..SECTOR_LEN].try_into().unwrap();
            let mut header = start.clone();
            field.apply(&mut header, &mut sector);
            assert_ne!(header, start);
            cluster[..SECTOR_LEN].copy_from_slice(&sector);
            assert_eq!(Header::parse(&cluster).unwrap(), header);
            assert_eq!(header.encode_cluster().unwrap(), cluster);
        }
    }
}
