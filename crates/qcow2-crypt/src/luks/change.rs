//! Passwords of a volume that is in use: one added, some erased, from reading the header to the last barrier.

use super::create::count_iterations;
use super::slots::{SlotsToErase, put_key};
use super::unlock::IterationLimit;
use super::volume::Volume;
use crate::error::CryptError;
use crate::random::{Random, Stopwatch};
use crate::secret::Secret;
use qcow2_core::{HostOffset, Storage};

/// A password to add.
#[derive(Clone, Copy, Debug)]
pub struct NewPassword<'a> {
    /// The password.
    pub password: &'a Secret,
    /// The slot for it, 0 to 7; `None` takes the first free one.
    pub slot: Option<u64>,
    /// Whether a slot that is in use may be taken; what opened it opens it no longer.
    pub force: bool,
    /// How long trying the password is to take on this machine, in milliseconds of one core.
    pub iter_time_ms: u64,
    /// How much work the header may ask for while the volume is unlocked.
    pub limit: IterationLimit,
}

/// Adds a password to the volume whose header is at `at`. `current`: gives a password that opens it; asked
/// for only once a slot is found, so that nobody is asked in vain. Disk: reads the header and key material,
/// then writes as [`SlotChange::apply`](super::SlotChange::apply); a slot in use is replaced so that a power
/// cut leaves the old password or the new one.
///
/// Errors: those of `current`; `KeySlot` for a slot that may not be taken; as [`Volume::read`],
/// [`Volume::unlock`] and [`count_iterations`]; `Random`, `Storage`.
pub fn add_password<E: From<CryptError>>(
    (storage, at): (&dyn Storage, HostOffset),
    new: &NewPassword<'_>,
    current: impl FnOnce() -> Result<Secret, E>,
    random: &mut dyn Random,
    watch: &dyn Stopwatch,
) -> Result<(), E> {
    let volume = Volume::read(storage, at)?;
    let slot = volume.slot_to_fill(new.slot, new.force)?;
    let key = volume.unlock(storage, at, &current()?, new.limit)?;
    let rounds = count_iterations(volume.hash(), volume.spec().key_len(), new.iter_time_ms, watch)?;
    Ok(put_key((storage, at), slot, (&key, new.password), rounds, random)?)
}

/// Erases the slots that `which` names in the volume whose header is at `at`. `force`: also the last slots
/// that hold a key, after which nobody can read the data, and slots that hold none. Disk: reads the header
/// and, where a password is given, key material; writes as [`SlotChange::apply`](super::SlotChange::apply).
///
/// Errors: `KeySlot` for slots that may not be erased; as [`Volume::read`] and [`Volume::unlock`]; `Random`,
/// `Storage`.
pub fn erase_passwords(
    (storage, at): (&dyn Storage, HostOffset),
    which: SlotsToErase<'_>,
    force: bool,
    limit: IterationLimit,
    random: &mut dyn Random,
) -> Result<(), CryptError> {
    let volume = Volume::read(storage, at)?;
    let slots = volume.slots_to_erase((storage, at), which, force, limit)?;
    volume.erase_keys(&slots)?.apply(storage, at, random)
}
