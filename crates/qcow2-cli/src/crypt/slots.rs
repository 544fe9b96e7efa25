//! Passwords of an image that is there: added and erased by `amend`.

use super::{Keys, SystemRandom, ThreadTime, reason};
use crate::args::Objects;
use crate::failure::Failure;
use crate::imageopts::AmendOption;
use qcow2_core::{HostOffset, Storage};
use qcow2_crypt::luks::{NewVolume, SlotsToErase, Volume, count_iterations, put_key};
use qcow2_crypt::{CryptError, CryptErrorKind, SlotRefusal};

/// What options say of key slots, as they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SlotOptions {
    state: Option<String>,
    slot: Option<u64>,
    old_secret: Option<String>,
    new_secret: Option<String>,
    iter_time: Option<u64>,
}

/// A volume whose slots change.
#[derive(Clone, Copy)]
pub(crate) struct Unlocked<'a> {
    /// Where it lies.
    pub(crate) storage: &'a dyn Storage,
    /// Where its header is.
    pub(crate) at: HostOffset,
    /// The name of the image.
    pub(crate) name: &'a str,
    /// The passwords that it was opened with.
    pub(crate) keys: &'a Keys,
}

impl SlotOptions {
    /// Takes the option called `name`, without `encrypt.`. Returns whether it is one of these.
    pub(crate) fn take(&mut self, name: &str, option: &AmendOption) -> bool {
        match (name, option) {
            ("state", AmendOption::Text(text)) => self.state = Some(text.clone()),
            ("old-secret", AmendOption::Text(text)) => self.old_secret = Some(text.clone()),
            ("new-secret", AmendOption::Text(text)) => self.new_secret = Some(text.clone()),
            // As in QEMU, whose slot numbers have 32 bits.
            ("keyslot", &AmendOption::Number(slot)) => self.slot = Some(slot & u64::from(u32::MAX)),
            ("iter-time", &AmendOption::Number(millis)) => self.iter_time = Some(millis),
            _ => return false,
        }
        true
    }

    /// Whether any was given.
    pub(crate) fn is_some(&self) -> bool {
        *self != Self::default()
    }

    /// Changes the slots of `volume`. `force`: also what may lose the key to the data. What is refused is
    /// told before anything is written, in QEMU's words and order.
    pub(crate) fn apply(&self, volume: Unlocked<'_>, objects: &Objects, force: bool) -> Result<(), Failure> {
        match self.state.as_deref() {
            None => Err(Failure::new("Parameter 'state' is missing")),
            Some("active") => self.fill(volume, objects, force),
            Some("inactive") => self.erase(volume, objects, force),
            Some(other) => Err(Failure::new(format!("Parameter 'state' does not accept value '{other}'"))),
        }
    }

    fn fill(&self, unlocked: Unlocked<'_>, objects: &Objects, force: bool) -> Result<(), Failure> {
        let Unlocked { storage, at, name, keys } = unlocked;
        let Some(new_secret) = &self.new_secret else {
            return Err(Failure::new("'new-secret' is required to activate a keyslot"));
        };
        if self.old_secret.is_some() {
            return Err(Failure::new("'old-secret' must not be given when activating keyslots"));
        }
        let volume = Volume::read(storage, at).map_err(failed)?;
        let slot = volume.slot_to_fill(self.slot, force).map_err(failed)?;
        let password = objects.secret(new_secret).map_err(Failure::new)?;
        let limit = keys.limit(0).map_err(Failure::new)?;
        let current = keys.password(0, name, at == HostOffset::default()).map_err(Failure::new)?;
        let key = volume.unlock(storage, at, &current, limit).map_err(failed)?;
        let millis = self.iter_time.unwrap_or(NewVolume::default().iter_time_ms);
        let rounds = count_iterations(volume.hash(), volume.spec().key_len(), millis, &ThreadTime::new());
        let rounds = rounds.map_err(failed)?;
        put_key((storage, at), slot, (&key, &password), rounds, &mut SystemRandom).map_err(failed)
    }

    fn erase(&self, unlocked: Unlocked<'_>, objects: &Objects, force: bool) -> Result<(), Failure> {
        let Unlocked { storage, at, keys, .. } = unlocked;
        for (given, name) in
            [(self.new_secret.is_some(), "new-secret"), (self.iter_time.is_some(), "iter-time")]
        {
            if given {
                return Err(Failure::new(format!("'{name}' must not be given when erasing keyslots")));
            }
        }
        let old = self.old_secret.as_ref().map(|id| objects.secret(id)).transpose().map_err(Failure::new)?;
        let which = match (self.slot, &old) {
            (Some(slot), old) => SlotsToErase::Slot(slot, old.as_ref()),
            (None, Some(old)) => SlotsToErase::OpenedBy(old),
            (None, None) => {
                return Err(Failure::new(
                    "To erase keyslot(s), either explicit keyslot index or the password currently contained in \
                     them must be given",
                ));
            }
        };
        let volume = Volume::read(storage, at).map_err(failed)?;
        let limit = keys.limit(0).map_err(Failure::new)?;
        let slots = volume.slots_to_erase((storage, at), which, force, limit).map_err(failed)?;
        let change = volume.erase_keys(&slots).map_err(failed)?;
        change.apply(storage, at, &mut SystemRandom).map_err(failed)
    }
}

fn failed(error: CryptError) -> Failure {
    let CryptErrorKind::KeySlot(refusal) = error.kind() else { return Failure::new(reason(&error)) };
    let irreversibly = "will erase all the data in the image irreversibly - refusing operation";
    Failure::new(match refusal {
        SlotRefusal::NoSuchSlot(slot) => format!("Invalid keyslot {slot} specified, must be between 0 and 7"),
        SlotRefusal::InUse(slot) => {
            format!("Refusing to overwrite active keyslot {slot} - please erase it first")
        }
        SlotRefusal::AllInUse => "Can't add a keyslot - all keyslots are in use".to_owned(),
        SlotRefusal::OtherPassword(slot) => {
            format!("Given keyslot {slot} doesn't contain the given old password for erase operation")
        }
        // The blank at the end is QEMU's.
        SlotRefusal::Erased(slot) => format!("Given keyslot {slot} is already erased (inactive) "),
        SlotRefusal::LastOne(slot) => {
            format!("Attempt to erase the only active keyslot {slot} which {irreversibly}")
        }
        SlotRefusal::NoneOpens => "No keyslots match given (old) password for erase operation".to_owned(),
        SlotRefusal::AllOpen => format!(
            "All the active keyslots match the (old) password that was given and erasing them {irreversibly}"
        ),
        _ => reason(&error),
    })
}
