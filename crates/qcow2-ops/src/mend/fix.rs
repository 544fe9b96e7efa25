//! The changes that a repair makes, as values.

use qcow2_format::HostOffset;
use std::fmt;

/// One change of a planned repair. Offsets are host offsets.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fix {
    /// The snapshot table is rewritten at a new offset.
    SnapshotTable {
        /// Number of snapshots in the new table.
        kept: u32,
        /// Number of dropped entries: those that are empty, unreadable, or without an L1 table.
        dropped: u32,
        /// Offset of the new table.
        offset: HostOffset,
    },
    /// The header points to the active L1 table again.
    ActiveL1 {
        /// Offset of the table.
        offset: HostOffset,
    },
    /// A bitmap has a new table, "all ones".
    BitmapTable {
        /// Where its entry in the directory is.
        at: HostOffset,
        /// Where the table was said to be.
        from: HostOffset,
        /// Where it is.
        to: HostOffset,
    },
    /// A bitmap table entry becomes "all ones": a backup by this bitmap then copies too much, never too
    /// little.
    BitmapEntry {
        /// Offset of the entry.
        at: HostOffset,
        /// The old entry.
        entry: u64,
    },
    /// An L1 entry changes.
    L1Entry {
        /// Offset of the entry.
        at: HostOffset,
        /// The old entry.
        from: u64,
        /// The new entry.
        to: u64,
    },
    /// An L2 entry changes.
    L2Entry {
        /// Offset of its L2 table.
        table: HostOffset,
        /// Index in the table.
        index: u64,
        /// The old words: entry and subcluster bitmap.
        from: (u64, u64),
        /// The new words.
        to: (u64, u64),
    },
    /// Refcount table and refcount blocks are rewritten at new offsets.
    Refcounts {
        /// Offset of the first new block. The table follows the blocks.
        offset: HostOffset,
        /// Number of blocks.
        blocks: u64,
    },
    /// Copied flags are set or cleared to match the refcounts.
    CopiedFlags {
        /// Number of flags.
        count: u64,
    },
    /// The dirty bit and the corrupt bit are cleared.
    Marks,
}

impl fmt::Display for Fix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SnapshotTable { kept, dropped, offset } => {
                write!(f, "new snapshot table at {offset}: {kept} snapshots, {dropped} empty entries dropped")
            }
            Self::ActiveL1 { offset } => write!(f, "active l1 table is at {offset}"),
            Self::BitmapEntry { at, entry } => {
                write!(f, "bitmap table entry at {at}: {entry:#x} becomes all ones")
            }
            Self::BitmapTable { at, from, to } => {
                write!(f, "bitmap of the entry at {at}: table at {from} becomes one of all ones at {to}")
            }
            Self::L1Entry { at, from, to } => write!(f, "l1 entry at {at}: {from:#018x} becomes {to:#018x}"),
            Self::L2Entry { table, index, from: (from, _), to: (to, _) } if from != to => {
                write!(f, "l2 entry {index} of table at {table}: {from:#018x} becomes {to:#018x}")
            }
            Self::L2Entry { table, index, from, to } => write!(
                f,
                "l2 entry {index} of table at {table}: subclusters {:#018x} become {:#018x}",
                from.1, to.1
            ),
            Self::Refcounts { offset, blocks } => {
                write!(f, "new refcount table and {blocks} refcount blocks at {offset}")
            }
            Self::CopiedFlags { count } => write!(f, "{count} copied flags"),
            Self::Marks => f.write_str("the marks of damage are cleared"),
        }
    }
}
