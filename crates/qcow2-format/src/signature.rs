//! The bytes by which files of disk images and of other containers are recognised.
//!
//! A signature proves nothing: whoever can write to a raw disk can write one there. The marked ones are those
//! by which QEMU chooses a format if the user names none.

/// A kind of file that has a signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Container {
    /// qcow2, version 2 and later.
    Qcow2,
    /// qcow, version 1 of the same header.
    Qcow,
    /// QED.
    Qed,
    /// VMDK: a sparse extent, or a text that describes extents.
    Vmdk,
    /// VHD, which QEMU calls vpc.
    Vhd,
    /// VHDX.
    Vhdx,
    /// VDI.
    Vdi,
    /// Parallels, both versions.
    Parallels,
    /// A growing disk of Bochs.
    Bochs,
    /// A compressed loop device.
    Cloop,
    /// DMG, an image of macOS: recognised by its end.
    Dmg,
    /// LUKS, version 1 or 2.
    Luks,
    /// ISO 9660 or UDF.
    Iso,
    /// A partition table, MBR or GPT.
    Partitions,
}

impl Container {
    /// Its name: QEMU's, where QEMU has a driver for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Qcow => "qcow",
            Self::Qed => "qed",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
            Self::Parallels => "parallels",
            Self::Bochs => "bochs",
            Self::Cloop => "cloop",
            Self::Dmg => "dmg",
            Self::Luks => "luks",
            Self::Iso => "iso",
            Self::Partitions => "gpt",
        }
    }

    /// The container of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        ALL.into_iter().find(|container| container.name() == name)
    }

    /// True if it is content of a raw disk: QEMU has no driver that would take the file for anything else.
    pub const fn is_disk_content(self) -> bool {
        matches!(self, Self::Iso | Self::Partitions)
    }
}

const ALL: [Container; 14] = [
    Container::Qcow2,
    Container::Qcow,
    Container::Qed,
    Container::Vmdk,
    Container::Vhd,
    Container::Vhdx,
    Container::Vdi,
    Container::Parallels,
    Container::Bochs,
    Container::Cloop,
    Container::Dmg,
    Container::Luks,
    Container::Iso,
    Container::Partitions,
];

/// Where a signature is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// So many bytes from the start of the file.
    FromStart(u64),
    /// So many bytes before its end.
    FromEnd(u64),
}

/// One signature.
#[derive(Clone, Copy, Debug)]
pub struct Signature {
    /// What has it.
    pub container: Container,
    /// Where its bytes are.
    pub place: Place,
    /// The bytes.
    pub bytes: &'static [u8],
    /// True if it is one by which QEMU chooses a format: such a one lies in the first 512 bytes.
    pub probed: bool,
}

impl Signature {
    /// True if the file whose first bytes are `head` has this signature there. Always false for one that is
    /// not inside of `head`.
    pub fn is_in_head(&self, head: &[u8]) -> bool {
        let Place::FromStart(at) = self.place else { return false };
        let rest = usize::try_from(at).ok().and_then(|at| head.get(at..));
        rest.is_some_and(|rest| rest.starts_with(self.bytes))
    }
}

const fn probed(container: Container, at: u64, bytes: &'static [u8]) -> Signature {
    Signature { container, place: Place::FromStart(at), bytes, probed: true }
}

const fn known(container: Container, place: Place, bytes: &'static [u8]) -> Signature {
    Signature { container, place, bytes, probed: false }
}

