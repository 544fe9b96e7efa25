//! Passwords of an image that is there: added and erased by `amend`.

use crate::args::Objects;
use crate::failure::Failure;
use crate::persona;
use qcow2_blockdev::{KeyError, Keys, OptionValue};
use qcow2_core::{HostOffset, Storage};
use qcow2_crypt::luks::{NewPassword, NewVolume, SlotsToErase, add_password, erase_passwords};
use qcow2_crypt::{CryptError, CryptErrorKind, SlotRefusal};
use qcow2_io::{ThreadClock, random_bytes};
use qcow2_ops::{CallerError, KeySlots};

/// What options say of key slots, as they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SlotOptions {
    state: Option<String>,
    slot: Option<u64>,
    old_secret: Option<String>,
    new_secret: Option<String>,
    iter_time: Option<u64>,
}

/// The change that options ask for, and what it needs to be made.
pub(crate) struct SlotRequest<'a> {
    /// What is asked for.
    pub(crate) options: &'a SlotOptions,
    /// The name under which the current password is asked for.
    pub(crate) name: &'a str,
    /// The passwords that the image was opened with.
    pub(crate) keys: &'a Keys,
    /// The secrets that options may name.
    pub(crate) objects: &'a Objects,
    /// Whether to do what may lose the key to the data.
    pub(crate) force: bool,
}

impl KeySlots for SlotRequest<'_> {
    fn change(&self, storage: &dyn Storage, at: HostOffset) -> Result<(), CallerError> {
        Ok(self.apply(storage, at)?)
    }
}

impl SlotOptions {
    /// Takes the option called `name`, without `encrypt.`. Returns whether it is one of these.
    pub(crate) fn take(&mut self, name: &str, option: &OptionValue) -> bool {
        match (name, option) {
            ("state", OptionValue::Text(text)) => self.state = Some(text.clone()),
            ("old-secret", OptionValue::Text(text)) => self.old_secret = Some(text.clone()),
            ("new-secret", OptionValue::Text(text)) => self.new_secret = Some(text.clone()),
            // As in QEMU, whose slot numbers have 32 bits.
            ("keyslot", &OptionValue::Number(slot)) => self.slot = Some(slot & u64::from(u32::MAX)),
            ("iter-time", &OptionValue::Number(millis)) => self.iter_time = Some(millis),
            _ => return false,
        }
        true
    }

    /// Whether any was given.
    pub(crate) fn is_some(&self) -> bool {
        *self != Self::default()
    }
}

impl SlotRequest<'_> {
    /// Changes the slots of the volume whose header is at `at`. What is refused is told before anything is
    /// written, in QEMU's words and order.
    pub(crate) fn apply(&self, storage: &dyn Storage, at: HostOffset) -> Result<(), Failure> {
        match self.options.state.as_deref() {
            None => Err(Failure::new("Parameter 'state' is missing")),
            Some("active") => self.add((storage, at)),
            Some("inactive") => self.erase((storage, at)),
            Some(other) => Err(Failure::new(format!("Parameter 'state' does not accept value '{other}'"))),
        }
    }

    fn add(&self, volume: (&dyn Storage, HostOffset)) -> Result<(), Failure> {
        let options = self.options;
        let Some(new_secret) = &options.new_secret else {
            return Err(Failure::new("'new-secret' is required to activate a keyslot"));
        };
        if options.old_secret.is_some() {
            return Err(Failure::new("'old-secret' must not be given when activating keyslots"));
        }
        let new = NewPassword {
            password: &self.objects.secret(new_secret)?,
            slot: options.slot,
            force: self.force,
            iter_time_ms: options.iter_time.unwrap_or(NewVolume::default().iter_time_ms),
            limit: self.keys.limit(0).map_err(locked)?,
        };
        let container = volume.1 == HostOffset::default();
        let current = || self.keys.password(0, self.name, container).map_err(locked);
        let clock = ThreadClock::start();
        add_password(volume, &new, current, &mut random_bytes, &|| clock.now())
    }

    fn erase(&self, volume: (&dyn Storage, HostOffset)) -> Result<(), Failure> {
        let options = self.options;
        for (given, name) in
            [(options.new_secret.is_some(), "new-secret"), (options.iter_time.is_some(), "iter-time")]
        {
            if given {
                return Err(Failure::new(format!("'{name}' must not be given when erasing keyslots")));
            }
        }
        let old = options.old_secret.as_ref().map(|id| self.objects.secret(id)).transpose();
        let old = old?;
        let which = match (options.slot, &old) {
            (Some(slot), old) => SlotsToErase::Slot(slot, old.as_ref()),
            (None, Some(old)) => SlotsToErase::UnlockedBy(old),
            (None, None) => {
                return Err(Failure::new(
                    "To erase keyslot(s), either explicit keyslot index or the password currently contained in \
                     them must be given",
                ));
            }
        };
        let limit = self.keys.limit(0).map_err(locked)?;
        Ok(erase_passwords(volume, which, self.force, limit, &mut random_bytes)?)
    }
}

impl From<CryptError> for Failure {
    fn from(error: CryptError) -> Self {
        failed(error)
    }
}

fn locked(error: KeyError) -> Failure {
    Failure::new(persona::key(&error))
}

fn failed(error: CryptError) -> Failure {
    let CryptErrorKind::KeySlot(refusal) = error.kind() else { return Failure::new(persona::crypt(&error)) };
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
        _ => persona::crypt(&error),
    })
}
