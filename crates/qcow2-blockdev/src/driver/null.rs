//! A disk that holds nothing.

use super::raw::size_option;
use crate::scalar::{OptionError, OptionErrorKind, read_switch};
use crate::tree::Options;
use qcow2_io::NullStorage;
use std::time::Duration;

/// The disk that `options` describe.
pub(crate) fn null(options: &Options) -> Result<NullStorage, OptionError> {
    let mut storage = NullStorage::new(size_option(options, "size")?.unwrap_or(DEFAULT_SIZE));
    if let Some(text) = options.text("latency-ns") {
        let nanoseconds = text.parse();
        let nanoseconds =
            nanoseconds.map_err(|_| OptionError::new("latency-ns", &text, OptionErrorKind::NotANumber))?;
        storage.latency = Duration::from_nanos(nanoseconds);
    }
    if let Some(text) = options.text("read-zeroes") {
        storage.promises_zeroes = read_switch("read-zeroes", &text)?;
    }
    Ok(storage)
}

/// Bytes of a disk whose size is not given.
const DEFAULT_SIZE: u64 = 1 << 30;
