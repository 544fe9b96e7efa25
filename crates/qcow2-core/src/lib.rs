//! The qcow2 engine: what is where, what goes where, and in which order it reaches the disk.
//!
//! The engine never touches the operating system. Bytes come and go through [`Storage`], compression through
//! [`ClusterCodec`], and a name found inside an image (a backing file, a data file) is opened by a [`Resolver`] that
//! the caller chooses, or not at all. What a machine would see is a [`GuestDisk`].
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod error;
pub mod port;
mod sync;

pub use error::{Error, ErrorKind, Result};
pub use port::codec::{ClusterCodec, CodecError};
pub use port::disk::{DiskExtent, ExtentState, GuestDisk};
pub use port::resolver::{
    ImageFormat, NoResolver, Reference, ResolveError, ResolvedSource, Resolver, SourceId,
};
pub use port::storage::{Limits, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode};
pub use qcow2_format as format;
pub use qcow2_format::{Geometry, GuestOffset, GuestRange, HostOffset};
