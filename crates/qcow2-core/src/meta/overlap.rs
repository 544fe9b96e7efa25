//! The kinds of metadata that a host cluster can hold.

/// A set of kinds of metadata that guest data must not overwrite. A write that would do so fails and marks
/// the image corrupt. The names are QEMU's (`overlap-check`).
///
/// The choice concerns guest data only. Tables never overwrite metadata of another kind, and metadata is
/// never freed because an L2 entry points to it, whatever the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlapChecks(u16);

impl OverlapChecks {
    /// No kind: no check.
    pub const NONE: Self = Self(0);
    /// The header's cluster.
    pub const MAIN_HEADER: Self = Self(1);
    /// The active L1 table.
    pub const ACTIVE_L1: Self = Self(1 << 1);
    /// L2 tables of the active state.
    pub const ACTIVE_L2: Self = Self(1 << 2);
    /// The refcount table.
    pub const REFCOUNT_TABLE: Self = Self(1 << 3);
    /// Refcount blocks.
    pub const REFCOUNT_BLOCK: Self = Self(1 << 4);
    /// The snapshot table.
    pub const SNAPSHOT_TABLE: Self = Self(1 << 5);
    /// L1 tables of snapshots.
    pub const INACTIVE_L1: Self = Self(1 << 6);
    /// L2 tables of snapshots. With this kind, opening an image for writing reads the L1 tables of all
    /// snapshots; without it, only if they are short.
    pub const INACTIVE_L2: Self = Self(1 << 7);
    /// The bitmap directory, and the tables and bits of bitmaps.
    pub const BITMAP_DIRECTORY: Self = Self(1 << 8);
    /// The kinds whose place the header gives.
    pub const CONSTANT: Self = Self::MAIN_HEADER
        .with(Self::ACTIVE_L1)
        .with(Self::REFCOUNT_TABLE)
        .with(Self::SNAPSHOT_TABLE)
        .with(Self::BITMAP_DIRECTORY);
    /// The kinds whose place is in memory anyway; the default.
    pub const CACHED: Self =
        Self::CONSTANT.with(Self::ACTIVE_L2).with(Self::REFCOUNT_BLOCK).with(Self::INACTIVE_L1);
    /// All kinds.
    pub const ALL: Self = Self::CACHED.with(Self::INACTIVE_L2);

    /// These kinds and those of `more`.
    pub const fn with(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }

    /// These kinds without those of `less`.
    pub const fn without(self, less: Self) -> Self {
        Self(self.0 & !less.0)
    }

    /// True if the set has all of `kinds`.
    pub const fn contains(self, kinds: Self) -> bool {
        self.0 & kinds.0 == kinds.0
    }

    /// True if the set has any of `kinds`.
    pub(crate) const fn any_of(self, kinds: Self) -> bool {
        self.0 & kinds.0 != 0
    }

    /// Both kinds of L2 tables: a table can be shared by snapshots and the active disk.
    pub(crate) const L2: Self = Self::ACTIVE_L2.with(Self::INACTIVE_L2);
    /// Number of kinds.
    pub(crate) const COUNT: usize = 9;

    /// The intersection.
    pub(crate) const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The kinds in the set, each with its index.
    pub(crate) fn each(self) -> impl Iterator<Item = (usize, Self)> {
        (0..Self::COUNT).map(|index| (index, Self(1 << index))).filter(move |(_, kind)| self.any_of(*kind))
    }

    /// The name of the first kind, for messages.
    pub(crate) fn text(self) -> &'static str {
        const NAMES: [&str; OverlapChecks::COUNT] = [
            "the header",
            "the active l1 table",
            "an l2 table",
            "the refcount table",
            "a refcount block",
            "the snapshot table",
            "a snapshot's l1 table",
            "a snapshot's l2 table",
            "a bitmap",
        ];
        self.each().next().map_or("guest data", |(index, _)| NAMES[index])
    }
}
