//! Encryption of guest data, compatible with QEMU: LUKS version 1, inside an image or as a standalone
//! container, and the legacy AES method.
//!
//! ```text
//!  password --> luks::Volume::unlock --> key --> Volume::cipher --> SectorCipher (a ClusterCipher)
//!                  |
//!               Storage: the header and its key slots
//! ```
//!
//! The crate has no access to the outside. Header bytes come through the engine's `Storage`, random bytes
//! through [`Random`], time through [`Stopwatch`]. Passwords and keys are wiped from memory when they are
//! dropped, and never appear in a message or in debug output.
//!
//! | question | module |
//! |---|---|
//! | supported ciphers, modes, IV generators and hashes | [`spec`] |
//! | how sectors are encrypted | [`sector`] |
//! | unlocking, creating and changing LUKS headers | [`luks`] |
//! | the legacy AES method | [`legacy`] |
//! | encrypted passwords | [`wrap`] |
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

mod cipher;
pub mod error;
mod hash;
pub mod legacy;
pub mod luks;
pub mod random;
pub mod secret;
pub mod sector;
pub mod spec;
pub mod wrap;

pub use error::{CryptError, CryptErrorKind, SlotRefusal};
pub use random::{Random, Stopwatch};
pub use secret::Secret;
pub use sector::SectorCipher;
pub use spec::{CipherAlg, CipherMode, CipherSpec, HashAlg, IvGen};
