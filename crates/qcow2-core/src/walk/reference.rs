//! What a walk finds: references to ranges of the image file.

use qcow2_format::HostOffset;

/// What the referenced bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Owner {
    /// The header.
    Header,
    /// The L1 table of the active state.
    ActiveL1,
    /// The L1 table of a snapshot.
    SnapshotL1,
    /// An L2 table.
    L2Table,
    /// A cluster of guest data, or one allocated for it (preallocated zero cluster).
    Data,
    /// A compressed cluster of guest data.
    Compressed,
    /// The snapshot table.
    SnapshotTable,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The LUKS header area.
    Luks,
    /// The bitmap directory.
    BitmapDirectory,
    /// A bitmap's table.
    BitmapTable,
    /// A cluster of a bitmap's bits.
    BitmapData,
}

/// A range of the image file that is referenced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reference {
    /// What the bytes are.
    pub owner: Owner,
    /// Its first byte; any alignment, may be past the end of the file.
    pub offset: HostOffset,
    /// Its bytes, at least 1.
    pub len: u64,
    /// Number of references: several L1 entries may point to one L2 table.
    pub times: u64,
}
