//! Cluster codecs for the engine's [`ClusterCodec`](qcow2_core::ClusterCodec) port: [`Deflate`] (compression
//! type 0, "zlib" in option names) and [`Zstd`] (type 1).
//!
//! A codec keeps its contexts in a pool, one per thread that uses it at the same time. Once the pool has
//! grown to that size, no cluster costs an allocation. The same cluster gives the same stream, whichever
//! context compresses it.
//!
//! ```
//! use qcow2_codec::Deflate;
//! use qcow2_core::ClusterCodec;
//!
//! let codec = Deflate::default();
//! let cluster = [7u8; 65536];
//! // A stream must be shorter than the cluster to save anything.
//! let mut stream = vec![0; cluster.len() - 1];
//! let len = codec.compress(&cluster, &mut stream)?.expect("a run of one byte shrinks");
//! assert!(len < 200);
//!
//! let mut back = [0; 65536];
//! codec.expand(&stream[..len], &mut back)?;
//! assert_eq!(back, cluster);
//! # Ok::<(), qcow2_core::CodecError>(())
//! ```
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

pub mod deflate;
mod inflate;
mod pool;
mod squeeze;
pub mod zstd;

pub use deflate::{Deflate, DeflateOptions};
pub use zstd::Zstd;
