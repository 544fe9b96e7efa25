//! Offsets, clusters and indexes as distinct types, so that a guest offset never meets a host offset by
//! accident.
//!
//! There is no arithmetic across kinds here; going from one kind to another is a method of
//! [`Geometry`](crate::Geometry).

use core::fmt;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident, $display:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a plain number; any value is allowed.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The plain number again.
            pub const fn value(self) -> u64 {
                self.0
            }

            /// This value moved up by `count` of the same unit, or `None` past 2^64 - 1.
            pub const fn checked_add(self, count: u64) -> Option<Self> {
                match self.0.checked_add(count) {
                    Some(v) => Some(Self(v)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "(", $display, ")"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $display, self.0)
            }
        }
    };
}

unit!(
    /// A byte position on the disk that the machine sees.
    GuestOffset, "{:#x}");
unit!(
    /// A byte position in the image file, or in the external data file where one is used.
    HostOffset, "{:#x}");
unit!(
    /// The number of a cluster of the guest disk, counted from 0.
    GuestCluster, "{}");
unit!(
    /// The number of a cluster of the image file, counted from 0.
    HostCluster, "{}");
unit!(
    /// An index into an L1 table.
    L1Index, "{}");
unit!(
    /// An index into an L2 table.
    L2Index, "{}");
unit!(
    /// How many clusters.
    ClusterCount, "{}");

/// A run of bytes on the guest disk whose end does not pass 2^64 - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestRange {
    start: GuestOffset,
    len: u64,
}

impl GuestRange {
    /// A range of `len` bytes from `start`; `None` where the end would pass 2^64 - 1.
    pub const fn new(start: GuestOffset, len: u64) -> Option<Self> {
        match start.0.checked_add(len) {
            Some(_) => Some(Self { start, len }),
            None => None,
        }
    }

    /// The range from `start` up to but not including `end`; empty where `end` is not after `start`.
    pub const fn between(start: GuestOffset, end: GuestOffset) -> Self {
        Self { start, len: end.0.saturating_sub(start.0) }
    }

    /// The first byte.
    pub const fn start(self) -> GuestOffset {
        self.start
    }

    /// How many bytes.
    pub const fn len(self) -> u64 {
        self.len
    }

    /// Whether the range holds no byte.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first byte after the range.
    pub const fn end(self) -> GuestOffset {
        GuestOffset(self.start.0 + self.len)
    }
}
