//! Why requests fail: an error of the engine, which the caller words, or an errno, as QEMU's block layer
//! would return it.

use crate::port::Words;
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

/// Linux errno values, the same on every platform: the text is part of the output.
pub(crate) const NOT_FOUND: i32 = 2;
pub(crate) const IO_ERROR: i32 = 5;
pub(crate) const OUT_OF_MEMORY: i32 = 12;
pub(crate) const INVALID_ARGUMENT: i32 = 22;
pub(crate) const FILE_TOO_LARGE: i32 = 27;
pub(crate) const NOT_SUPPORTED: i32 = 95;
