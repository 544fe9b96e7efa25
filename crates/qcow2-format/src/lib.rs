//! Encoding and decoding of the qcow2 on-disk format.
//!
//! ```
//! use qcow2_format::{Header, HostOffset, Version};
//!
//! let mut header = Header::new(Version::V3, 16);
//! (header.size, header.l1_size) = (1 << 30, 2);
//! header.l1_table_offset = HostOffset::new(0x30000);
//! (header.refcount_table_offset, header.refcount_table_clusters) = (HostOffset::new(0x10000), 1);
//! assert_eq!(Header::parse(&header.encode()?)?, header);
//! # Ok::<(), qcow2_format::FormatError>(())
//! ```
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
//! | (signatures of this and other formats) | [`signature`] |
//! | (every limit) | [`limit`] |
//!
//! # Which crate do I want?
//!
//! | you want to | take |
//! |---|---|
//! | use images in files | `qcow2-image` |
//! | open disks by QEMU's names: `json:`, `nbd:`, option lists | `qcow2-blockdev` |
//! | read and write images in your own storage; `std` for locks only | `qcow2-core` |
//! | run the procedures (convert, check, commit, ...) on your own disks and threads | `qcow2-ops` |
//! | use files, block devices, memory or NBD as storage, with locks | `qcow2-io` |
//! | compress and expand clusters | `qcow2-codec` |
//! | use LUKS headers, key slots and sector encryption | `qcow2-crypt` |
//! | parse or write the on-disk structures, `no_std` | `qcow2-format` |
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
pub mod signature;
pub mod snapshot;
pub mod text;
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
