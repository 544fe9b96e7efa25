//! The qcow2 engine: what is where, what goes where, and in which order it reaches the disk.
//!
//! ```
//! use qcow2_core::{CreateOptions, GuestOffset, Image, ImageFormat, OpenOptions, ResolvedSource};
//! use qcow2_io::MemoryStorage;
//! use std::sync::Arc;
//!
//! let source = ResolvedSource::new(Arc::new(MemoryStorage::new()), ImageFormat::Qcow2, "memory");
//! let image = Image::create(source, &CreateOptions::new(1 << 20), &OpenOptions::default())?;
//! image.write_at(GuestOffset::new(0), b"hello")?;
//! let mut bytes = [0; 5];
//! image.read_at(GuestOffset::new(0), &mut bytes)?;
//! assert_eq!(&bytes, b"hello");
//! image.close()?;
//! # Ok::<(), qcow2_core::Error>(())
//! ```
//!
//! The engine never touches the operating system. Bytes come and go through [`Storage`], compression through
//! [`ClusterCodec`], and a name found inside an image (a backing file, a data file) is opened by a
//! [`Resolver`] that the caller chooses, or not at all. What a machine would see is a [`GuestDisk`].
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

mod amend;
mod backing;
pub mod bitmap;
pub mod chain;
pub mod container;
pub mod create;
mod crypt;
mod empty;
pub mod error;
pub mod image;
mod inflight;
mod invariant;
mod meta;
pub mod open;
pub mod port;
pub mod raw;
mod read;
mod recover;
mod repair;
mod resize;
mod rules;
pub mod snapshot;
mod sync;
mod vmstate;
pub mod walk;
mod write;

pub use amend::{AmendProgress, HeaderChange};
pub use chain::open_disk;
pub use container::ContainerDisk;
pub use create::{
    BackingName, CreateOptions, LuksArea, NewEncryption, Preallocation, RawOptions, Refusal, create,
    create_container, create_raw,
};
pub use error::{Error, ErrorKind, Result};
pub use image::Image;
pub use meta::overlap::OverlapChecks;
pub use open::{Codecs, Layers, OpenOptions};
pub use port::cipher::{CIPHER_SECTOR, ClusterCipher, EncryptedLayer, Keyring, SectorNumbering, UnlockError};
pub use port::codec::{ClusterCodec, CodecError};
pub use port::disk::{DiskExtent, ExtentState, GuestDisk};
pub use port::event::{Event, Events};
pub use port::resolver::{
    ImageFormat, NoResolver, Reference, ResolveError, ResolvedSource, Resolver, SourceId,
};
pub use port::storage::{Limits, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode};
pub use qcow2_format as format;
pub use qcow2_format::{Geometry, GuestOffset, GuestRange, HostOffset};
pub use raw::RawDisk;
#[cfg(feature = "unstable-mutants")]
pub use rules::OrderingRule;
pub use snapshot::NewSnapshot;
pub use write::drive::{Piece, Pin, WriteTicket};
