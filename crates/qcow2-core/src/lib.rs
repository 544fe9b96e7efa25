//! The qcow2 engine: what is where, what goes where, and in which order it reaches the disk.
//!
//! The engine never touches the operating system. Bytes come and go through [`Storage`], compression through
//! [`ClusterCodec`], and a name found inside an image (a backing file, a data file) is opened by a
//! [`Resolver`] that the caller chooses, or not at all. What a machine would see is a [`GuestDisk`].
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
pub mod rules;
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
pub use rules::OrderingRule;
pub use snapshot::NewSnapshot;
pub use write::drive::{Piece, Pin, WriteTicket};
