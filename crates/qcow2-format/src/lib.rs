//! Encoding and decoding of the qcow2 on-disk format.
//!
//! Every parser is total: any input gives a value or a [`FormatError`], never a panic, and never an
//! allocation above a named [`limit`]. The crate does no I/O.
//!
//! | spec section | module |
//! |---|---|
//! | Header | [`header`] |
//! | Header extensions | [`extension`] |
//! | Feature bits and their names | [`feature`] |
//! | Cluster and refcount arithmetic | [`geometry`], [`units`] |
//! | L1 table entries | [`l1`] |
//! | L2 table entries, compressed descriptors, extended L2 entries | [`l2`] |
//! | Refcount tables and blocks | [`refcount`] |
//! | Snapshots | [`snapshot`] |
//! | Bitmaps | [`bitmap`] |
//! | Encryption | [`crypt`] |
//! | (every limit) | [`limit`] |
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod bitmap;
pub mod bytes;
pub mod crypt;
pub mod error;
pub mod extension;
pub mod feature;
pub mod geometry;
pub mod header;
pub mod l1;
pub mod l2;
pub mod limit;
pub mod refcount;
pub mod snapshot;
pub mod units;

pub use bitmap::{Bitmap, BitmapTableEntry};
pub use error::{FormatError, FormatErrorKind, Table};
pub use extension::{BitmapsExtension, Extensions, LuksPointer, UnknownExtension};
pub use feature::{AutoclearFeatures, CompatibleFeatures, FeatureName, Features, IncompatibleFeatures};
pub use geometry::{Geometry, GeometryFields};
pub use header::{CompressionType, CryptMethod, Header, HeaderField, Version};
pub use snapshot::Snapshot;
pub use units::{
    ClusterCount, GuestCluster, GuestOffset, GuestRange, HostCluster, HostOffset, L1Index, L2Index,
};
