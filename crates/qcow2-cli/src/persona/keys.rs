//! Secrets, and layers that stay locked.

use super::name::{expects, json_text, key_values, unexpected};
use super::text::{capitalized, chain};
use crate::failure::Failure;
use qcow2_blockdev::{KeyError, NoSecret, SecretError, SlotError, ThrottleError};
use qcow2_core::{UnlockError, find_cause};
use qcow2_crypt::{CryptError, CryptErrorKind, SlotRefusal};
use qcow2_io::LimitError;

/// Why a layer stays locked.
pub(crate) fn unlock(error: &UnlockError) -> String {
    find_cause::<KeyError>(error).map_or_else(|| error.to_string(), key)
}

/// The same, as the keyring says it.
pub(super) fn key(error: &KeyError) -> String {
    match error {
        KeyError::NoSecret(id) => no_secret(id),
        KeyError::NotNamed { container } => {
            let prefix = if *container { "" } else { "encrypt." };
            format!("Parameter '{prefix}key-secret' is required for cipher")
        }
        KeyError::BadLimit(_) => "Parameter 'max-iterations' expects a number".to_owned(),
        KeyError::Crypt(error) => crypt(error),
        other => capitalized(&other.to_string()),
    }
}

/// An error of keys.
pub(super) fn crypt(error: &CryptError) -> String {
    match error.kind() {
        CryptErrorKind::WrongPassword => "Invalid password, cannot unlock any keyslot".to_owned(),
        _ => capitalized(&chain(error)),
    }
}

/// What is said of a secret that is no password.
pub(super) fn no_secret(error: &NoSecret) -> String {
    match error {
        NoSecret::Missing(id) => format!("No secret with id '{id}'"),
        NoSecret::NoText(id) => format!("Data from secret {id} is not valid UTF-8"),
    }
}

impl From<SecretError> for Failure {
    fn from(error: SecretError) -> Self {
        Self::new(match &error {
            SecretError::Help(text) => return Self::help(text.clone()),
            SecretError::Syntax(error) => key_values(error),
            SecretError::Json(error) => json_text(error),
            SecretError::WrongType(key, kind) => {
                format!("Invalid parameter type for '{key}', expected: {kind}")
            }
            SecretError::Missing(key) => format!("Parameter '{key}' is missing"),
            SecretError::UnknownType(kind) => format!("Parameter 'qom-type' does not accept value '{kind}'"),
            SecretError::NotAnIdentifier(_) => {
                return Self::new("Parameter 'id' expects an identifier").hint(IDENTIFIER_HINT);
            }
            SecretError::Unexpected(key) | SecretError::Throttle(ThrottleError::Unexpected(key)) => {
                unexpected(key)
            }
            SecretError::Throttle(error) => throttle(error),
            SecretError::UnknownFormat(format) => {
                format!("Parameter 'format' does not accept value '{format}'")
            }
            SecretError::DataAndFile => "'file' and 'data' are mutually exclusive".to_owned(),
            SecretError::NoData => "Either 'file' or 'data' must be provided".to_owned(),
            SecretError::Unreadable { path, error } => {
                format!("Unable to read {path}: Failed to open file \u{201c}{path}\u{201d}: {error}")
            }
            SecretError::NoKey(id) => format!("No secret with id '{id}'"),
            SecretError::Tls(error) => error.to_string(),
            SecretError::NoIv => "IV is required to decrypt secret".to_owned(),
            SecretError::NotBase64 => "The secret is not valid base64 data".to_owned(),
            SecretError::Wrapped(error) => crypt(error),
            SecretError::Exists(id) => {
                format!("attempt to add duplicate property '{id}' to object (type 'container')")
            }
            other => capitalized(&other.to_string()),
        })
    }
}

/// Why limits are none.
fn throttle(error: &ThrottleError) -> String {
    let error = match error {
        ThrottleError::NotAnInteger(key) => return expects(key, "integer"),
        ThrottleError::NotAnObject => {
            return "Invalid parameter type for 'limits', expected: object".to_owned();
        }
        ThrottleError::Negative => return "Property values cannot be negative".to_owned(),
        ThrottleError::TooManySeconds(key) => {
            // The missing blank is QEMU's.
            let (key, range) = match key.strip_prefix("limits.") {
                Some(key) => (key, "the range"),
                None => (&**key, "therange"),
            };
            return format!("{key} value must be in {range} [0, {}]", u32::MAX);
        }
        ThrottleError::Limits(error) => error,
        other => return capitalized(&other.to_string()),
    };
    match error {
        LimitError::TotalAndKind => {
            "bps/iops/max total values and read/write values cannot be used at the same time".to_owned()
        }
        LimitError::SizeWithoutRequests => "iops size requires an iops value to be set".to_owned(),
        LimitError::TooLarge(most) => format!("bps/iops/max values must be within [0, {most}]"),
        LimitError::NoBurstTime => "the burst length cannot be 0".to_owned(),
        LimitError::BurstTimeWithoutRate => "burst length set without burst rate".to_owned(),
        LimitError::BurstTooLong => "burst length too high for this burst rate".to_owned(),
        LimitError::BurstWithoutAverage => {
            "bps_max/iops_max require corresponding bps/iops values".to_owned()
        }
        LimitError::BurstBelowAverage => "bps_max/iops_max cannot be lower than bps/iops".to_owned(),
        other => capitalized(&other.to_string()),
    }
}

impl From<SlotError> for Failure {
    fn from(error: SlotError) -> Self {
        Self::new(match &error {
            SlotError::State(None) => "Parameter 'state' is missing".to_owned(),
            SlotError::State(Some(other)) => format!("Parameter 'state' does not accept value '{other}'"),
            SlotError::NoNewSecret => "'new-secret' is required to activate a keyslot".to_owned(),
            SlotError::OldSecretWhenAdding => {
                "'old-secret' must not be given when activating keyslots".to_owned()
            }
            SlotError::NotWhenErasing(name) => format!("'{name}' must not be given when erasing keyslots"),
            SlotError::NothingToErase => {
                "To erase keyslot(s), either explicit keyslot index or the password \
                                          currently contained in them must be given"
                    .to_owned()
            }
            SlotError::NoSecret(id) => no_secret(id),
            SlotError::Key(error) => key(error),
            SlotError::Crypt(error) => slot(error),
            other => capitalized(&other.to_string()),
        })
    }
}

/// Why a slot is not changed.
fn slot(error: &CryptError) -> String {
    let CryptErrorKind::KeySlot(refusal) = error.kind() else { return crypt(error) };
    let irreversibly = "will erase all the data in the image irreversibly - refusing operation";
    match refusal {
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
        _ => crypt(error),
    }
}

const IDENTIFIER_HINT: &str =
    "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.";
