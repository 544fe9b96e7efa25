//! Adding and erasing passwords.
//!
//! Order on disk: a new slot's material, barrier, the header that names it; an erased slot's header, barrier, then its
//! material. A crash leaves a slot that opens or one that is off.

use super::create::fill_slot;
use super::unlock::IterationLimit;
use super::{Volume, slot_index};
use crate::error::{CryptError, CryptErrorKind};
use crate::random::Random;
use crate::secret::Secret;
use qcow2_core::{HostOffset, Storage};
use qcow2_format::crypt::LUKS_KEY_SLOTS;

/// Bytes that change with a slot.
#[derive(Clone, Debug)]
pub struct SlotChange {
    header: Vec<u8>,
    materials: Vec<(u64, Vec<u8>)>,
    header_first: bool,
}

impl SlotChange {
    /// Writes the change to the header at `at`, in the order that a crash cannot hurt, and waits until it is durable.
    pub fn apply(&self, storage: &dyn Storage, at: HostOffset) -> Result<(), CryptError> {
        if self.header_first {
            self.write_header(storage, at)?;
        }
        for (offset, material) in &self.materials {
            let place = at.checked_add(*offset);
            let place = place.ok_or_else(|| CryptError::damaged("LUKS key slot passes 2^64 - 1"))?;
            storage.write_at(place, material)?;
        }
        storage.flush()?;
        if self.header_first { Ok(()) } else { self.write_header(storage, at) }
    }

    fn write_header(&self, storage: &dyn Storage, at: HostOffset) -> Result<(), CryptError> {
        storage.write_at(at, &self.header)?;
        Ok(storage.flush()?)
    }
}

impl Volume {
    /// The first slot without a key.
    pub fn free_slot(&self) -> Option<usize> {
        (0..LUKS_KEY_SLOTS).find(|&index| !self.header.slots[index].enabled)
    }

    /// The slots that `password` opens. Disk: reads key material. Errors: as [`unlock`](Self::unlock).
    pub fn slots_of(
        &self,
        storage: &dyn Storage,
        at: HostOffset,
        password: &Secret,
        limit: IterationLimit,
    ) -> Result<Vec<usize>, CryptError> {
        self.check_work(limit)?;
        let mut found = Vec::new();
        for index in self.active_slots() {
            if self.unlock_slot(index, storage, at, password)?.is_some() {
                found.push(index);
            }
        }
        Ok(found)
    }

    /// Puts `key`, the volume's, under `password` into slot `index`, which holds none. `iterations`: see
    /// [`count_iterations`](super::count_iterations). Errors: `KeySlot`, `InvalidOption`, `Random`.
    pub fn add_key(
        &self,
        index: usize,
        (key, password): (&Secret, &Secret),
        iterations: u32,
        random: &mut dyn Random,
    ) -> Result<SlotChange, CryptError> {
        if self.header.slots[slot_index(index)?].enabled {
            return Err(slot_error(format!("key slot {index} is in use")));
        }
        let mut header = self.header.clone();
        let spec = (&self.spec, self.hash);
        let material = fill_slot(&mut header.slots[index], spec, (key, password), iterations, random)?;
        let materials = vec![(self.slot_offset(index), material)];
        Ok(SlotChange { header: encode(&header)?, materials, header_first: false })
    }

    /// Erases slots `indexes`. What they held is overwritten with random bytes. Errors: `InvalidOption`, `Random`.
    pub fn erase_keys(&self, indexes: &[usize], random: &mut dyn Random) -> Result<SlotChange, CryptError> {
        let mut header = self.header.clone();
        let mut materials = Vec::with_capacity(indexes.len());
        for &index in indexes {
            let slot = &mut header.slots[slot_index(index)?];
            (slot.enabled, slot.iterations, slot.salt) = (false, 0, [0; 32]);
            let mut noise = vec![0; self.material_len() as usize];
            random.fill(&mut noise)?;
            materials.push((self.slot_offset(index), noise));
        }
        Ok(SlotChange { header: encode(&header)?, materials, header_first: true })
    }
}

fn encode(header: &qcow2_format::crypt::LuksHeader) -> Result<Vec<u8>, CryptError> {
    header.encode().map_err(|e| CryptError::damaged("LUKS header cannot be written").with_source(e))
}

fn slot_error(message: String) -> CryptError {
    CryptError::new(CryptErrorKind::KeySlot, message)
}
