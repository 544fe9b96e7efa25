//! The LUKS version 1 header, stored in the area that the [`LuksPointer`](crate::LuksPointer) describes.
//! Spec: "Full disk encryption header pointer"; LUKS On-Disk Format Specification 1.2.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 6 | magic, `LUKS` 0xba 0xbe |
//! | 6 | 2 | version, 1 |
//! | 8, 40, 72 | 32 each | names, padded with zeroes: cipher, mode with IV generator, hash |
//! | 104 | 4 | payload offset in sectors (not used inside qcow2) |
//! | 108 | 4 | bytes of the master key |
//! | 112, 132, 164 | 20, 32, 4 | master key digest, its salt, its iterations |
//! | 168 | 40 | UUID as text |
//! | 208 | 8 x 48 | key slots |
//!
//! A key slot: state (4), iterations (4), salt (32), key material offset in sectors (4), stripes (4).

use crate::bytes::Reader;
use crate::error::{FormatError, FormatErrorKind};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

/// Length of the header in bytes.
pub const LUKS_HEADER_LEN: usize = 592;
/// Number of key slots.
pub const LUKS_KEY_SLOTS: usize = 8;

const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
const VERSION: u16 = 1;
const SLOT_ENABLED: u32 = 0x00ac_71f3;
const SLOT_DISABLED: u32 = 0x0000_dead;

/// The fields of a LUKS header, as stored. Parsing does not check the numbers; the code that unlocks does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksHeader {
    /// The cipher's name, such as `aes`; at most 32 bytes.
    pub cipher: String,
    /// Mode and IV generator, such as `xts-plain64`; at most 32 bytes.
    pub mode: String,
    /// Hash for the key derivation and the anti-forensic splitter, such as `sha256`; at most 32 bytes.
    pub hash: String,
    /// Start of the payload of a plain LUKS volume, in 512-byte sectors. Not used inside qcow2.
    pub payload_offset_sectors: u32,
    /// Length of the master key in bytes.
    pub key_bytes: u32,
    /// PBKDF2 digest of the master key, to recognise the right one.
    pub digest: [u8; 20],
    /// Salt of that digest.
    pub digest_salt: [u8; 32],
    /// PBKDF2 iterations of that digest.
    pub digest_iterations: u32,
    /// The volume's UUID as text; at most 40 bytes.
    pub uuid: String,
    /// The key slots.
    pub slots: [LuksSlot; LUKS_KEY_SLOTS],
}

/// One key slot: the master key, encrypted under one password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksSlot {
    /// True if the slot holds a key.
    pub enabled: bool,
    /// PBKDF2 iterations for the password.
    pub iterations: u32,
    /// PBKDF2 salt for the password.
    pub salt: [u8; 32],
    /// Start of the key material, in 512-byte sectors from the start of the header.
    pub material_offset_sectors: u32,
    /// Number of anti-forensic stripes in the key material.
    pub stripes: u32,
}

impl LuksHeader {
    /// Parses a header from the first 592 bytes of the area. Each text field must be UTF-8 and end with a
    /// zero byte inside its field.
    ///
    /// Errors: `Truncated`, `NotLuks`, `LuksVersion`, `LuksName`, `LuksSlotState`.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(bytes.get(..LUKS_HEADER_LEN).ok_or_else(truncated)?, 0);
        if reader.take(MAGIC.len()) != Some(&MAGIC) {
            return Err(FormatError::new(FormatErrorKind::NotLuks, "luks header: wrong magic"));
        }
        let version = reader.u16().ok_or_else(truncated)?;
        if version != VERSION {
            let message = format!("luks header: version is {version}, allowed is {VERSION}");
            return Err(FormatError::new(FormatErrorKind::LuksVersion(version), message));
        }
        Ok(Self {
            cipher: name(&mut reader, "cipher", 32)?,
            mode: name(&mut reader, "mode", 32)?,
            hash: name(&mut reader, "hash", 32)?,
            payload_offset_sectors: reader.u32().ok_or_else(truncated)?,
            key_bytes: reader.u32().ok_or_else(truncated)?,
            digest: array(&mut reader)?,
            digest_salt: array(&mut reader)?,
            digest_iterations: reader.u32().ok_or_else(truncated)?,
            uuid: name(&mut reader, "uuid", 40)?,
            slots: slots(&mut reader)?,
        })
    }

    /// Encodes the header as 592 bytes. Errors: `LuksName` for a text that does not fit with its terminating
    /// zero.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let mut out = Vec::with_capacity(LUKS_HEADER_LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_be_bytes());
        put_name(&mut out, "cipher", &self.cipher, 32)?;
        put_name(&mut out, "mode", &self.mode, 32)?;
        put_name(&mut out, "hash", &self.hash, 32)?;
        out.extend_from_slice(&self.payload_offset_sectors.to_be_bytes());
        out.extend_from_slice(&self.key_bytes.to_be_bytes());
        out.extend_from_slice(&self.digest);
        out.extend_from_slice(&self.digest_salt);
        out.extend_from_slice(&self.digest_iterations.to_be_bytes());
        put_name(&mut out, "uuid", &self.uuid, 40)?;
        for slot in &self.slots {
            let state = if slot.enabled { SLOT_ENABLED } else { SLOT_DISABLED };
            out.extend_from_slice(&state.to_be_bytes());
            out.extend_from_slice(&slot.iterations.to_be_bytes());
            out.extend_from_slice(&slot.salt);
            out.extend_from_slice(&slot.material_offset_sectors.to_be_bytes());
            out.extend_from_slice(&slot.stripes.to_be_bytes());
        }
        Ok(out)
    }
}

