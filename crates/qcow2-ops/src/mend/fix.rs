//! What a repair changes, as values.

use qcow2_format::HostOffset;
use std::fmt;

/// One change of a planned repair.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fix {
    /// The snapshot table is written anew.
    SnapshotTable {
        /// Snapshots that stay, all of them that there are.
        kept: u32,
        /// Entries that named nothing.
        dropped: u32,
        /// Where the new table is.
        offset: HostOffset,
    },
    /// The header leads to the active L1 table again.
    ActiveL1 {
        /// Where the table is.
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
    /// An entry of a bitmap's table becomes "all ones": whoever copies what the bitmap marks copies too much,
    /// never too little.
    BitmapEntry {
        /// Where the entry is.
        at: HostOffset,
        /// What it was.
        entry: u64,
    },
    /// An L1 entry.
    L1Entry {
        /// Where the entry is.
        at: HostOffset,
        /// What it was.
        from: u64,
        /// What it becomes.
        to: u64,
    },
    /// An L2 entry.
    L2Entry {
        /// Where its L2 table is.
        table: HostOffset,
        /// Its index in the table.
        index: u64,
        /// Its words as they were.
        from: (u64, u64),
        /// What they become.
        to: (u64, u64),
    },
    /// Refcount table and blocks are written anew.
    Refcounts {
        /// Where the new blocks begin; the table follows them.
        offset: HostOffset,
        /// How many blocks.
        blocks: u64,
    },
    /// Copied flags that did not go with the refcounts.
    CopiedFlags {
        /// How many.
        count: u64,
    },
    /// The marks of an unclean end and of damage go.
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
