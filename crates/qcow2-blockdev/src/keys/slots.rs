//! Passwords of an image that is there, added and erased as options say.

use super::keyring::{KeyError, Keys};
use super::secrets::{NoSecret, Secrets};
use crate::scalar::OptionValue;
use qcow2_core::{HostOffset, Storage};
use qcow2_crypt::luks::{NewPassword, NewVolume, SlotsToErase, add_password, erase_passwords};
use qcow2_crypt::{CryptError, Secret};
use qcow2_io::{ThreadClock, random_bytes};
use qcow2_ops::{CallerError, KeySlots};
use std::error::Error;
use std::fmt;

/// What options say of key slots, as they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotOptions {
    state: Option<String>,
    slot: Option<u64>,
    old_secret: Option<String>,
    new_secret: Option<String>,
    iter_time: Option<u64>,
}

/// The change that options ask for, and what it needs to be made.
pub struct SlotChange<'a> {
    /// What is asked for.
    pub options: &'a SlotOptions,
    /// The name under which the current password is asked for.
    pub name: &'a str,
    /// The passwords that the image was opened with.
    pub keys: &'a Keys,
    /// The secrets that options may name.
    pub secrets: &'a Secrets,
    /// Whether to do what may lose the key to the data.
    pub force: bool,
}

impl SlotOptions {
    /// Takes the option called `name`, without `encrypt.`. Returns whether it is one of these.
    pub fn take(&mut self, name: &str, option: &OptionValue) -> bool {
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
    pub fn is_some(&self) -> bool {
        *self != Self::default()
    }
}

impl SlotChange<'_> {
    /// Changes the slots of the volume whose header is at `at`. Errors: the first one in QEMU's order, before
    /// anything is written.
    pub fn apply(&self, storage: &dyn Storage, at: HostOffset) -> Result<(), SlotError> {
        match self.options.state.as_deref() {
            Some("active") => self.add((storage, at)),
            Some("inactive") => self.erase((storage, at)),
            other => Err(SlotError::State(other.map(str::to_owned))),
        }
    }

    fn secret(&self, id: &str) -> Result<Secret, SlotError> {
        self.secrets.password(id).map_err(SlotError::NoSecret)
    }

    fn add(&self, volume: (&dyn Storage, HostOffset)) -> Result<(), SlotError> {
        let options = self.options;
        let Some(new_secret) = &options.new_secret else {
            return Err(SlotError::NoNewSecret);
        };
        if options.old_secret.is_some() {
            return Err(SlotError::OldSecretWhenAdding);
        }
        let new = NewPassword {
            password: &self.secret(new_secret)?,
            slot: options.slot,
            force: self.force,
            iter_time_ms: options.iter_time.unwrap_or(NewVolume::default().iter_time_ms),
            limit: self.keys.limit(0)?,
        };
        let container = volume.1 == HostOffset::default();
        let current = || Ok(self.keys.password(0, self.name, container)?);
        let clock = ThreadClock::start();
        add_password(volume, &new, current, &mut random_bytes, &|| clock.now())
    }

    fn erase(&self, volume: (&dyn Storage, HostOffset)) -> Result<(), SlotError> {
        let options = self.options;
        for (given, name) in
            [(options.new_secret.is_some(), "new-secret"), (options.iter_time.is_some(), "iter-time")]
        {
            if given {
                return Err(SlotError::NotWhenErasing(name));
            }
        }
        let old = options.old_secret.as_ref().map(|id| self.secret(id)).transpose()?;
        let which = match (options.slot, &old) {
            (Some(slot), old) => SlotsToErase::Slot(slot, old.as_ref()),
            (None, Some(old)) => SlotsToErase::UnlockedBy(old),
            (None, None) => {
                return Err(SlotError::NothingToErase);
            }
        };
        let limit = self.keys.limit(0)?;
        Ok(erase_passwords(volume, which, self.force, limit, &mut random_bytes)?)
    }
}

/// Errors it returns are [`SlotError`]s.
impl KeySlots for SlotChange<'_> {
    fn change(&self, storage: &dyn Storage, at: HostOffset) -> Result<(), CallerError> {
        Ok(self.apply(storage, at)?)
    }
}

/// Why no key slot is changed. Nothing has been written, unless the storage failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum SlotError {
    /// `state` says neither that slots are to be active nor that they are not.
    State(Option<String>),
    /// The new password is not named.
    NoNewSecret,
    /// An old password has no place where one is added.
    OldSecretWhenAdding,
    /// This option has no place where passwords are erased.
    NotWhenErasing(&'static str),
    /// Neither a slot nor its password is named to be erased.
    NothingToErase,
    /// There is no such secret, or it is no password.
    NoSecret(NoSecret),
    /// The current password is not to be had.
    Key(KeyError),
    /// The change is refused, or failed.
    Crypt(CryptError),
}

impl fmt::Display for SlotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State(None) => f.write_str("option 'state' is missing"),
            Self::State(Some(other)) => write!(f, "option 'state' takes active or inactive, not '{other}'"),
            Self::NoNewSecret => f.write_str("option 'new-secret' is missing"),
            Self::OldSecretWhenAdding => f.write_str("option 'old-secret' is for erasing"),
            Self::NotWhenErasing(option) => write!(f, "option '{option}' is for adding"),
            Self::NothingToErase => f.write_str("options 'keyslot' and 'old-secret' are both missing"),
            Self::NoSecret(error) => error.fmt(f),
            Self::Key(error) => error.fmt(f),
            Self::Crypt(error) => error.fmt(f),
        }
    }
}

impl Error for SlotError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Key(error) => error.source(),
            Self::Crypt(error) => error.source(),
            _ => None,
        }
    }
}

impl From<KeyError> for SlotError {
    fn from(error: KeyError) -> Self {
        Self::Key(error)
    }
}

impl From<CryptError> for SlotError {
    fn from(error: CryptError) -> Self {
        Self::Crypt(error)
    }
}
