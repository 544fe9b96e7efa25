//! The header of a volume: what makes sense of it, and where its parts are.

use super::split::split;
use crate::error::{CryptError, SlotRefusal};
use crate::secret::Secret;
use crate::sector::SectorCipher;
use crate::spec::{CipherSpec, HashAlg};
use qcow2_core::{HostOffset, SectorNumbering, Storage};
use qcow2_format::FormatErrorKind;
use qcow2_format::crypt::{LUKS_HEADER_LEN, LUKS_KEY_SLOTS, LuksHeader};

/// Bytes of a sector, the unit of the header's offsets.
pub(super) const SECTOR: u64 = 512;
/// Stripes that key material is spread over. Origin: the specification; no other number is written or read.
pub(super) const STRIPES: u32 = 4000;
/// Sectors before the first key material, and what key material is aligned to. Origin: QEMU and cryptsetup.
pub(super) const ALIGNMENT_SECTORS: u64 = 8;
/// Rounds of key derivation at least. Origin: QEMU and cryptsetup.
pub(super) const MIN_ITERATIONS: u64 = 1000;

/// A header that makes sense, and what it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    pub(super) header: LuksHeader,
    pub(super) spec: CipherSpec,
    pub(super) hash: HashAlg,
}

impl Volume {
    /// Reads the header at `at`: the start of a container, or where a qcow2 header points. Errors: `Damaged`
    /// for bytes that are no header, or one whose slots lie outside or over each other; `Unsupported` for
    /// version 2, and for a cipher or hash that is not known; `Storage`.
    pub fn read(storage: &dyn Storage, at: HostOffset) -> Result<Self, CryptError> {
        let mut bytes = [0; LUKS_HEADER_LEN];
        let len = storage.read_at(at, &mut bytes)?;
        Self::parse(&bytes[..len])
    }

    /// The same from the header's bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, CryptError> {
        let header = LuksHeader::parse(bytes).map_err(|e| match e.kind() {
            FormatErrorKind::LuksVersion(version) => {
                CryptError::unsupported(format!("LUKS version {version} is not supported, only version 1 is"))
            }
            FormatErrorKind::NotLuks => CryptError::damaged("volume is not in LUKS format"),
            _ => CryptError::damaged("LUKS header is damaged").with_source(e),
        })?;
        // Checked before anything is computed with it: no cipher has longer keys.
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

    /// Slots must lie behind the header, before the payload, and apart.
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

    /// The header as it was read.
    pub fn header(&self) -> &LuksHeader {
        &self.header
    }

    /// How the volume is encrypted.
    pub fn spec(&self) -> &CipherSpec {
        &self.spec
    }

    /// The hash of key derivation.
    pub fn hash(&self) -> HashAlg {
        self.hash
    }

    /// Where a container's data starts, in bytes.
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.header.payload_offset_sectors) * SECTOR
    }

    /// The cipher for guest data under the volume's `key`.
    pub fn cipher(&self, key: &Secret, numbering: SectorNumbering) -> Result<SectorCipher, CryptError> {
        SectorCipher::new(&self.spec, key, numbering)
    }

    /// Which slots hold a key.
    pub fn active_slots(&self) -> impl Iterator<Item = usize> {
        (0..LUKS_KEY_SLOTS).filter(|&index| self.header.slots[index].enabled)
    }

    /// Bytes that a slot's key material takes: whole sectors.
    pub(super) fn material_len(&self) -> u64 {
        material_len(self.spec.key_len())
    }

    pub(super) fn slot_offset(&self, index: usize) -> u64 {
        u64::from(self.header.slots[index].material_offset_sectors) * SECTOR
    }
}

/// Bytes of the longest key: two of 32.
const MAX_KEY_LEN: usize = 64;

pub(super) fn material_len(key_len: usize) -> u64 {
    (key_len as u64 * u64::from(STRIPES)).next_multiple_of(SECTOR)
}

/// The key material of a slot: the volume's `key` spread out and encrypted under `slot_key`. `stripes`:
/// random bytes.
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
