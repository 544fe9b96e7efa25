//! Errors as the system and QEMU word them, and an image's details, for the exerciser.

use crate::persona;
use qcow2_core::{Error, ErrorKind, GuestDisk, Preallocation, find_cause};
use qcow2_exerciser::{Words, system_text};
use qcow2_ops::info::Qcow2Info;
use qcow2_report::{human, info::specific_text};
use std::error::Error as StdError;

/// The command's words.
pub(super) struct QemuWords<'a> {
    /// The name before a warning.
    pub(super) program: &'a str,
    /// Whether the program stands in for qemu-io.
    pub(super) stands_in: bool,
}

impl Words for QemuWords<'_> {
    fn error(&self, error: &(dyn StdError + 'static)) -> String {
        match find_cause::<Error>(error) {
            Some(error) => reason(error),
            None => human::escaped(&persona::chain(error)),
        }
    }

    fn not_resized(
        &self,
        error: &qcow2_ops::Error,
        mode: Preallocation,
        disk: &dyn GuestDisk,
    ) -> Vec<String> {
        persona::not_resized(self.program, error, mode, disk).texts()
    }

    fn corrupt_images_go(&self) -> bool {
        self.stands_in
    }

    fn details(&self, info: &Qcow2Info) -> String {
        specific_text(info)
    }
}

/// The system's text for an error of the engine, with the reason where it is not the disk that is full but
/// something that has a limit, which only the engine can name.
fn reason(error: &Error) -> String {
    match error.kind() {
        ErrorKind::NoSpace if error.storage_error().is_none() => {
            format!("{}: {}", system_text(error), persona::chain(error))
        }
        _ => system_text(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_engine_get_the_systems_words() {
        let engine = |kind| Error::new(kind, "what happened");
        let text =
            |error: &(dyn StdError + 'static)| QemuWords { program: "io", stands_in: true }.error(error);
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
