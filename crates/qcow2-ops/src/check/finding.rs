//! What a check finds, as values: enough to word any message, in no particular language.

use qcow2_core::walk::{BitmapFault, Owner, SnapshotFault};
use qcow2_format::HostOffset;
use qcow2_format::l2::L2Fault;
use std::fmt;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Data is, or may become, damaged.
    Corruption,
    /// Space is lost, nothing else.
    Leak,
    /// Something could not be checked.
    CheckError,
}

/// One thing that a check found. QEMU's words for each are in its description.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// Something refers to a region that ends a whole cluster or more past the end of the file; it was not
    /// counted. QEMU: `ERROR: counting reference for region exceeding the end of the file by one cluster or
    /// more: offset 0xHEX size 0xHEX`.
    PastEnd {
        /// Who refers to it.
        owner: Owner,
        /// Its first byte.
        offset: HostOffset,
        /// Its bytes.
        len: u64,
    },
    /// A cluster has more references than its refcount can say. QEMU: `ERROR: overflow cluster offset=0xHEX`,
    /// and a second line with advice.
    Overflow {
        /// The cluster's first byte.
        offset: HostOffset,
    },
    /// Reserved bits of an L1 entry are set. QEMU: `ERROR found L1 entry with reserved bits set: HEX`.
    L1Reserved {
        /// The entry.
        entry: u64,
    },
    /// An L1 entry has the copied flag and no L2 table. QEMU takes the header for the table and floods.
    L1CopiedWithoutTable {
        /// The entry.
        entry: u64,
    },
    /// An L2 table is not cluster aligned; what it holds was not checked. QEMU: `ERROR l2_offset=HEX: Table
    /// is not cluster aligned; L1 entry corrupted`, and then whatever the bytes there mean.
    L2TableMisaligned {
        /// Where the L1 entry says it is.
        offset: HostOffset,
    },
    /// Something is wrong with an L2 entry. QEMU's words by fault, HEX being `entry` or the offset in it, N
    /// `index`: `ReservedBits`: `ERROR found l2 entry with reserved bits set: HEX`; `CompressedCopied`:
    /// `ERROR: coffset=0xHEX: copied flag must never be set for compressed clusters`; `CompressedInDataFile`:
    /// `ERROR compressed cluster N with data file, entry=0xHEX`; `CompressedWithBitmap`: `ERROR compressed
    /// cluster N with non-zero subcluster allocation bitmap, entry=0xHEX`; `SubclusterBitmap`: `ERROR
    /// offset=HEX: Allocated cluster has corrupted subcluster allocation bitmap`; `UnallocatedWithBitmap`:
    /// `ERROR: Unallocated cluster has non-zero subcluster allocation map`; `DataMisaligned`: `ERROR
    /// offset=HEX: Data cluster is not properly aligned; L2 entry corrupted.`; `PreallocatedMisaligned`: the
    /// same with `Preallocated cluster`.
    L2Entry {
        /// What is wrong.
        fault: L2Fault,
        /// Where its L2 table is.
        table: HostOffset,
        /// Its index in the table.
        index: u64,
        /// Its first word.
        entry: u64,
        /// The host offset in it: of a compressed stream, exact to the byte; else as it stands.
        offset: HostOffset,
    },
    /// Something is wrong with the snapshot table. QEMU: `TooMany`: `ERROR snapshot table too large` and
    /// advice; `Misplaced`: `ERROR snapshot table offset invalid`; `Unreadable`: `ERROR failed to read the
    /// snapshot table: Too much extra metadata in snapshot table entry N` and advice; `Incomplete`: `ERROR
    /// snapshot table entry N is incomplete`; `L1Misaligned`: `ERROR snapshot ID (NAME) l1_offset=0xHEX: L1
    /// table is not cluster aligned; snapshot table entry corrupted`; `L1TooLarge`: `ERROR snapshot ID (NAME)
    /// l1_size=0xHEX: L1 table is too large; snapshot table entry corrupted`.
    Snapshot(SnapshotFault),
    /// There are snapshots although data lives in an external file. QEMU: `ERROR N snapshots in image with
    /// data file`.
    SnapshotsWithDataFile {
        /// How many.
        count: u32,
    },
    /// The bitmap directory is damaged. QEMU does not open such an image at all.
    Bitmap(BitmapFault),
    /// A bitmap table's entry is impossible. QEMU does not open such an image at all.
    BitmapTableEntry {
        /// The entry.
        entry: u64,
    },
    /// Reserved bits of a refcount table entry are set. QEMU: `ERROR refcount table entry N has reserved bits
    /// set`.
    RefcountTableReserved {
        /// The entry's index.
        index: u64,
    },
    /// A refcount block is not cluster aligned. QEMU: `ERROR refcount block N is not cluster aligned;
    /// refcount table entry corrupted`.
    RefcountBlockMisaligned {
        /// The table entry's index.
        index: u64,
    },
    /// A refcount block is past the end of the file. QEMU: `ERROR refcount block N is outside image`.
    RefcountBlockOutside {
        /// The table entry's index.
        index: u64,
    },
    /// Something else refers to a refcount block too. QEMU: `ERROR refcount block N refcount=R`.
    RefcountBlockShared {
        /// The table entry's index.
        index: u64,
        /// How many references it has so far.
        references: u64,
    },
    /// A refcount cannot be read. QEMU: `Can't get refcount for cluster N: Input/output error`.
    RefcountUnreadable {
        /// The cluster.
        cluster: u64,
    },
    /// A refcount differs from the references that were found. QEMU: `Leaked cluster N refcount=S
    /// reference=R` where it is above them, else `ERROR cluster N refcount=S reference=R`.
    Refcount {
        /// The cluster.
        cluster: u64,
        /// The refcount as stored.
        stored: u64,
        /// The references that were found.
        references: u64,
    },
    /// The copied flag of an active L1 entry differs from "the refcount is one". QEMU: `ERROR OFLAG_COPIED L2
    /// cluster: l1_index=N l1_entry=HEX refcount=S`.
    L1Copied {
        /// The L1 entry's index.
        index: u64,
        /// The entry.
        entry: u64,
        /// The L2 table's refcount as stored.
        refcount: u64,
    },
    /// The copied flag of an active L2 entry differs from "the refcount is one". QEMU: `ERROR OFLAG_COPIED
    /// data cluster: l2_entry=HEX refcount=S`.
    L2Copied {
        /// Where its L2 table is.
        table: HostOffset,
        /// Its index in the table.
        index: u64,
        /// Its first word.
        entry: u64,
        /// The cluster's refcount as stored; 1 in an external data file.
        refcount: u64,
    },
}

