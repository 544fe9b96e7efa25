//! Adds and erases passwords.
//!
//! Write order, with a barrier after each step. To fill a slot: its key material, then the header. To erase a
//! slot: the header, then its key material. Slot 6 spans the header's two sectors; its state is in the first
//! one. So the first sector is written last when filling a slot, and first when erasing one. After a power
//! cut each slot either unlocks or is disabled, and no other slot is affected.

use super::create::fill_slot;
use super::unlock::IterationLimit;
use super::volume::{SECTOR, Volume, slot_index};
use crate::error::{CryptError, SlotRefusal};
use crate::random::Random;
use crate::secret::Secret;
use qcow2_core::{HostOffset, Storage};
use qcow2_format::crypt::{LUKS_HEADER_LEN, LUKS_KEY_SLOTS, LuksHeader};

/// A change of key slots, ready to be written.
#[derive(Clone, Debug)]
pub struct SlotChange {
    header: Vec<u8>,
    filled: Option<(u64, Vec<u8>)>,
    erased: Vec<(u64, u64)>,
}

impl SlotChange {
    /// Writes the change to the header at `at`, in crash-safe order (see above), and waits until it is
    /// durable. The key material of an erased slot is overwritten 40 times, as QEMU and cryptsetup do, with a
    /// barrier after each pass. Errors: `Random`, `Storage`.
    pub fn apply(
        &self,
        storage: &dyn Storage,
        at: HostOffset,
        random: &mut dyn Random,
    ) -> Result<(), CryptError> {
        if let Some((offset, material)) = &self.filled {
            storage.write_at(place(at, *offset)?, material)?;
            storage.flush()?;
        }
        // Both sectors go out separately, because a write of two sectors may be torn by a power cut.
        let (first, second) = self.header.split_at(SECTOR as usize);
        let mut sectors = [(0, first), (SECTOR, second)];
        if self.filled.is_some() {
            sectors.reverse();
        }
        for (offset, part) in sectors {
            storage.write_at(place(at, offset)?, part)?;
            storage.flush()?;
        }
        let passes = if self.erased.is_empty() { 0 } else { ERASE_PASSES };
        for _ in 0..passes {
            for &(offset, len) in &self.erased {
                let mut noise = vec![0; len as usize];
                random.fill(&mut noise)?;
                storage.write_at(place(at, offset)?, &noise)?;
            }
            storage.flush()?;
        }
        Ok(())
    }
}

