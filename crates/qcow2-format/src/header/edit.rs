//! A header's first cluster as bytes: where the extensions are, and what editing them has to know. Spec:
//! "Header extensions", "Bitmaps extension".
//!
//! The list starts at the header's length: type (4 bytes), length (4), data padded to 8; type 0 ends it. The
//! backing file's name comes somewhere after it.

use crate::bytes::{read_u32, read_u64, write_u64};
use crate::extension::{BITMAPS, BITMAPS_LEN, BitmapsExtension};
use crate::feature::AutoclearFeatures;
use core::ops::Range;

/// Bytes of an extension's type and length, and of the end marker.
pub const EXTENSION_HEADER_LEN: usize = 8;
/// Bytes of the bitmaps extension, type and length included.
pub const BITMAPS_RECORD_LEN: usize = EXTENSION_HEADER_LEN + BITMAPS_LEN as usize;

const AUTOCLEAR: usize = 88;
const HEADER_LEN: usize = 100;
const BACKING_OFFSET: usize = 8;
const BACKING_LEN: usize = 16;

/// Where things are in a version 3 header's first cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtensionPlaces {
    /// The bitmaps extension.
    pub bitmaps: Option<usize>,
    /// The end marker.
    pub end: usize,
}

impl ExtensionPlaces {
    /// Finds them in the bytes of a first cluster; `None` where the list passes its end.
    pub fn find(cluster: &[u8]) -> Option<Self> {
        let limit = backing_name(cluster).map_or(cluster.len(), |name| name.start);
        let mut at = read_u32(cluster, HEADER_LEN)? as usize;
        let mut bitmaps = None;
        while at + EXTENSION_HEADER_LEN <= limit {
            let (kind, len) = (read_u32(cluster, at)?, read_u32(cluster, at + 4)? as usize);
            match kind {
                0 => break,
                BITMAPS => bitmaps = Some(at),
                _ => {}
            }
            at = at.checked_add(EXTENSION_HEADER_LEN)?.checked_add(len.checked_next_multiple_of(8)?)?;
        }
        Some(Self { bitmaps, end: at })
    }
}

/// Where the backing file's name is, if there is one.
pub fn backing_name(cluster: &[u8]) -> Option<Range<usize>> {
    let start = usize::try_from(read_u64(cluster, BACKING_OFFSET)?).ok().filter(|&start| start != 0)?;
    Some(start..start.checked_add(read_u32(cluster, BACKING_LEN)? as usize)?)
}

/// Makes the header say that the backing file's name starts at byte `at`.
pub fn set_backing_name_start(cluster: &mut [u8], at: usize) {
    let _ = write_u64(cluster, BACKING_OFFSET, at as u64);
}

/// The autoclear features.
pub fn autoclear(cluster: &[u8]) -> AutoclearFeatures {
    AutoclearFeatures::from_bits(read_u64(cluster, AUTOCLEAR).unwrap_or(0))
}

/// Changes the autoclear features.
pub fn set_autoclear(cluster: &mut [u8], features: AutoclearFeatures) {
    let _ = write_u64(cluster, AUTOCLEAR, features.bits());
}

/// The bitmaps extension as it is stored, type and length first.
pub fn bitmaps_record(extension: &BitmapsExtension) -> [u8; BITMAPS_RECORD_LEN] {
    let mut bytes = [0; BITMAPS_RECORD_LEN];
    bytes[..4].copy_from_slice(&BITMAPS.to_be_bytes());
    bytes[4..8].copy_from_slice(&BITMAPS_LEN.to_be_bytes());
    bytes[8..12].copy_from_slice(&extension.count.to_be_bytes());
    bytes[16..24].copy_from_slice(&extension.directory_size.to_be_bytes());
    bytes[24..].copy_from_slice(&extension.directory_offset.value().to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::{Header, Version};
    use crate::units::HostOffset;

    #[test]
    fn places_are_those_of_an_encoded_header() {
        let mut header = Header::new(Version::V3, 12);
        header.backing_file = Some(b"base".to_vec());
        header.extensions.backing_format = Some(b"raw".to_vec());
        let extension = BitmapsExtension {
            count: 1,
            reserved: 0,
            directory_size: 32,
            directory_offset: HostOffset::new(0x5000),
        };
        header.extensions.bitmaps = Some(extension);
        header.autoclear_features = AutoclearFeatures::BITMAPS;
        let mut cluster = header.encode_cluster().unwrap();
        let places = ExtensionPlaces::find(&cluster).unwrap();
        let at = places.bitmaps.unwrap();
        assert_eq!(cluster[at..at + BITMAPS_RECORD_LEN], bitmaps_record(&extension));
        assert_eq!(cluster[places.end..places.end + EXTENSION_HEADER_LEN], [0; EXTENSION_HEADER_LEN]);
        assert_eq!(&cluster[backing_name(&cluster).unwrap()], b"base");
        assert_eq!(autoclear(&cluster), AutoclearFeatures::BITMAPS);
        set_autoclear(&mut cluster, AutoclearFeatures::NONE);
        set_backing_name_start(&mut cluster, 600);
        assert_eq!((autoclear(&cluster), backing_name(&cluster)), (AutoclearFeatures::NONE, Some(600..604)));
        cluster[at + 4..at + 8].fill(0xff);
        assert!(ExtensionPlaces::find(&cluster).is_none_or(|places| places.end > cluster.len()));
        assert_eq!(ExtensionPlaces::find(&[0; 20]), None);
    }
}
