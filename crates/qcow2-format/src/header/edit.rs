//! In-place edits of a header's first cluster, as bytes: where the extensions are, and the fields that an
//! edit touches. Spec: "Header extensions", "Bitmaps extension".
//!
//! The list starts at offset `header_length`. Each extension: type (4 bytes), length (4), data padded to 8;
//! type 0 ends the list. The backing file name follows somewhere after it.

use crate::bytes::{read_u32, read_u64, write_u64};
use crate::extension::{BITMAPS, BITMAPS_LEN, BitmapsExtension};
use crate::feature::AutoclearFeatures;
use core::ops::Range;

/// Length of an extension's type and length fields, and of the end marker, in bytes.
pub const EXTENSION_HEADER_LEN: usize = 8;
/// Length of the bitmaps extension in bytes, type and length fields included.
pub const BITMAPS_RECORD_LEN: usize = EXTENSION_HEADER_LEN + BITMAPS_LEN as usize;

const AUTOCLEAR: usize = 88;
const HEADER_LEN: usize = 100;
const BACKING_OFFSET: usize = 8;
const BACKING_LEN: usize = 16;

/// Byte offsets of extensions in the first cluster of a version 3 image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtensionPlaces {
    /// The bitmaps extension, if there is one.
    pub bitmaps: Option<usize>,
    /// The end marker, or the end of the list if there is no marker.
    pub end: usize,
}

impl ExtensionPlaces {
    /// Walks the extension list of a first cluster. `None` if the list runs past the end of the buffer.
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

/// Byte range of the backing file name, if there is one.
pub fn backing_name(cluster: &[u8]) -> Option<Range<usize>> {
    let start = usize::try_from(read_u64(cluster, BACKING_OFFSET)?).ok().filter(|&start| start != 0)?;
    Some(start..start.checked_add(read_u32(cluster, BACKING_LEN)? as usize)?)
}

/// Sets the header's offset of the backing file name to `at`.
pub fn set_backing_name_start(cluster: &mut [u8], at: usize) {
    let _ = write_u64(cluster, BACKING_OFFSET, at as u64);
}

/// The autoclear feature word.
pub fn autoclear(cluster: &[u8]) -> AutoclearFeatures {
    AutoclearFeatures::from_bits(read_u64(cluster, AUTOCLEAR).unwrap_or(0))
}

/// Sets the autoclear feature word.
pub fn set_autoclear(cluster: &mut [u8], features: AutoclearFeatures) {
    let _ = write_u64(cluster, AUTOCLEAR, features.bits());
}

/// Encodes the bitmaps extension, type and length fields first.
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
    fn finds_and_edits_the_extensions_of_an_encoded_header() {
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
        header.features.autoclear = AutoclearFeatures::BITMAPS;
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