/// Every signature but that of qcow, whose first four bytes are those of qcow2: see [`probe`].
pub const SIGNATURES: &[Signature] = &[
    probed(Container::Luks, 0, b"LUKS\xBA\xBE\x00\x01"),
    probed(Container::Vmdk, 0, b"KDMV"),
    probed(Container::Vmdk, 0, b"COWD"),
    probed(Container::Vmdk, 0, b"# Disk DescriptorFile"),
    probed(Container::Vdi, 64, b"\x7F\x10\xDA\xBE"),
    probed(Container::Vhd, 0, b"conectix"),
    probed(Container::Vhdx, 0, b"vhdxfile"),
    probed(Container::Qed, 0, b"QED\x00"),
    probed(Container::Parallels, 0, b"WithoutFreeSpace"),
    probed(Container::Parallels, 0, b"WithouFreSpacExt"),
    probed(Container::Bochs, 0, b"Bochs Virtual HD Image"),
    probed(Container::Cloop, 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
    known(Container::Luks, Place::FromStart(0), b"LUKS\xBA\xBE"),
    known(Container::Vhd, Place::FromEnd(512), b"conectix"),
    // Old versions of Virtual PC write a footer that is one byte shorter.
    known(Container::Vhd, Place::FromEnd(511), b"conectix"),
    known(Container::Dmg, Place::FromEnd(512), b"koly"),
    known(Container::Iso, Place::FromStart(0x8001), b"CD001"),
    known(Container::Iso, Place::FromStart(0x8001), b"NSR02"),
    known(Container::Iso, Place::FromStart(0x8001), b"NSR03"),
    known(Container::Iso, Place::FromStart(0x8001), b"BEA01"),
    known(Container::Partitions, Place::FromStart(512), b"EFI PART"),
    known(Container::Partitions, Place::FromStart(4096), b"EFI PART"),
];

/// Bytes that [`probe`] looks at, as QEMU does.
pub const PROBE_LEN: usize = 512;

/// The format that QEMU would choose for a file that begins with `head`, the first [`PROBE_LEN`] bytes or all
/// of a shorter file. `None`: raw. A qcow2 signature counts with any version from 2 on.
///
/// ```
/// use qcow2_format::signature::{Container, probe};
///
/// assert_eq!(probe(b"QFI\xFB\x00\x00\x00\x03"), Some(Container::Qcow2));
/// assert_eq!(probe(b"QFI\xFB\x00\x00\x00\x01"), Some(Container::Qcow));
/// assert_eq!(probe(b"vhdxfile"), Some(Container::Vhdx));
/// assert_eq!(probe(b"bytes of a disk"), None);
/// ```
pub fn probe(head: &[u8]) -> Option<Container> {
    let found = || SIGNATURES.iter().find(|signature| signature.probed && signature.is_in_head(head));
    qcow(head).or_else(|| found().map(|signature| signature.container))
}

/// The two formats whose headers begin alike. A version that is cut off or 0 belongs to neither.
pub fn qcow(head: &[u8]) -> Option<Container> {
    if !head.starts_with(&crate::header::MAGIC) {
        return None;
    }
    match crate::bytes::read_u32(head, 4) {
        None | Some(0) => None,
        Some(1) => Some(Container::Qcow),
        Some(_) => Some(Container::Qcow2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_and_no_two_are_the_same() {
        for container in ALL {
            assert_eq!(Container::from_name(container.name()), Some(container));
        }
        assert_eq!(Container::from_name("raw"), None);
    }

    #[test]
    fn what_is_probed_lies_in_the_probed_bytes() {
        for signature in SIGNATURES.iter().filter(|signature| signature.probed) {
            let Place::FromStart(at) = signature.place else { panic!("{signature:?}") };
            assert!(at as usize + signature.bytes.len() <= PROBE_LEN, "{signature:?}");
            let mut head = vec![0; at as usize];
            head.extend_from_slice(signature.bytes);
            assert_eq!(probe(&head), Some(signature.container));
            head.pop();
            assert_ne!(probe(&head), Some(signature.container));
        }
    }

    #[test]
    fn other_signatures_choose_no_format() {
        let mut head = vec![0; 0x9000];
        head[0x8001..0x8006].copy_from_slice(b"CD001");
        head[512..520].copy_from_slice(b"EFI PART");
        assert_eq!(probe(&head), None);
        assert_eq!(probe(b"LUKS\xBA\xBE\x00\x02"), None);
        assert_eq!(probe(b"QFI\xFB\x00\x00\x00"), None);
    }
}
