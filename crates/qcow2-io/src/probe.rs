//! Detects the format of an image by its first bytes. Only safe for trusted content: whoever can write to a
//! raw disk can make it look like any format.

use qcow2_core::{HostOffset, ImageFormat, Storage, StorageError};

/// Bytes that are examined, as in QEMU.
const PROBE_LEN: usize = 512;

/// Signatures of formats that are recognised but not supported: offset, bytes, and QEMU's name.
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0, b"LUKS\xBA\xBE\x00\x01", "luks"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (64, b"\x7F\x10\xDA\xBE", "vdi"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"QED\x00", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
];

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
    if head.starts_with(b"QFI\xFB") {
        match u32::from_be_bytes([head[4], head[5], head[6], head[7]]) {
            0 => {}
            1 => return ImageFormat::Other("qcow".to_owned()),
            _ => return ImageFormat::Qcow2,
        }
    }
    let found = SIGNATURES.iter().find(|(at, bytes, _)| head[*at..].starts_with(bytes));
    found.map_or(ImageFormat::Raw, |(_, _, name)| ImageFormat::from_name(name))
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
