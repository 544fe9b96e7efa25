//! The ports for encryption: ciphers, and the keyring that unlocks them.

use super::storage::Storage;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;
use qcow2_format::{CryptMethod, LuksPointer};

/// The unit of encryption in bytes. Spec: "Data encryption".
pub const CIPHER_SECTOR: u64 = 512;

/// The sector number that goes into the encryption of a sector. Spec: "Data encryption".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectorNumbering {
    /// Guest offset / 512: the old AES method.
    Guest,
    /// Host offset / 512, in the file that holds the data: LUKS. Bytes that move must be encrypted again.
    Host,
}

/// A cipher with its key. It has no other state; any number of threads may use it concurrently.
pub trait ClusterCipher: Send + Sync {
    /// How sectors are numbered.
    fn numbering(&self) -> SectorNumbering;

    /// Encrypts whole sectors in place. `data`: a multiple of 512 bytes; its sectors have the numbers
    /// `first_sector`, `first_sector + 1`, and so on.
    fn encrypt(&self, first_sector: u64, data: &mut [u8]);

    /// The reverse of [`encrypt`](Self::encrypt).
    fn decrypt(&self, first_sector: u64, data: &mut [u8]);
}

/// An encrypted layer that is being opened.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct EncryptedLayer<'a> {
    /// The number of overlays above this layer; 0 is the image itself.
    pub depth: usize,
    /// Its resolved name, for messages.
    pub name: &'a str,
    /// The encryption method.
    pub method: CryptMethod,
    /// Offset and length of its encryption header; LUKS only.
    pub luks: Option<LuksPointer>,
    /// The file with the encryption header.
    pub storage: &'a dyn Storage,
}

impl<'a> EncryptedLayer<'a> {
    /// The layer `name` with `depth` overlays above it, encrypted with `method`, its header at `luks` in
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

/// Unlocks encrypted layers. The engine never sees a password or key, only the cipher.
pub trait Keyring: Send + Sync {
    /// The cipher for `layer`. Disk: may read its encryption header.
    fn unlock(&self, layer: &EncryptedLayer<'_>) -> Result<Arc<dyn ClusterCipher>, UnlockError>;
}

/// A layer that could not be unlocked: no secret, a wrong one, or a damaged encryption header.
#[derive(Debug)]
pub struct UnlockError {
    message: String,
    source: Option<Box<dyn core::error::Error + Send + Sync>>,
}

impl UnlockError {
    /// `message`: the reason. It must not contain the secret.
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
