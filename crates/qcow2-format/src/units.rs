//! Offsets, clusters and indexes as distinct types, so that a guest offset cannot be used as a host offset.
//!
//! The types have no arithmetic across kinds; [`Geometry`](crate::Geometry) converts between them.

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

            /// The plain number.
            pub const fn value(self) -> u64 {
                self.0
            }

            /// This value plus `count` of the same unit, or `None` past 2^64 - 1.
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
    /// A byte offset on the guest disk.
    GuestOffset, "{:#x}");
unit!(
    /// A byte offset in the image file, or in the external data file if the image has one.
    HostOffset, "{:#x}");
unit!(
    /// The number of a guest cluster, from 0.
    GuestCluster, "{}");
unit!(
    /// The number of a host cluster, from 0.
    HostCluster, "{}");
unit!(
    /// An index into an L1 table.
    L1Index, "{}");
unit!(
    /// An index into an L2 table.
    L2Index, "{}");
unit!(
    /// A number of clusters.
    ClusterCount, "{}");

/// A range of bytes on the guest disk whose end does not exceed 2^64 - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestRange {
    start: GuestOffset,
    len: u64,
}

impl GuestRange {
    /// A range of `len` bytes from `start`; `None` if the end would exceed 2^64 - 1.
    pub const fn new(start: GuestOffset, len: u64) -> Option<Self> {
        match start.0.checked_add(len) {
            Some(_) => Some(Self { start, len }),
            None => None,
        }
    }

    /// The range `start..end`; empty if `end` is not after `start`.
    pub const fn between(start: GuestOffset, end: GuestOffset) -> Self {
        Self { start, len: end.0.saturating_sub(start.0) }
    }

    /// The first byte.
    pub const fn start(self) -> GuestOffset {
        self.start
    }

    /// Length in bytes.
    pub const fn len(self) -> u64 {
        self.len
    }

    /// True if the range is empty.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first byte after the range.
    pub const fn end(self) -> GuestOffset {
        GuestOffset(self.start.0 + self.len)
    }
}
