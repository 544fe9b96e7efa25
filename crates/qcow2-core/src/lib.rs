//! The qcow2 engine: maps guest offsets, allocates clusters, orders writes.
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
//! The engine does no I/O of its own; it calls ports that the caller implements or takes from our other
//! crates:
//!
//! | port | what the engine does through it |
//! |---|---|
//! | [`Storage`] | reads, writes and flushes the bytes of an image file |
//! | [`GuestDisk`] | offers a disk to a machine; reads from a backing file |
//! | [`ClusterCodec`] | compresses and expands one cluster |
//! | [`Keyring`], [`ClusterCipher`] | unlocks an encrypted layer, encrypts and decrypts its sectors |
//! | [`Resolver`] | opens a name found inside an image: a backing file, an external data file |
//!
//! The default resolver, [`NoResolver`], opens nothing. The engine never sees a password: the [`Keyring`]
//! turns it into a cipher.
//!
//! # Moving the bytes yourself
//!
//! [`Image::read_at`] and [`Image::write_at`] block until the storage has answered. An event loop or a VMM
//! does the data I/O itself: [`Image::pin`] gives host offsets that stay valid while the [`Pin`] is held, for
//! reads; [`Image::prepare_write`] gives a [`WriteTicket`] with the pieces to write, and
//! [`WriteTicket::commit`] makes them visible.
//!
//! # What a storage must guarantee
//!
//! The order of writes relies on these four, see [`Storage`]:
//!
//! - A sector of 512 bytes at a multiple of 512 is written whole or not at all.
//! - Between two flushes any subset of the writes may reach the medium, in any order. The engine asks for no
//!   more.
//! - When [`Storage::flush`] returns success, everything written before it is durable, the file's length
//!   included.
//! - Bytes that were written and flushed read back unchanged.
//!
//! Nobody else may change the image file while it is open for writing; file locks are the adapter's task.
//!
//! # `no_std`
//!
//! The crate is `no_std` with `alloc`, except for its locks: one private module links `std` for `Mutex`,
//! `RwLock`, `Condvar`, `OnceLock` and, in debug builds, the check of the lock order. So it needs a target
//! that has `std`, but no file system, sockets, clock or threads of it.
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
pub mod damage;
mod empty;
pub mod error;
pub mod image;
mod inflight;
mod invariant;
pub mod live;
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
mod tail;
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
pub use damage::{Damage, DamageObserver, L2Slot};
pub use error::{Error, ErrorKind, Place, Result, TableKind, find_cause};
pub use image::Image;
pub use live::{HoldObserver, LiveDisk};
pub use meta::overlap::OverlapChecks;
pub use open::{Codecs, Layers, OpenOptions};
pub use port::cipher::{CIPHER_SECTOR, ClusterCipher, EncryptedLayer, Keyring, SectorNumbering, UnlockError};
pub use port::codec::{ClusterCodec, CodecError};
pub use port::disk::{DiskExtent, ExtentState, GuestDisk};
pub use port::event::{Event, Events};
pub use port::resolver::{
    ImageFormat, NoResolver, Reference, ResolveError, ResolvedSource, Resolver, SourceId,
};
pub use port::storage::{
    Length, Limits, Storage, StorageError, StorageErrorKind, StorageExtent, StorageStatus, ZeroMode,
};
pub use qcow2_format as format;
pub use qcow2_format::{Geometry, GuestOffset, GuestRange, HostOffset};
pub use raw::{RawDisk, allocated_at, shown_disk};
#[cfg(feature = "unstable-mutants")]
pub use rules::OrderingRule;
pub use snapshot::NewSnapshot;
pub use write::attempt::InPlace;
pub use write::drive::{Piece, Pin, WriteTicket};
