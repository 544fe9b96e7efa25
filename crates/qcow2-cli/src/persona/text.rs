//! Errors in one line.

use super::damage::told;
use crate::exit;
use crate::failure::Failure;
use qcow2_core::{Length, StorageError, StorageErrorKind, find_cause};
use qcow2_exerciser::system_text;
use qcow2_io::os_error_text;
use std::error::Error as StdError;

/// Said before the reason for each layer above the one at fault.
pub(super) const BACKING: &str = "Could not open backing file: ";

/// The operating system's text for a failed storage call, or our own.
pub(crate) fn storage(error: &StorageError) -> String {
    match error.kind() {
        StorageErrorKind::FixedLength(Length::Device) => "Cannot grow device files".to_owned(),
        StorageErrorKind::FixedLength(Length::Export) => "Cannot grow NBD nodes".to_owned(),
        StorageErrorKind::FixedLength(Length::Window) => FIXED_SIZE.to_owned(),
        _ => error.os_code().map_or_else(|| chain(error), os_error_text),
    }
}

/// Said of a raw disk that is a part of a file.
pub(super) const FIXED_SIZE: &str = "Cannot resize fixed-size raw disks";

/// An error of the engine in one line: the system's text where a storage failed, or where the damage was told
/// when it was found; else all that is known.
pub(crate) fn cause(error: &(dyn StdError + 'static)) -> String {
    match find_cause::<StorageError>(error) {
        Some(error) => storage(error),
        None => told(error).map_or_else(|| chain(error), system_text),
    }
}

/// An error and its sources, joined.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}

/// A procedure that failed, for which there are no other words; nothing is said of one that was stopped.
pub(crate) fn procedure(error: &qcow2_ops::Error) -> Failure {
    match (error.kind(), error.core_error()) {
        (qcow2_ops::ErrorKind::Stopped, _) => Failure::silent(exit::FAILURE),
        // The system's words for what an image cannot do at all; why is for whoever asks by our own name.
        (qcow2_ops::ErrorKind::Write, Some(engine))
            if engine.kind() == qcow2_core::ErrorKind::Unsupported =>
        {
            Failure::new(format!("{error}: Operation not supported"))
                .in_own_words(format!("{error}: {}", cause(engine)), None)
        }
        (_, Some(engine)) => Failure::new(format!("{error}: {}", cause(engine))),
        (_, None) => Failure::new(chain(error)),
    }
}

/// With a large first letter.
pub(crate) fn capitalized(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_uppercase().chain(chars).collect())
}
