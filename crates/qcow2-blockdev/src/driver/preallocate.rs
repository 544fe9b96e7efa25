//! The options of a `preallocate` filter. It reserves room behind the end of a file and gives it back when
//! that is closed; here a file grows by what is written, and the end is the same.

use super::raw::size_option;
use crate::failure::FailureKind;
use crate::tree::Options;

/// Refuses options that QEMU does not take.
pub(crate) fn preallocation(options: &Options) -> Result<(), FailureKind> {
    const SECTOR: u64 = 512;
    let align = size_option(options, "prealloc-align")?.unwrap_or(0);
    size_option(options, "prealloc-size")?;
    match align.is_multiple_of(SECTOR) {
        true => Ok(()),
        false => Err(FailureKind::UnalignedPreallocation),
    }
}
