//! What a caller may want to tell the user though nothing has failed.

use crate::keyvalue::ShortForm;
use qcow2_io::OsError;
use std::sync::Arc;

/// Something that the user should know.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Warning {
    /// A switch in the name has no value, which is deprecated.
    ShortSwitch(ShortForm),
    /// The name says by an empty name that there is no backing file, which is deprecated.
    EmptyBacking,
    /// The disk called so was taken for raw by its looks, and is to be written to.
    GuessedRaw(String),
    /// Bitmaps are damaged, and lost when the disk is changed.
    BitmapsToLose(Arc<qcow2_core::Error>),
    /// The image was not closed cleanly: opening it for changes counts its references anew.
    NotClosedCleanly,
    /// The file system does not take the extent size hint that was asked for.
    NoExtentSizeHint(Arc<OsError>),
    /// The file of a layer ends before what is in it does: what is missing reads as zeroes.
    MissingEnd {
        /// The file.
        file: String,
        /// Its length.
        len: u64,
        /// Where its last cluster in use ends.
        end: u64,
    },
}
