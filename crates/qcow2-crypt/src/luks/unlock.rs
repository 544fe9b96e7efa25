//! Unlocks a volume: from a password to the master key.

use super::split;
use super::volume::{STRIPES, Volume};
use crate::error::{CryptError, CryptErrorKind};
use crate::secret::Secret;
use crate::sector::SectorCipher;
use qcow2_core::{HostOffset, SectorNumbering, Storage};
use subtle::ConstantTimeEq;

/// Default limit on the key derivation rounds of one attempt to unlock, over all slots. Origin: ours; a few
/// seconds of work, sixty times what a default volume needs.
pub const DEFAULT_ITERATION_LIMIT: u64 = 1 << 28;

/// Limit on the key derivation work of one attempt to unlock, in rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IterationLimit(pub u64);

impl Default for IterationLimit {
    fn default() -> Self {
        Self(DEFAULT_ITERATION_LIMIT)
    }
}

impl Volume {
    /// Unlocks the volume: returns its master key. `storage`, `at`: where the header was read. Tries every
    /// slot that holds a key, after checking the work of all of them against `limit`. Disk: reads key
    /// material.
    ///
    /// Errors: `WrongPassword`, `TooManyIterations`, `Damaged` for a slot past the end of the file,
    /// `Storage`.
    pub fn unlock(
        &self,
        storage: &dyn Storage,
        at: HostOffset,
        password: &Secret,
        limit: IterationLimit,
    ) -> Result<Secret, CryptError> {
        self.check_work(limit)?;
        for index in self.active_slots() {
            if let Some(key) = self.unlock_slot(index, storage, at, password)? {
                return Ok(key);
            }
        }
        let message = "invalid password, cannot unlock any key slot";
        Err(CryptError::new(CryptErrorKind::WrongPassword, message))
    }

    /// The master key if `password` unlocks slot `index`. The caller has checked the work.
    pub(super) fn unlock_slot(
        &self,
        index: usize,
        storage: &dyn Storage,
        at: HostOffset,
        password: &Secret,
    ) -> Result<Option<Secret>, CryptError> {
        let slot = &self.header.slots[index];
        if !slot.enabled {
            return Ok(None);
        }
        let mut material = Secret::zeroed(self.material_len() as usize);
        let from = at.checked_add(self.slot_offset(index));
        let len = from.map_or(Ok(0), |from| storage.read_at(from, material.bytes_mut()))?;
        if len < material.bytes().len() {
            return Err(CryptError::damaged(format!("LUKS key slot {index} ends past the end of the file")));
        }
        let mut slot_key = Secret::zeroed(self.spec.key_len());
        self.hash.derive(password.bytes(), &slot.salt, slot.iterations, slot_key.bytes_mut());
        let cipher = SectorCipher::new(&self.spec, &slot_key, SectorNumbering::Host)?;
        cipher.decrypt_sectors(0, material.bytes_mut());
        let mut key = Secret::zeroed(self.spec.key_len());
        let stripes = &material.bytes()[..self.spec.key_len() * STRIPES as usize];
        split::merge(self.hash, stripes, key.bytes_mut());
        let mut digest = [0; 20];
        let header = &self.header;
        self.hash.derive(key.bytes(), &header.digest_salt, header.digest_iterations, &mut digest);
        Ok(bool::from(digest.ct_eq(&header.digest)).then_some(key))
    }

    /// PBKDF2 rounds needed to try every slot: a derivation and a digest each. A key longer than the hash's
    /// digest takes several passes of all rounds.
    pub(super) fn work(&self) -> u64 {
        let passes = |len: usize| len.div_ceil(self.hash.digest_len().max(1)) as u64;
        let digest = u64::from(self.header.digest_iterations) * passes(20);
        let slots = self.header.slots.iter().filter(|slot| slot.enabled);
        slots.map(|slot| u64::from(slot.iterations) * passes(self.spec.key_len()) + digest).sum()
    }

    pub(super) fn check_work(&self, limit: IterationLimit) -> Result<(), CryptError> {
        let work = self.work();
        if work <= limit.0 {
            return Ok(());
        }
        let message = format!(
            "LUKS header demands {work} rounds of key derivation, the limit is {}; the caller can allow more",
            limit.0
        );
        Err(CryptError::new(CryptErrorKind::TooManyIterations, message))
    }
}
