//! Adds and erases passwords of an existing volume: reads the header, changes it, waits for the last barrier.

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
    /// The slot to fill, 0 to 7; `None` takes the first free one.
    pub slot: Option<u64>,
    /// Allow replacing a slot that is in use. Its old password then no longer unlocks it.
    pub force: bool,
    /// Target time for one password attempt, in milliseconds of CPU time on this machine.
    pub iter_time_ms: u64,
    /// Limit on the key derivation work while the volume is unlocked.
    pub limit: IterationLimit,
}

/// Adds a password to the volume whose header is at `at`. `current` returns a password that unlocks it; it is
/// called only after a slot has been found, so that nobody is prompted in vain. Disk: reads the header and
/// key material, then writes as [`SlotChange::apply`](super::SlotChange::apply). A slot in use is replaced in
/// such an order that a power cut leaves the old or the new password.
///
/// Errors: those of `current`; `KeySlot` for a slot that may not be filled; as [`Volume::read`],
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

/// Erases the slots selected by `which` in the volume whose header is at `at`. `force`: also erase empty
/// slots and the last slots that hold a key; after the latter the data is unrecoverable. Disk: reads the
/// header and, if a password is given, key material; writes as
/// [`SlotChange::apply`](super::SlotChange::apply).
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
