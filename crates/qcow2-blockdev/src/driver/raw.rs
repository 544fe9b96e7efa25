//! A raw disk, or the part of it that its options choose.

use crate::scalar::{OptionError, read_size};
use crate::tree::{Options, Scalar};
use qcow2_core::{Storage, StorageError};
use qcow2_io::WindowStorage;
use std::fmt;
use std::sync::Arc;

/// Why a part of a raw disk cannot be shown. Numbers are bytes.
#[derive(Debug)]
#[non_exhaustive]
pub enum WindowError {
    /// An offset or a size that is none.
    Option(OptionError),
    /// The storage failed.
    Storage(StorageError),
    /// It begins past the end.
    OffsetPastEnd {
        /// Where it begins.
        offset: u64,
        /// The length of the whole, in whole sectors.
        len: u64,
    },
    /// It ends past the end.
    EndPastEnd {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        size: u64,
        /// The length of the whole, in whole sectors.
        len: u64,
    },
    /// Its size is not a multiple of 512.
    NotInSectors(u64),
}

impl fmt::Display for WindowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Option(error) => error.fmt(f),
            Self::Storage(error) => error.fmt(f),
            Self::OffsetPastEnd { offset, len } => {
                write!(f, "the part at {offset} begins past the end at {len}")
            }
            Self::EndPastEnd { offset, size, len } => {
                write!(f, "the part of {size} bytes at {offset} passes the end at {len}")
            }
            Self::NotInSectors(size) => write!(f, "the size {size} of the part is not a multiple of 512"),
        }
    }
}

impl std::error::Error for WindowError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Storage(error) => error.source(),
            _ => None,
        }
    }
}

impl From<StorageError> for WindowError {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

/// Whether the options of a raw node choose a part of what it stands on.
pub(crate) fn is_window(options: &Options) -> bool {
    options.text("offset").is_some() || options.text("size").is_some()
}

/// The part of `storage` that the options of a raw node choose.
pub(crate) fn window(options: &Options, storage: Arc<dyn Storage>) -> Result<Arc<dyn Storage>, WindowError> {
    if !is_window(options) {
        return Ok(storage);
    }
    let offset = size_option(options, "offset").map_err(WindowError::Option)?.unwrap_or(0);
    let size = size_option(options, "size").map_err(WindowError::Option)?;
    let len = storage.len()?;
    // A file counts in whole sectors.
    let len = len.checked_next_multiple_of(512).unwrap_or(len);
    if offset > len {
        return Err(WindowError::OffsetPastEnd { offset, len });
    }
    if let Some(size) = size {
        if size > len - offset {
            return Err(WindowError::EndPastEnd { offset, size, len });
        }
        if !size.is_multiple_of(512) {
            return Err(WindowError::NotInSectors(size));
        }
    }
    Ok(Arc::new(WindowStorage::new(storage, offset, size)?))
}

/// The number of bytes that option `key` gives. `null` gives none.
pub(super) fn size_option(options: &Options, key: &str) -> Result<Option<u64>, OptionError> {
    let given = options.iter().find(|(known, value)| *known == key && **value != Scalar::Null);
    given.map(|(_, value)| read_size(key, &value.to_string())).transpose()
}
