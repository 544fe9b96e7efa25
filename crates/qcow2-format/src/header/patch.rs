//! Changes of single header fields in the first sector. Spec: "Header".
//!
//! | bytes | field |
//! |---|---|
//! | 24-31 | size |
//! | 36-39, 40-47 | L1 table: entries, offset |
//! | 48-55, 56-59 | refcount table: offset, clusters |
//! | 60-63, 64-71 | snapshot table: entries, offset |
//! | 72-79 | incompatible features, version 3 |
//! | 88-95 | autoclear features, version 3 |
//!
//! All fields lie in the first sector, so that one sector write changes any number of them at once.

use super::Header;
use crate::feature::{AutoclearFeatures, IncompatibleFeatures};
use crate::units::HostOffset;

/// Length of the sector that holds all these fields, in bytes.
pub const SECTOR_LEN: usize = 512;

/// A header field with its new value. The feature words exist in version 3 only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeaderField {
    /// Virtual size in bytes.
    Size(u64),
    /// The active L1 table.
    L1 {
        /// Number of entries.
        entries: u32,
        /// Host offset of the table.
        offset: HostOffset,
    },
    /// The refcount table.
    RefcountTable {
        /// Host offset of the table.
        offset: HostOffset,
        /// Number of clusters.
        clusters: u32,
    },
    /// The snapshot table.
    Snapshots {
        /// Number of snapshots.
        count: u32,
        /// Host offset of the table.
        offset: HostOffset,
    },
    /// The incompatible features.
    Incompatible(IncompatibleFeatures),
    /// The autoclear features.
    Autoclear(AutoclearFeatures),
}

impl HeaderField {
    /// Applies the change to `header` and to `sector`, the bytes it was parsed from, so that the two stay
    /// equal.
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
                header.features.incompatible = features;
                put(72, &features.bits().to_be_bytes());
            }
            Self::Autoclear(features) => {
                header.features.autoclear = features;
                put(88, &features.bits().to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Version;

    /// The patched sector parses to the header with the new value, and no other byte changes.
    #[test]
    fn patched_sector_parses_to_the_changed_header() {
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
