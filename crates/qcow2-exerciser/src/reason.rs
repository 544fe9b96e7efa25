//! Why requests fail: an error of the engine, which the caller words, or an errno, as QEMU's block layer
//! would return it.

use crate::port::Words;
use qcow2_core::ErrorKind;
use qcow2_io::os_error_text;
use std::error::Error;

/// Why a request failed.
#[derive(Debug)]
pub(crate) enum Reason {
    /// An errno, printed as the system's text.
    System(i32),
    /// An error of the engine or of a procedure.
    Engine(Box<dyn Error + Send + Sync>),
}

impl Reason {
    /// The text to print.
    pub(crate) fn text(&self, words: &dyn Words) -> String {
        match self {
            Self::System(code) => os_error_text(*code),
            Self::Engine(error) => words.error(&**error),
        }
    }
}

impl From<qcow2_core::Error> for Reason {
    fn from(error: qcow2_core::Error) -> Self {
        Self::Engine(Box::new(error))
    }
}

impl From<qcow2_ops::Error> for Reason {
    fn from(error: qcow2_ops::Error) -> Self {
        Self::Engine(Box::new(error))
    }
}

/// The system's text for an error of the engine: that of the storage's own error, or of what the error
/// amounts to.
pub fn system_text(error: &qcow2_core::Error) -> String {
    let code = error.storage_error().and_then(|error| error.os_code());
    os_error_text(code.unwrap_or(match error.kind() {
        ErrorKind::NoSpace => NO_SPACE,
        ErrorKind::ReadOnly => NOT_PERMITTED,
        ErrorKind::Unsupported | ErrorKind::Encrypted => NOT_SUPPORTED,
        ErrorKind::InvalidOption => INVALID_ARGUMENT,
        _ => IO_ERROR,
    }))
}

/// Linux errno values, the same on every platform: the text is part of the output.
const NOT_PERMITTED: i32 = 1;
pub(crate) const NOT_FOUND: i32 = 2;
pub(crate) const IO_ERROR: i32 = 5;
pub(crate) const OUT_OF_MEMORY: i32 = 12;
pub(crate) const INVALID_ARGUMENT: i32 = 22;
pub(crate) const FILE_TOO_LARGE: i32 = 27;
const NO_SPACE: i32 = 28;
pub(crate) const NOT_SUPPORTED: i32 = 95;
pub(crate) const NO_MEDIUM: i32 = 123;
