//! Errors as the system and QEMU word them, and an image's details, for the exerciser.

use crate::persona;
use qcow2_core::{Error, ErrorKind, find_cause};
use qcow2_exerciser::Words;
use qcow2_io::os_error_text;
use qcow2_ops::info::Qcow2Info;
use qcow2_report::{human, info::specific_text};
use std::error::Error as StdError;

/// The command's words.
pub(super) struct QemuWords;

impl Words for QemuWords {
    fn error(&self, error: &(dyn StdError + 'static)) -> String {
        match find_cause::<Error>(error) {
            Some(error) => reason(error),
            None => human::escaped(&persona::chain(error)),
        }
    }

    fn details(&self, info: &Qcow2Info) -> String {
        specific_text(info)
    }
}

/// The system's text for an error of the engine: that of the storage, or of what it amounts to.
fn reason(error: &Error) -> String {
    if let Some(code) = error.storage_error().and_then(|error| error.os_code()) {
        return os_error_text(code);
    }
    if error.kind() == ErrorKind::NoSpace && error.storage_error().is_none() {
        // Not the disk is full but something that has a limit, which only the engine can name.
        return format!("{}: {}", os_error_text(NO_SPACE), persona::chain(error));
    }
    os_error_text(match error.kind() {
        ErrorKind::NoSpace => NO_SPACE,
        ErrorKind::ReadOnly => NOT_PERMITTED,
        ErrorKind::Unsupported | ErrorKind::Encrypted => NOT_SUPPORTED,
        ErrorKind::InvalidOption => INVALID_ARGUMENT,
        _ => IO_ERROR,
    })
}

/// Error numbers of Linux, for their texts.
const NOT_PERMITTED: i32 = 1;
const IO_ERROR: i32 = 5;
const INVALID_ARGUMENT: i32 = 22;
const NO_SPACE: i32 = 28;
const NOT_SUPPORTED: i32 = 95;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_engine_get_the_systems_words() {
        let engine = |kind| Error::new(kind, "what happened");
        let text = |error: &(dyn StdError + 'static)| QemuWords.error(error);
        assert_eq!(text(&engine(ErrorKind::ReadOnly)), "Operation not permitted");
        assert_eq!(text(&engine(ErrorKind::Corrupt)), "Input/output error");
        assert_eq!(text(&engine(ErrorKind::NoSpace)), "No space left on device: what happened");
        let storage =
            qcow2_core::StorageError::new(qcow2_core::StorageErrorKind::Io, "call").with_os_code(27);
        assert_eq!(text(&Error::from(storage)), "File too large");
        let below = qcow2_ops::Error::new(qcow2_ops::ErrorKind::Write, "copying\x07");
        assert_eq!(text(&below), "copying\\x07");
        assert_eq!(text(&below.with_source(engine(ErrorKind::Unsupported))), "Operation not supported");
    }
}
