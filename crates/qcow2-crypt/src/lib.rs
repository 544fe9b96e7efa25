//! Encryption of guest data as QEMU does it: LUKS version 1, inside an image or as a container of its own,
//! and the old AES method.
//!
//! Nothing here touches the world: header bytes come through the engine's `Storage`, random bytes through
//! [`Random`], time through [`Stopwatch`]. Passwords and keys are wiped from memory when they go, and no
//! message or debug text has one.
//!
//! | question | module |
//! |---|---|
//! | which ciphers, modes, IV generators and hashes there are | [`spec`] |
//! | how sectors are encrypted | [`sector`] |
//! | opening, making and changing LUKS headers | [`luks`] |
//! | the old method | [`legacy`] |
//! | secrets that are encrypted themselves | [`wrap`] |
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
