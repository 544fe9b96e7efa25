//! A validated LUKS header with its cipher, its hash and the location of its parts.

use super::split::split;
use crate::error::{CryptError, SlotRefusal};
use crate::secret::Secret;
use crate::sector::SectorCipher;
use crate::spec::{CipherSpec, HashAlg};
use qcow2_core::{HostOffset, SectorNumbering, Storage};
use qcow2_format::FormatErrorKind;
use qcow2_format::crypt::{LUKS_HEADER_LEN, LUKS_KEY_SLOTS, LuksHeader};

/// Sector size in bytes, the unit of the header's offsets.
pub(super) const SECTOR: u64 = 512;
/// Stripes of the key material. Origin: the specification; no other number is accepted.
pub(super) const STRIPES: u32 = 4000;
/// First sector that may hold key material, and the alignment of key material in sectors. Origin: QEMU and
/// cryptsetup.
pub(super) const ALIGNMENT_SECTORS: u64 = 8;
/// Minimum key derivation rounds. Origin: QEMU and cryptsetup.
pub(super) const MIN_ITERATIONS: u64 = 1000;

/// A validated header with its cipher and hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    pub(super) header: LuksHeader,
    pub(super) spec: CipherSpec,
    pub(super) hash: HashAlg,
}

impl Volume {
    /// Reads the header at `at`: offset 0 of a container, or the area that a qcow2 header points to. Errors:
    /// `Damaged` if there is no header, or slots lie outside the area or overlap; `Unsupported` for version 2
    /// and for an unknown cipher or hash; `Storage`.
    pub fn read(storage: &dyn Storage, at: HostOffset) -> Result<Self, CryptError> {
        let mut bytes = [0; LUKS_HEADER_LEN];
        // A file that is too short for a header has none; what is missing reads as zeroes.
        storage.read_padded(at, &mut bytes)?;
        Self::parse(&bytes)
    }

    /// Like [`read`](Self::read), from the header's bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, CryptError> {
        let header = LuksHeader::parse(bytes).map_err(|e| match e.kind() {
            FormatErrorKind::LuksVersion(version) => {
                CryptError::unsupported(format!("LUKS version {version} is not supported, only version 1 is"))
            }
            FormatErrorKind::NotLuks => CryptError::damaged("volume is not in LUKS format"),
            _ => CryptError::damaged("LUKS header is damaged").with_source(e),
        })?;
        // Checked before any arithmetic with the length. No cipher has longer keys.
        let key_len = usize::try_from(header.key_bytes).ok().filter(|&len| len <= MAX_KEY_LEN);
        let key_len = key_len.ok_or_else(|| {
            CryptError::damaged(format!("LUKS key has {} bytes, allowed are {MAX_KEY_LEN}", header.key_bytes))
        })?;
        let spec = CipherSpec::parse(&header.cipher, &header.mode, key_len)?;
        let hash = HashAlg::from_name(&header.hash)
            .ok_or_else(|| CryptError::unsupported(format!("hash '{}' is not known", header.hash)))?;
        let volume = Self { header, spec, hash };
        volume.check_layout()?;
        Ok(volume)
    }

    /// Slots must lie after the header, before the payload, and must not overlap.
    fn check_layout(&self) -> Result<(), CryptError> {
        let payload = u64::from(self.header.payload_offset_sectors);
        if payload < ALIGNMENT_SECTORS {
            return Err(CryptError::damaged(format!("LUKS payload at sector {payload} overlaps the header")));
        }
        if self.header.digest_iterations == 0 {
            return Err(CryptError::damaged("LUKS key digest has no iterations"));
        }
        let sectors = self.material_len() / SECTOR;
        let place = |index: usize| u64::from(self.header.slots[index].material_offset_sectors);
        for (index, slot) in self.header.slots.iter().enumerate() {
            let (start, end) = (place(index), place(index) + sectors);
            let fault = if slot.stripes != STRIPES {
                format!("has {} stripes, allowed are {STRIPES}", slot.stripes)
            } else if start < ALIGNMENT_SECTORS || end > payload {
                format!("lies at sectors {start} to {end}, allowed are {ALIGNMENT_SECTORS} to {payload}")
            } else if slot.enabled && slot.iterations == 0 {
                "has no iterations".to_owned()
            } else if let Some(other) = (0..index).find(|&i| place(i) < end && start < place(i) + sectors) {
                format!("overlaps key slot {other}")
            } else {
                continue;
            };
            return Err(CryptError::damaged(format!("LUKS key slot {index} {fault}")));
        }
        Ok(())
    }

    /// The parsed header.
    pub fn header(&self) -> &LuksHeader {
        &self.header
    }

    /// Cipher, mode and IV generator.
    pub fn spec(&self) -> &CipherSpec {
        &self.spec
    }

    /// The hash for the key derivation.
    pub fn hash(&self) -> HashAlg {
        self.hash
    }

    /// Start of a container's data, in bytes.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.header.payload_offset_sectors) * SECTOR
    }

    /// The cipher for guest data with the master key `key`.
    pub fn cipher(&self, key: &Secret, numbering: SectorNumbering) -> Result<SectorCipher, CryptError> {
        SectorCipher::new(&self.spec, key, numbering)
    }

    /// The slots that hold a key.
    pub fn active_slots(&self) -> impl Iterator<Item = usize> {
        (0..LUKS_KEY_SLOTS).filter(|&index| self.header.slots[index].enabled)
    }

    /// Length of a slot's key material in bytes, rounded up to whole sectors.
    pub(super) fn material_len(&self) -> u64 {
        material_len(self.spec.key_len())
    }

    pub(super) fn slot_offset(&self, index: usize) -> u64 {
        u64::from(self.header.slots[index].material_offset_sectors) * SECTOR
    }
}

/// The longest master key in bytes: two cipher keys of 32 (XTS).
const MAX_KEY_LEN: usize = 64;

pub(super) fn material_len(key_len: usize) -> u64 {
    (key_len as u64 * u64::from(STRIPES)).next_multiple_of(SECTOR)
}

/// The key material of a slot: the master key `key`, split and encrypted under `slot_key`.
pub(super) fn seal(
    spec: &CipherSpec,
    hash: HashAlg,
    (key, slot_key): (&Secret, &Secret),
    random: &mut dyn crate::Random,
) -> Result<Vec<u8>, CryptError> {
    let mut material = Secret::zeroed(material_len(spec.key_len()) as usize);
    random.fill(material.bytes_mut())?;
    let len = spec.key_len() * STRIPES as usize;
    split(hash, key.bytes(), &mut material.bytes_mut()[..len]);
    let cipher = SectorCipher::new(spec, slot_key, SectorNumbering::Host)?;
    cipher.encrypt_sectors(0, material.bytes_mut());
    Ok(material.bytes().to_vec())
}

pub(super) fn slot_index(index: u64) -> Result<usize, CryptError> {
    let found = usize::try_from(index).ok().filter(|&index| index < LUKS_KEY_SLOTS);
    found.ok_or_else(|| CryptError::from(SlotRefusal::NoSuchSlot(index)))
}
