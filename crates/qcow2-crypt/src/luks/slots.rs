//! Adding and erasing passwords.
//!
//! Order on disk, with a barrier after each step: a new slot's material, then the header that names it; for
//! an erased slot the header that forgets it, then its material. Slot 6 lies on two sectors of the header,
//! its state on the first: that one is written last for a new slot, and first for an erased one. A power cut
//! leaves each slot opening or off, and never touches another one.

use super::create::fill_slot;
use super::unlock::IterationLimit;
use super::volume::{SECTOR, Volume, slot_index};
use crate::error::{CryptError, SlotRefusal};
use crate::random::Random;
use crate::secret::Secret;
use qcow2_core::{HostOffset, Storage};
use qcow2_format::crypt::{LUKS_HEADER_LEN, LUKS_KEY_SLOTS, LuksHeader};

/// Bytes that change with a slot.
#[derive(Clone, Debug)]
pub struct SlotChange {
    header: Vec<u8>,
    filled: Option<(u64, Vec<u8>)>,
    erased: Vec<(u64, u64)>,
}

impl SlotChange {
    /// Writes the change to the header at `at`, in the order that a power cut cannot hurt, and waits until it
    /// is durable. What an erased slot held is overwritten 40 times, as often as QEMU and cryptsetup do, each
    /// time down to the medium. Errors: `Random`, `Storage`.
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

/// Which slots are to be erased.
#[derive(Clone, Copy, Debug)]
pub enum SlotsToErase<'a> {
    /// This one; where a password is given, only if that opens it.
    Slot(u64, Option<&'a Secret>),
    /// All that this password opens.
    OpenedBy(&'a Secret),
}

impl Volume {
    /// The first slot without a key.
    pub fn free_slot(&self) -> Option<usize> {
        (0..LUKS_KEY_SLOTS).find(|&index| !self.header.slots[index].enabled)
    }

    /// The slot that a new password goes to: `wanted`, or the first free one. `force`: also one that is in
    /// use. Errors: `KeySlot`.
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

    /// The slots to erase. `force`: also the last ones that hold a key, and those that hold none. Disk: reads
    /// key material where a password is given. Errors: `KeySlot`; with a password, as
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
            SlotsToErase::OpenedBy(password) => {
                let found = self.slots_of(storage, at, password, limit)?;
                match found.len() {
                    0 => Err(SlotRefusal::NoneOpens.into()),
                    all if !force && all == active => Err(SlotRefusal::AllOpen.into()),
                    _ => Ok(found),
                }
            }
        }
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
    /// [`count_iterations`](super::count_iterations). Errors: `KeySlot`, `Random`.
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

    /// Erases slots `indexes`. What they held is overwritten with random bytes. Errors: `KeySlot`.
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

/// Puts `key` under `password` into slot `index` of the volume at `at`, also where it holds another one. In
/// that case the new password gets a spare slot first, so that at every moment the old password opens or the
/// new one does; without a spare one, the others still do. Disk: as [`SlotChange::apply`], several times.
/// Errors: as there, and those of [`Volume::read`].
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
    at.checked_add(offset).ok_or_else(|| CryptError::damaged("LUKS key slot passes 2^64 - 1"))
}

fn encode(header: &LuksHeader) -> Result<Vec<u8>, CryptError> {
    let bytes =
        header.encode().map_err(|e| CryptError::damaged("LUKS header cannot be written").with_source(e))?;
    debug_assert_eq!(bytes.len(), LUKS_HEADER_LEN);
    Ok(bytes)
}

/// How often an erased slot's material is overwritten. Origin: QEMU and cryptsetup.
const ERASE_PASSES: u32 = 40;