impl Finding {
    /// How bad it is.
    pub fn class(&self) -> Class {
        match self {
            Self::Refcount { stored, references, .. } if stored > references => Class::Leak,
            Self::RefcountUnreadable { .. }
            // QEMU does not open such an image, so it cannot say more of it either.
            | Self::Bitmap(_)
            | Self::BitmapTableEntry { .. }
            | Self::Snapshot(
                SnapshotFault::TooMany { .. }
                | SnapshotFault::Misplaced { .. }
                | SnapshotFault::Unreadable { .. },
            ) => Class::CheckError,
            _ => Class::Corruption,
        }
    }

    /// Whether it cannot be repaired in place: refcount table and blocks must be built anew.
    pub fn needs_rebuild(&self) -> bool {
        matches!(
            self,
            Self::RefcountTableReserved { .. }
                | Self::RefcountBlockMisaligned { .. }
                | Self::RefcountBlockShared { .. }
                | Self::Refcount { stored: 0, .. }
        )
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PastEnd { owner, offset, len } => {
                write!(f, "{owner:?} of {len} bytes at {offset} passes the end of the file")
            }
            Self::Overflow { offset } => {
                write!(f, "cluster at {offset} has more references than its refcount can say")
            }
            Self::L1Reserved { entry } => write!(f, "l1 entry {entry:#018x} has reserved bits set"),
            Self::L1CopiedWithoutTable { entry } => {
                write!(f, "l1 entry {entry:#018x} is copied without an l2 table")
            }
            Self::L2TableMisaligned { offset } => write!(f, "l2 table at {offset} is not cluster aligned"),
            Self::L2Entry { fault, table, index, entry, .. } => {
                write!(f, "l2 entry {index} of table at {table}: {fault:?} in {entry:#018x}")
            }
            Self::Snapshot(fault) => write!(f, "snapshot table: {fault:?}"),
            Self::SnapshotsWithDataFile { count } => {
                write!(f, "{count} snapshots beside an external data file")
            }
            Self::Bitmap(fault) => write!(f, "bitmap {}: {}", fault.index, fault.error),
            Self::BitmapTableEntry { entry } => write!(f, "bitmap table entry {entry:#018x} is impossible"),
            Self::RefcountTableReserved { index } => {
                write!(f, "refcount table entry {index} has reserved bits set")
            }
            Self::RefcountBlockMisaligned { index } => {
                write!(f, "refcount block {index} is not cluster aligned")
            }
            Self::RefcountBlockOutside { index } => {
                write!(f, "refcount block {index} is past the end of the file")
            }
            Self::RefcountBlockShared { index, references } => {
                write!(f, "refcount block {index} has {references} references, allowed is 1")
            }
            Self::RefcountUnreadable { cluster } => write!(f, "refcount of cluster {cluster} cannot be read"),
            Self::Refcount { cluster, stored, references } => {
                write!(f, "cluster {cluster} has refcount {stored} and {references} references")
            }
            Self::L1Copied { index, entry, refcount } => {
                write!(
                    f,
                    "l1 entry {index}: copied flag of {entry:#018x} does not go with refcount {refcount}"
                )
            }
            Self::L2Copied { table, index, entry, refcount } => {
                write!(
                    f,
                    "l2 entry {index} of table at {table}: copied flag of {entry:#018x} does not go with refcount {refcount}"
                )
            }
        }
    }
}

/// A finding and how often it counts: an L2 table that several L1 entries lead to is looked at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// What was found.
    pub finding: Finding,
    /// How often, at least 1.
    pub times: u64,
}
