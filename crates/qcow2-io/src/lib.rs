//! Storage adapters for qcow2 images: the only crate that touches files.
//!
//! | need | adapter |
//! |---|---|
//! | an image in a file or on a block device | [`OpenFile`], which makes a [`FileStorage`] |
//! | an image in memory, for tests and tools | [`MemoryStorage`] |
#![deny(unsafe_code)]

mod error;
mod file;
mod memory;
mod open;
mod sys;

pub use error::{OsError, os_error_text};
pub use file::FileStorage;
pub use memory::MemoryStorage;
pub use open::{Create, OpenError, OpenErrorKind, OpenFile};
