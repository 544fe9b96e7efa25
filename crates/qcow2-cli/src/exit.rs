//! The exit codes, in one place.

/// Done; `check`: no errors; `compare`: the same content.
pub(crate) const SUCCESS: u8 = 0;
/// Failed; `compare`: the content differs.
pub(crate) const FAILURE: u8 = 1;
/// `check`: the image is damaged.
pub(crate) const CHECK_CORRUPT: u8 = 2;
/// `check`: clusters are leaked, nothing else.
pub(crate) const CHECK_LEAKS: u8 = 3;
/// `check`: the format has no check.
pub(crate) const CHECK_UNSUPPORTED: u8 = 63;
/// `vet`: something cannot be judged, or the image cannot be read.
pub(crate) const VET_UNKNOWN: u8 = 1;
/// `vet`: the image is not safe.
pub(crate) const VET_UNSAFE: u8 = 2;
/// `compare`: an image could not be opened, or the result not be told.
pub(crate) const COMPARE_OPEN: u8 = 2;
/// `compare`: an image could not say what is allocated.
pub(crate) const COMPARE_EXTENTS: u8 = 3;
/// `compare`: an image could not be read.
pub(crate) const COMPARE_READ: u8 = 4;
/// `rescue`: the new image is complete, but something of the disk was lost or its place guessed.
pub(crate) const RESCUE_LOST: u8 = 3;
