//! Findings of a check, as values with all the numbers a message needs.

use qcow2_core::walk::{BitmapFault, Owner, SnapshotFault};
use qcow2_format::HostOffset;
use qcow2_format::l2::L2Fault;
use std::fmt;

/// Severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Data is damaged or may become damaged.
    Corruption,
    /// Space is wasted, nothing else.
    Leak,
    /// Something could not be checked.
    CheckError,
}

/// One finding of a check. The descriptions quote QEMU's message for it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// A reference to a region that ends one cluster or more past the end of the file; not counted. QEMU:
    /// `ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset
    /// 0xHEX size 0xHEX`.
    PastEnd {
        /// What refers to the region.
        owner: Owner,
        /// Host offset of the region.
        offset: HostOffset,
        /// Length of the region in bytes.
        len: u64,
    },
    /// A cluster has more references than its refcount can count. QEMU: `ERROR: overflow cluster
    /// offset=0xHEX`, and a second line with advice.
    Overflow {
        /// Host offset of the cluster.
        offset: HostOffset,
    },
    /// Reserved bits of an L1 entry are set. QEMU: `ERROR found L1 entry with reserved bits set: HEX`.
    L1Reserved {
        /// The raw entry.
        entry: u64,
    },
    /// An L1 entry has the copied flag but no L2 table. QEMU takes the image header for the table and reports
    /// garbage.
    L1CopiedWithoutTable {
        /// The raw entry.
        entry: u64,
    },
    /// An L2 table is not cluster aligned; its entries were not checked. QEMU: `ERROR l2_offset=HEX: Table is
    /// not cluster aligned; L1 entry corrupted`, followed by findings about the bytes there.
    L2TableMisaligned {
        /// The offset in the L1 entry.
        offset: HostOffset,
    },
    /// An L2 entry is invalid. QEMU's message by fault, with HEX for `entry` or its offset and N for `index`:
    /// `ReservedBits`: `ERROR found l2 entry with reserved bits set: HEX`; `CompressedCopied`: `ERROR:
    /// coffset=0xHEX: copied flag must never be set for compressed clusters`; `CompressedInDataFile`: `ERROR
    /// compressed cluster N with data file, entry=0xHEX`; `CompressedWithBitmap`: `ERROR compressed cluster N
    /// with non-zero subcluster allocation bitmap, entry=0xHEX`; `SubclusterBitmap`: `ERROR offset=HEX:
    /// Allocated cluster has corrupted subcluster allocation bitmap`; `UnallocatedWithBitmap`: `ERROR:
    /// Unallocated cluster has non-zero subcluster allocation map`; `DataMisaligned`: `ERROR offset=HEX: Data
    /// cluster is not properly aligned; L2 entry corrupted.`; `PreallocatedMisaligned`: the same with
    /// `Preallocated cluster`.
    L2Entry {
        /// The fault.
        fault: L2Fault,
        /// Host offset of the L2 table.
        table: HostOffset,
        /// Index of the entry in the table.
        index: u64,
        /// First word of the entry.
        entry: u64,
        /// The host offset in the entry, unchecked; exact to the byte for a compressed stream.
        offset: HostOffset,
    },
    /// The snapshot table is invalid. QEMU: `TooMany`: `ERROR snapshot table too large` and advice;
    /// `Misplaced`: `ERROR snapshot table offset invalid`; `Unreadable`: `ERROR failed to read the snapshot
    /// table: Too much extra metadata in snapshot table entry N` and advice; `Incomplete`: `ERROR snapshot
    /// table entry N is incomplete`; `L1Misaligned`: `ERROR snapshot ID (NAME) l1_offset=0xHEX: L1 table is
    /// not cluster aligned; snapshot table entry corrupted`; `L1TooLarge`: `ERROR snapshot ID (NAME)
    /// l1_size=0xHEX: L1 table is too large; snapshot table entry corrupted`.
    Snapshot(SnapshotFault),
    /// The image has snapshots and an external data file. QEMU: `ERROR N snapshots in image with data file`.
    SnapshotsWithDataFile {
        /// Number of snapshots.
        count: u32,
    },
    /// The bitmap directory is damaged. QEMU refuses to open such an image.
    Bitmap(BitmapFault),
    /// A bitmap table entry is invalid. QEMU refuses to open such an image.
    BitmapTableEntry {
        /// The raw entry.
        entry: u64,
    },
    /// Reserved bits of a refcount table entry are set. QEMU: `ERROR refcount table entry N has reserved bits
    /// set`.
    RefcountTableReserved {
        /// Index of the entry.
        index: u64,
    },
    /// A refcount block is not cluster aligned. QEMU: `ERROR refcount block N is not cluster aligned;
    /// refcount table entry corrupted`.
    RefcountBlockMisaligned {
        /// Index of the refcount table entry.
        index: u64,
    },
    /// A refcount block is past the end of the file. QEMU: `ERROR refcount block N is outside image`.
    RefcountBlockOutside {
        /// Index of the refcount table entry.
        index: u64,
    },
    /// A refcount block's cluster has other references too. QEMU: `ERROR refcount block N refcount=R`.
    RefcountBlockShared {
        /// Index of the refcount table entry.
        index: u64,
        /// References counted so far.
        references: u64,
    },
    /// The refcount of a cluster cannot be read. QEMU: `Can't get refcount for cluster N: Input/output
    /// error`.
    RefcountUnreadable {
        /// The host cluster.
        cluster: u64,
    },
    /// A refcount differs from the number of references. QEMU: `Leaked cluster N refcount=S reference=R` if
    /// it is higher, else `ERROR cluster N refcount=S reference=R`.
    Refcount {
        /// The host cluster.
        cluster: u64,
        /// The refcount on disk.
        stored: u64,
        /// The number of references found.
        references: u64,
    },
    /// The copied flag of an active L1 entry does not match its L2 table's refcount (it must be set exactly
    /// if the refcount is 1). QEMU: `ERROR OFLAG_COPIED L2 cluster: l1_index=N l1_entry=HEX refcount=S`.
    L1Copied {
        /// Index of the L1 entry.
        index: u64,
        /// The raw entry.
        entry: u64,
        /// The L2 table's refcount on disk.
        refcount: u64,
    },
    /// The copied flag of an active L2 entry does not match the cluster's refcount (it must be set exactly if
    /// the refcount is 1). QEMU: `ERROR OFLAG_COPIED data cluster: l2_entry=HEX refcount=S`.
    L2Copied {
        /// Host offset of the L2 table.
        table: HostOffset,
        /// Index of the entry in the table.
        index: u64,
        /// First word of the entry.
        entry: u64,
        /// The cluster's refcount on disk; 1 in an external data file.
        refcount: u64,
    },
}

