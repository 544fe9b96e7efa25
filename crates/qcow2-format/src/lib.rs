//! The qcow2 on-disk format: bytes to values and back, and nothing else.
//!
//! Every parser here is total: any bytes give a value or a [`FormatError`], never a panic, and no allocation
//! larger than a named [`limit`]. Nothing here reads or writes a file.
//!
//! | spec section | module |
//! |---|---|
//! | Cluster and refcount arithmetic | [`geometry`], [`units`] |
//! | L1 table entries | [`l1`] |
//! | L2 table entries, compressed descriptors, extended L2 entries | [`l2`] |
//! | Refcount tables and blocks | [`refcount`] |
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod error;
pub mod geometry;
pub mod l1;
pub mod l2;
pub mod refcount;
pub mod units;

pub use error::{FormatError, FormatErrorKind};
pub use geometry::{Geometry, GeometryFields};
pub use units::{
    ClusterCount, GuestCluster, GuestOffset, GuestRange, HostCluster, HostOffset, L1Index, L2Index,
};