/// Selects the slots to erase.
#[derive(Clone, Copy, Debug)]
pub enum SlotsToErase<'a> {
    /// This slot; with a password, only if the password unlocks it.
    Slot(u64, Option<&'a Secret>),
    /// All slots that this password unlocks.
    UnlockedBy(&'a Secret),
}

impl Volume {
    /// The first slot without a key.
    pub fn free_slot(&self) -> Option<usize> {
        (0..LUKS_KEY_SLOTS).find(|&index| !self.header.slots[index].enabled)
    }

    /// The slot for a new password: `wanted`, or the first free one. `force`: allow a slot that is in use.
    /// Errors: `KeySlot`.
    pub fn slot_to_fill(&self, wanted: Option<u64>, force: bool) -> Result<usize, CryptError> {
        let Some(wanted) = wanted else {
            return self.free_slot().ok_or_else(|| SlotRefusal::AllInUse.into());
        };
        let index = slot_index(wanted)?;
        match self.header.slots[index].enabled && !force {
            true => Err(SlotRefusal::InUse(index).into()),
            false => Ok(index),
        }
    }

    /// Resolves `which` to slot numbers. `force`: allow empty slots and the last slots that hold a key. Disk:
    /// reads key material if a password is given. Errors: `KeySlot`; with a password, as
    /// [`unlock`](Self::unlock).
    pub fn slots_to_erase(
        &self,
        (storage, at): (&dyn Storage, HostOffset),
        which: SlotsToErase<'_>,
        force: bool,
        limit: IterationLimit,
    ) -> Result<Vec<usize>, CryptError> {
        let active = self.active_slots().count();
        match which {
            SlotsToErase::Slot(wanted, password) => {
                let index = slot_index(wanted)?;
                if let Some(password) = password
                    && !self.slots_of(storage, at, password, limit)?.contains(&index)
                {
                    return Err(SlotRefusal::OtherPassword(index).into());
                }
                let enabled = self.header.slots[index].enabled;
                match enabled {
                    false if !force => Err(SlotRefusal::Erased(index).into()),
                    true if !force && active == 1 => Err(SlotRefusal::LastOne(index).into()),
                    _ => Ok(vec![index]),
                }
            }
            SlotsToErase::UnlockedBy(password) => {
                let found = self.slots_of(storage, at, password, limit)?;
                match found.len() {
                    0 => Err(SlotRefusal::NoneOpens.into()),
                    all if !force && all == active => Err(SlotRefusal::AllOpen.into()),
                    _ => Ok(found),
                }
            }
        }
    }

    /// The slots that `password` unlocks. Disk: reads key material. Errors: as [`unlock`](Self::unlock).
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

    /// Stores the volume's `key` under `password` in the empty slot `index`. `iterations`: see
    /// [`count_iterations`](super::count_iterations). Disk: nothing until the change is applied. Errors:
    /// `KeySlot`, `Random`.
    pub fn add_key(
        &self,
        index: usize,
        (key, password): (&Secret, &Secret),
        iterations: u32,
        random: &mut dyn Random,
    ) -> Result<SlotChange, CryptError> {
        if self.header.slots[slot_index(index as u64)?].enabled {
            return Err(SlotRefusal::InUse(index).into());
        }
        let mut header = self.header.clone();
        let spec = (&self.spec, self.hash);
        let material = fill_slot(&mut header.slots[index], spec, (key, password), iterations, random)?;
        let filled = Some((self.slot_offset(index), material));
        Ok(SlotChange { header: encode(&header)?, filled, erased: Vec::new() })
    }

    /// Erases the slots `indexes`; applying the change overwrites their key material with random bytes.
    /// Errors: `KeySlot`.
    pub fn erase_keys(&self, indexes: &[usize]) -> Result<SlotChange, CryptError> {
        let mut header = self.header.clone();
        let mut erased = Vec::with_capacity(indexes.len());
        for &index in indexes {
            let slot = &mut header.slots[slot_index(index as u64)?];
            (slot.enabled, slot.iterations, slot.salt) = (false, 0, [0; 32]);
            erased.push((self.slot_offset(index), self.material_len()));
        }
        Ok(SlotChange { header: encode(&header)?, filled: None, erased })
    }
}

/// Stores `key` under `password` in slot `index` of the volume at `at`, even if the slot is in use. In that
/// case the new password first gets a spare slot, so that at every moment the old or the new password unlocks
/// the volume. If there is no spare slot, the other passwords still do. Disk: as [`SlotChange::apply`],
/// several times. Errors: as there, and those of [`Volume::read`].
pub fn put_key(
    (storage, at): (&dyn Storage, HostOffset),
    index: usize,
    (key, password): (&Secret, &Secret),
    iterations: u32,
    random: &mut dyn Random,
) -> Result<(), CryptError> {
    let add = |index: usize, random: &mut dyn Random| {
        let change = Volume::read(storage, at)?.add_key(index, (key, password), iterations, random)?;
        change.apply(storage, at, random)
    };
    let erase = |index: usize, random: &mut dyn Random| {
        Volume::read(storage, at)?.erase_keys(&[index])?.apply(storage, at, random)
    };
    let volume = Volume::read(storage, at)?;
    if !volume.header.slots[slot_index(index as u64)?].enabled {
        return add(index, random);
    }
    let spare = volume.free_slot();
    if let Some(spare) = spare {
        add(spare, random)?;
    }
    erase(index, random)?;
    add(index, random)?;
    spare.map_or(Ok(()), |spare| erase(spare, random))
}

fn place(at: HostOffset, offset: u64) -> Result<HostOffset, CryptError> {
    at.checked_add(offset).ok_or_else(|| CryptError::damaged("LUKS key slot ends past 2^64 - 1"))
}

fn encode(header: &LuksHeader) -> Result<Vec<u8>, CryptError> {
    let bytes =
        header.encode().map_err(|e| CryptError::damaged("LUKS header cannot be encoded").with_source(e))?;
    debug_assert_eq!(bytes.len(), LUKS_HEADER_LEN);
    Ok(bytes)
}

/// How often the key material of an erased slot is overwritten. Origin: QEMU and cryptsetup.
const ERASE_PASSES: u32 = 40;
