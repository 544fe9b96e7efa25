//! Detects the format of an image by its first bytes. Only safe for trusted content: whoever can write to a
//! raw disk can make it look like any format.

use qcow2_core::format::signature::{PROBE_LEN, probe};
use qcow2_core::{HostOffset, ImageFormat, Storage, StorageError};

/// Detects the format of `storage` by its first 512 bytes. Raw if nothing matches, so an empty storage is raw
/// too. A qcow2 signature with any version from 2 on is qcow2 (the open may still refuse the version).
/// Errors: the read fails.
///
/// ```
/// use qcow2_core::ImageFormat;
/// use qcow2_io::{MemoryStorage, probe_format};
///
/// let storage = MemoryStorage::from(b"QFI\xFB\x00\x00\x00\x03".to_vec());
/// assert_eq!(probe_format(&storage)?, ImageFormat::Qcow2);
/// assert_eq!(probe_format(&MemoryStorage::new())?, ImageFormat::Raw);
/// # Ok::<(), qcow2_core::StorageError>(())
/// ```
pub fn probe_format(storage: &dyn Storage) -> Result<ImageFormat, StorageError> {
    let mut head = [0; PROBE_LEN];
    storage.read_padded(HostOffset::new(0), &mut head)?;
    Ok(format_of(&head))
}

fn format_of(head: &[u8; PROBE_LEN]) -> ImageFormat {
    probe(head).map_or(ImageFormat::Raw, |container| ImageFormat::from_name(container.name()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStorage;

    fn probe(at: usize, bytes: &[u8]) -> ImageFormat {
        let mut content = vec![0; at];
        content.extend_from_slice(bytes);
        probe_format(&MemoryStorage::from(content)).unwrap()
    }

    #[test]
    fn qcow2_is_detected_from_version_two_on() {
        assert_eq!(probe(0, b"QFI\xFB\x00\x00\x00\x00"), ImageFormat::Raw);
        assert_eq!(probe(0, b"QFI\xFB\x00\x00\x00\x01"), ImageFormat::Other("qcow".into()));
        assert_eq!(probe(0, b"QFI\xFB\x00\x00\x00\x02"), ImageFormat::Qcow2);
        assert_eq!(probe(0, b"QFI\xFB\x00\x00\x00\x09"), ImageFormat::Qcow2);
        assert_eq!(probe(1, b"QFI\xFB\x00\x00\x00\x03"), ImageFormat::Raw);
    }

    #[test]
    fn other_formats_are_detected_by_signature() {
        assert_eq!(probe(64, b"\x7F\x10\xDA\xBE"), ImageFormat::Other("vdi".into()));
        assert_eq!(probe(0, b"vhdxfile"), ImageFormat::Other("vhdx".into()));
        assert_eq!(probe(0, b""), ImageFormat::Raw);
        assert_eq!(probe(0, b"vhd"), ImageFormat::Raw);
    }
}
