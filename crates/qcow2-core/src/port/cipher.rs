//! Encrypting guest data, and the keys that it takes.

use super::storage::Storage;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;
use qcow2_format::{CryptMethod, LuksPointer};

/// Bytes that are encrypted as one unit. Spec: "Data encryption".
pub const CIPHER_SECTOR: u64 = 512;

/// Which number a sector is encrypted under. Spec: "Data encryption".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectorNumbering {
    /// Guest offset / 512: the old AES method.
    Guest,
    /// Host offset / 512, in the file that holds the data: LUKS. Moved bytes must be encrypted anew.
    Host,
}

/// A cipher with its key. Holds no state besides; usable from any number of threads.
pub trait ClusterCipher: Send + Sync {
    /// Which numbers the sectors have.
    fn numbering(&self) -> SectorNumbering;

    /// Encrypts whole sectors in place. `data`: a multiple of 512 bytes; its sectors have the numbers
    /// `first_sector`, `first_sector + 1`, and so on.
    fn encrypt(&self, first_sector: u64, data: &mut [u8]);

    /// Undoes [`encrypt`](Self::encrypt).
    fn decrypt(&self, first_sector: u64, data: &mut [u8]);
}

/// An encrypted layer that is being opened.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct EncryptedLayer<'a> {
    /// How many layers stand on this one; 0 is the image itself.
    pub depth: usize,
    /// Its name for messages, as resolved.
    pub name: &'a str,
    /// How it is encrypted.
    pub method: CryptMethod,
    /// Where its encryption header is; LUKS only.
    pub luks: Option<LuksPointer>,
    /// The file with the encryption header.
    pub storage: &'a dyn Storage,
}

impl<'a> EncryptedLayer<'a> {
    /// The layer `name` with `depth` others on it, encrypted by `method` with its header at `luks` in
    /// `storage`.
    pub fn new(
        (depth, name): (usize, &'a str),
        method: CryptMethod,
        luks: Option<LuksPointer>,
        storage: &'a dyn Storage,
    ) -> Self {
        Self { depth, name, method, luks, storage }
    }
}

/// Has the secrets of encrypted layers. The engine never sees one.
pub trait Keyring: Send + Sync {
    /// The cipher that `layer` needs. Disk: may read its encryption header.
    fn unlock(&self, layer: &EncryptedLayer<'_>) -> Result<Arc<dyn ClusterCipher>, UnlockError>;
}

/// A layer that stays locked: no secret, a wrong one, or a damaged encryption header.
#[derive(Debug)]
pub struct UnlockError {
    message: String,
    source: Option<Box<dyn core::error::Error + Send + Sync>>,
}

impl UnlockError {
    /// `message` says why, and never what the secret is.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), source: None }
    }

    /// Adds the underlying error.
    pub fn with_source(mut self, source: impl core::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }
}

impl fmt::Display for UnlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl core::error::Error for UnlockError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as _)
    }
}