fn slots(reader: &mut Reader<'_>) -> Result<[LuksSlot; LUKS_KEY_SLOTS], FormatError> {
    let mut slots = Vec::with_capacity(LUKS_KEY_SLOTS);
    for index in 0..LUKS_KEY_SLOTS {
        let state = reader.u32().ok_or_else(truncated)?;
        if state != SLOT_ENABLED && state != SLOT_DISABLED {
            let message = format!("luks key slot {index}: state is {state:#x}");
            return Err(FormatError::new(FormatErrorKind::LuksSlotState(state), message));
        }
        slots.push(LuksSlot {
            enabled: state == SLOT_ENABLED,
            iterations: reader.u32().ok_or_else(truncated)?,
            salt: array(reader)?,
            material_offset_sectors: reader.u32().ok_or_else(truncated)?,
            stripes: reader.u32().ok_or_else(truncated)?,
        });
    }
    slots.try_into().map_err(|_| truncated())
}

fn array<const N: usize>(reader: &mut Reader<'_>) -> Result<[u8; N], FormatError> {
    reader.take(N).and_then(|b| b.try_into().ok()).ok_or_else(truncated)
}

fn name(reader: &mut Reader<'_>, what: &'static str, len: usize) -> Result<String, FormatError> {
    let field = reader.take(len).ok_or_else(truncated)?;
    let end = field.iter().position(|&b| b == 0);
    let text = end.and_then(|end| core::str::from_utf8(&field[..end]).ok());
    text.map(String::from).ok_or_else(|| bad_name(what, len))
}

fn put_name(out: &mut Vec<u8>, what: &'static str, text: &str, len: usize) -> Result<(), FormatError> {
    if text.len() >= len || text.contains('\0') {
        return Err(bad_name(what, len));
    }
    let end = out.len() + len;
    out.extend_from_slice(text.as_bytes());
    out.resize(end, 0);
    Ok(())
}

fn bad_name(what: &'static str, len: usize) -> FormatError {
    FormatError::new(
        FormatErrorKind::LuksName(what),
        format!("luks header: {what} is not a name of at most {} bytes", len - 1),
    )
}

fn truncated() -> FormatError {
    FormatError::new(
        FormatErrorKind::Truncated,
        format!("luks header is shorter than {LUKS_HEADER_LEN} bytes"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> LuksHeader {
        let slot = |i: u32| LuksSlot {
            enabled: i == 0,
            iterations: i * 1000,
            salt: [i as u8; 32],
            material_offset_sectors: 8 + i * 504,
            stripes: 4000,
        };
        LuksHeader {
            cipher: "aes".into(),
            mode: "xts-plain64".into(),
            hash: "sha256".into(),
            payload_offset_sectors: 4040,
            key_bytes: 64,
            digest: [3; 20],
            digest_salt: [4; 32],
            digest_iterations: 5,
            uuid: "e6a33a1f-ae0d-4ae8-b6d3-c0b0a9c2a5c0".into(),
            slots: core::array::from_fn(|i| slot(i as u32)),
        }
    }

    #[test]
    fn headers_round_trip() {
        let bytes = header().encode().unwrap();
        assert_eq!(bytes.len(), LUKS_HEADER_LEN);
        assert_eq!(&bytes[104..108], &4040u32.to_be_bytes());
        assert_eq!(&bytes[208..212], &SLOT_ENABLED.to_be_bytes());
        assert_eq!(LuksHeader::parse(&bytes).unwrap(), header());
    }

    #[test]
    fn each_fault_has_its_error_kind() {
        let bytes = header().encode().unwrap();
        let kind = |at: usize, byte: u8| {
            let mut broken = bytes.clone();
            broken[at] = byte;
            LuksHeader::parse(&broken).unwrap_err().kind().clone()
        };
        assert_eq!(kind(0, b'l'), FormatErrorKind::NotLuks);
        assert_eq!(kind(7, 2), FormatErrorKind::LuksVersion(2));
        assert_eq!(kind(8, 0xff), FormatErrorKind::LuksName("cipher"));
        assert_eq!(kind(208, 1), FormatErrorKind::LuksSlotState(0x01ac_71f3));
        assert_eq!(LuksHeader::parse(&bytes[..591]).unwrap_err().kind(), &FormatErrorKind::Truncated);
        let unending = LuksHeader { hash: "h".repeat(32), ..header() };
        assert_eq!(unending.encode().unwrap_err().kind(), &FormatErrorKind::LuksName("hash"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..700),
            fix in any::<bool>(),
        ) {
            if fix && bytes.len() >= 8 {
                bytes[..6].copy_from_slice(&MAGIC);
                bytes[6..8].copy_from_slice(&[0, 1]);
            }
            let _ = LuksHeader::parse(&bytes);
        }
    }
}