impl Finding {
    /// Severity of the finding.
    pub fn class(&self) -> Class {
        match self {
            Self::Refcount { stored, references, .. } if stored > references => Class::Leak,
            Self::RefcountUnreadable { .. }
            // QEMU does not open such an image, so its check has no class for it.
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

    /// True if it cannot be repaired in place: the refcount table and blocks must be rebuilt.
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
                write!(f, "{owner:?} of {len} bytes at {offset} ends past the end of the file")
            }
            Self::Overflow { offset } => {
                write!(f, "cluster at {offset} has more references than its refcount can count")
            }
            Self::L1Reserved { entry } => write!(f, "l1 entry {entry:#018x} has reserved bits set"),
            Self::L1CopiedWithoutTable { entry } => {
                write!(f, "l1 entry {entry:#018x} has the copied flag but no l2 table")
            }
            Self::L2TableMisaligned { offset } => write!(f, "l2 table at {offset} is not cluster aligned"),
            Self::L2Entry { fault, table, index, entry, .. } => {
                write!(f, "l2 entry {index} of table at {table}: {fault:?} in {entry:#018x}")
            }
            Self::Snapshot(fault) => write!(f, "snapshot table: {fault:?}"),
            Self::SnapshotsWithDataFile { count } => {
                write!(f, "{count} snapshots in an image with an external data file")
            }
            Self::Bitmap(fault) => write!(f, "bitmap {}: {}", fault.index, fault.error),
            Self::BitmapTableEntry { entry } => write!(f, "bitmap table entry {entry:#018x} is invalid"),
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
                write!(f, "l1 entry {index}: copied flag of {entry:#018x} does not match refcount {refcount}")
            }
            Self::L2Copied { table, index, entry, refcount } => {
                write!(
                    f,
                    "l2 entry {index} of table at {table}: copied flag of {entry:#018x} does not match refcount {refcount}"
                )
            }
        }
    }
}

/// A finding with its multiplicity: an L2 table shared by several L1 entries is scanned only once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The finding.
    pub finding: Finding,
    /// How often it counts, at least 1.
    pub times: u64,
}
