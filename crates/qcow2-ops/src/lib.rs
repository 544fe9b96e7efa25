//! Procedures on disk images. Each file has one procedure: an options struct in, a report or an effect out.
//!
//! ```
//! use qcow2_core::{GuestDisk, RawDisk};
//! use qcow2_io::MemoryStorage;
//! use qcow2_ops::{CompareOptions, Comparison, Inline, Silent, compare};
//! use std::sync::Arc;
//!
//! let disk = || -> qcow2_core::Result<Arc<dyn GuestDisk>> {
//!     Ok(Arc::new(RawDisk::new(Arc::new(MemoryStorage::new()), true)?))
//! };
//! let (a, b) = (disk()?, disk()?);
//! a.resize(1 << 20)?;
//! // A shorter disk counts as followed by zeroes.
//! let report = compare([&a, &b], &CompareOptions::default(), &Inline, &Silent)?;
//! assert_eq!(report.result, Comparison::Identical);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Sources and targets are [`GuestDisk`](qcow2_core::GuestDisk)s, opened by the caller. The crate uses no
//! files, sockets, clocks, threads or environment variables: parallel work goes through an [`Executor`],
//! progress through a [`Progress`].
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
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

mod above;
pub mod amend;
pub mod bench;
pub mod bitmap;
mod buffer;
pub mod chain;
pub mod check;
pub mod checksum;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod copy;
pub mod dd;
pub mod digest;
pub mod error;
pub mod executor;
pub mod info;
pub mod live;
pub mod map;
pub mod measure;
pub mod mend;
mod offload;
mod pieces;
mod pipeline;
pub mod port;
pub mod progress;
pub mod rebase;
pub mod repair;
mod report;
pub mod rescue;
pub mod resize;
pub mod snapshot;
mod source;
pub mod stream;
mod testing;
pub mod vet;
mod whole;
mod zeroes;

pub use amend::{AmendOptions, amend};
pub use bench::{BenchOptions, bench};
pub use chain::ChainError;
pub use check::{CheckOptions, CheckReport, check};
pub use checksum::{Checksum, checksum};
pub use commit::{CommitOptions, commit, commit_layers};
pub use compare::{CompareOptions, CompareReport, Comparison, compare};
pub use convert::{ConvertOptions, convert, converted_size};
pub use digest::{Blake3, checksum_blake3};
pub use error::{Error, ErrorKind, Result};
pub use executor::{Executor, Inline};
pub use info::{InfoReport, info};
pub use map::{MapExtent, MapOptions, map};
pub use port::{
    CallerError, Chain, KeySlots, LayerRole, NewBacking, NewStorage, NextLayer, OpenChain, OpenLayer,
    RecordTop, Reopen,
};
pub use progress::{Progress, Silent};
pub use rebase::{RebaseOptions, RebaseReport, rebase};
pub use report::{CopyReport, Unreadable};
pub use rescue::{Rescue, RescueFiles, RescueOptions, RescueReport, rescue};
pub use resize::{NewSize, ResizeOptions, resize};
pub use stream::{StreamOptions, StreamedImage, begin_stream, stream_qcow2, stream_raw, stream_raw_in};
pub use vet::{VetOptions, VetReport, vet};
