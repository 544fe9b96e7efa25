//! What is wrong with a damaged image, as a value: for callers that put it in words of their own.

use crate::error::{Error, TableKind};
use crate::meta::overlap::OverlapChecks;
use ::alloc::format;
use qcow2_format::{FormatError, FormatErrorKind, GuestOffset, HostOffset, L1Index, L2Index};

/// The entry of an L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Slot {
    /// Host offset of the table.
    pub table: HostOffset,
    /// The entry in it.
    pub index: L2Index,
}

/// Why a table cannot be followed, or a place not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// An L1 entry points to an L2 table that does not begin with a cluster.
    L2TableOffset {
        /// The entry.
        index: L1Index,
        /// Where it points.
        offset: HostOffset,
    },
    /// An L2 entry points to a cluster that does not begin with one.
    ClusterOffset {
        /// The entry.
        entry: L2Slot,
        /// Where it points.
        offset: HostOffset,
        /// Whether the cluster reads as zeroes.
        zero: bool,
        /// The guest cluster whose entry was to be changed; `None`: it was followed.
        to_change: Option<GuestOffset>,
    },
    /// An L2 entry of a version 2 image has the zero flag.
    ZeroInVersion2 {
        /// The entry.
        entry: L2Slot,
    },
    /// The subcluster bitmap of an L2 entry contradicts itself or the entry.
    SubclusterBitmap {
        /// The entry.
        entry: L2Slot,
        /// The guest cluster whose entry was to be changed; `None`: it was followed.
        to_change: Option<GuestOffset>,
    },
    /// An L2 entry is compressed, although guest data is in an external file.
    CompressedInDataFile {
        /// The entry.
        entry: L2Slot,
    },
    /// An L2 entry maps a cluster to another offset of the external data file than its own.
    DataFileOffset {
        /// The entry.
        entry: L2Slot,
        /// The guest cluster.
        guest: GuestOffset,
        /// Where it points.
        offset: HostOffset,
    },
    /// A refcount table entry points to a block that does not begin with a cluster.
    RefcountBlockOffset {
        /// The entry's index.
        index: u64,
        /// Where it points.
        offset: HostOffset,
    },
    /// A cluster that was to be written, used or freed as something else holds metadata.
    Overlap {
        /// Host offset of the cluster.
        offset: HostOffset,
        /// The kinds of metadata in it.
        kinds: OverlapChecks,
    },
    /// The cluster of the header, whose refcount is 0, was found for something new.
    HeaderFree {
        /// The new table; `None`: compressed clusters.
        table: Option<TableKind>,
    },
}

/// Is told of damage when it is found, also where the error is of no consequence later.
pub trait DamageObserver: Send + Sync {
    /// `error`: what will be returned. `marked`: whether the image is now taken for corrupt, which one that
    /// is open for reading is not. Called at most once for an open image, and not for one that is open for
    /// repair.
    fn damage_found(&self, error: &Error, marked: bool);
}

/// The error for an L1 entry that does not decode.
pub(crate) fn bad_l1_entry(index: L1Index, source: FormatError) -> Error {
    let error = Error::corrupt(format!("l1 entry {index} is damaged")).in_table(TableKind::L1);
    misaligned(error, source, |offset| Damage::L2TableOffset { index, offset })
}

/// The error for a refcount table entry that does not decode.
pub(crate) fn bad_refcount_table_entry(index: u64, source: FormatError) -> Error {
    let error = Error::corrupt(format!("refcount table entry {index} is damaged"));
    let error = error.in_table(TableKind::RefcountTable);
    misaligned(error, source, |offset| Damage::RefcountBlockOffset { index, offset })
}

/// The error for an L2 entry that does not decode. `zero`: whether it has the zero flag.
pub(crate) fn bad_l2_entry(entry: L2Slot, zero: bool, source: FormatError) -> Error {
    let error = Error::corrupt(format!("l2 entry {} of table at {} is damaged", entry.index, entry.table));
    let error = error.in_table(TableKind::L2).at_host(entry.table);
    misaligned(error, source, |offset| Damage::ClusterOffset { entry, offset, zero, to_change: None })
}

fn misaligned(error: Error, source: FormatError, damage: impl Fn(HostOffset) -> Damage) -> Error {
    let offset = match source.kind() {
        FormatErrorKind::Misaligned(offset) => Some(HostOffset::new(*offset)),
        _ => None,
    };
    let error = error.with_source(source);
    match offset {
        Some(offset) => error.with_damage(damage(offset)),
        None => error,
    }
}
