//! Encrypted guest data: decrypted after every read, encrypted before every write, in whole 512-byte sectors.
//!
//! Invariant: no plain byte of the guest reaches the storage of an encrypted image, and the caller's buffer
//! does not change. Zeroes in the storage decrypt to noise. Spec: "Data encryption".

mod guest;

use crate::error::{Error, ErrorKind, Result};
use crate::open::OpenOptions;
use crate::port::cipher::{CIPHER_SECTOR, ClusterCipher, EncryptedLayer};
use crate::port::resolver::ResolvedSource;
use crate::sync::{Rank, RwLock, RwLockReadGuard, RwLockWriteGuard, read, write};
use ::alloc::sync::Arc;
use qcow2_format::header::CryptMethod;
use qcow2_format::{GuestOffset, GuestRange, Header};

/// The encryption of an image's guest data.
pub(crate) enum Crypt {
    /// None.
    Plain,
    /// Encrypted, opened without a key.
    Locked,
    /// Encrypted.
    Cipher(SectorLock),
}

/// A cipher, and the lock for changes of parts of sectors.
pub(crate) struct SectorLock {
    pub(crate) cipher: Arc<dyn ClusterCipher>,
    /// Write-locked by changes of parts of sectors, which read the rest first; read-locked by changes of
    /// whole sectors.
    partial: RwLock<()>,
}

impl SectorLock {
    pub(crate) fn new(cipher: Arc<dyn ClusterCipher>) -> Self {
        Self { cipher, partial: RwLock::new(Rank::PartialSector, ()) }
    }

    /// Takes the lock for a change of `range`; the caller holds it until the bytes are written.
    pub(crate) fn hold(&self, range: GuestRange) -> Hold<'_> {
        // A part of a sector is a read-modify-write of the sector: of two concurrent ones, the later write
        // would undo the earlier. Changes of whole sectors read nothing and need not exclude each other.
        let whole = |offset: GuestOffset| offset.value().is_multiple_of(CIPHER_SECTOR);
        if whole(range.start()) && whole(range.end()) {
            Hold::Shared(read(&self.partial))
        } else {
            Hold::Alone(write(&self.partial))
        }
    }
}

/// See [`SectorLock::hold`].
pub(crate) enum Hold<'a> {
    Shared(#[expect(dead_code, reason = "held, never read")] RwLockReadGuard<'a, ()>),
    Alone(#[expect(dead_code, reason = "held, never read")] RwLockWriteGuard<'a, ()>),
}

impl Crypt {
    /// Gets the cipher of the layer in `source` from the keyring in `options`. Disk: the keyring may read the
    /// encryption header. Errors: `Encrypted`.
    pub(crate) fn unlock(
        source: &ResolvedSource,
        header: &Header,
        options: &OpenOptions,
        depth: usize,
    ) -> Result<Self> {
        if header.crypt_method == CryptMethod::None {
            return Ok(Self::Plain);
        }
        let keys = match &options.keys {
            Some(keys) if !options.metadata_only => keys,
            _ if options.metadata_only => return Ok(Self::Locked),
            _ => return Err(Error::new(ErrorKind::Encrypted, "image is encrypted and no key is given")),
        };
        let name = (depth, &*source.name);
        let storage = &*source.storage;
        let layer = EncryptedLayer::new(name, header.crypt_method, header.extensions.luks, storage);
        let cipher = keys.unlock(&layer).map_err(locked)?;
        Ok(Self::Cipher(SectorLock::new(cipher)))
    }

    /// True if guest data is not encrypted.
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self, Self::Plain)
    }

    /// Fails with `Encrypted` and the message `what` if guest data is encrypted.
    pub(crate) fn check_plain(&self, what: &str) -> Result<()> {
        if self.is_plain() { Ok(()) } else { Err(Error::new(ErrorKind::Encrypted, what)) }
    }

    /// The cipher; only for encrypted images. Errors: `Encrypted` without a key.
    fn cipher(&self) -> Result<&dyn ClusterCipher> {
        match self {
            Self::Cipher(lock) => Ok(&*lock.cipher),
            _ => Err(Error::new(ErrorKind::Encrypted, "image is encrypted and was opened without its key")),
        }
    }

    pub(crate) fn hold(&self, range: GuestRange) -> Option<Hold<'_>> {
        match self {
            Self::Cipher(lock) => Some(lock.hold(range)),
            _ => None,
        }
    }
}

pub(crate) fn locked(error: crate::port::cipher::UnlockError) -> Error {
    Error::new(ErrorKind::Encrypted, "image cannot be unlocked").with_source(error)
}

/// Fills `buf` with the bytes at `offset` through `read`, which reads whole sectors only.
pub(crate) fn read_sectors(
    offset: u64,
    buf: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let (mut at, mut rest) = (offset, buf);
    while !rest.is_empty() {
        let inside = (at % CIPHER_SECTOR) as usize;
        let len = piece_len(at, rest.len());
        let (part, next) = rest.split_at_mut(len);
        if len.is_multiple_of(CIPHER_SECTOR as usize) {
            read(at, part)?;
        } else {
            let mut sector = [0; CIPHER_SECTOR as usize];
            read(at - inside as u64, &mut sector)?;
            part.copy_from_slice(&sector[inside..inside + len]);
        }
        at += len as u64;
        rest = next;
    }
    Ok(())
}

/// Writes `buf` at `offset` through `write`, which writes whole sectors only. `read` reads the present
/// content of sectors that `buf` covers in part.
pub(crate) fn write_sectors(
    offset: u64,
    buf: &[u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
    mut write: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let (mut at, mut rest) = (offset, buf);
    while !rest.is_empty() {
        let inside = (at % CIPHER_SECTOR) as usize;
        let len = piece_len(at, rest.len());
        let (part, next) = rest.split_at(len);
        if len.is_multiple_of(CIPHER_SECTOR as usize) {
            write(at, part)?;
        } else {
            let mut sector = [0; CIPHER_SECTOR as usize];
            read(at - inside as u64, &mut sector)?;
            sector[inside..inside + len].copy_from_slice(part);
            write(at - inside as u64, &sector)?;
        }
        at += len as u64;
        rest = next;
    }
    Ok(())
}

/// Length of the next piece at `at`: as many whole sectors as possible, or else a part of one sector.
fn piece_len(at: u64, len: usize) -> usize {
    let size = CIPHER_SECTOR as usize;
    debug_assert!(len > 0, "an empty piece at {at:#x}");
    let inside = (at % CIPHER_SECTOR) as usize;
    match inside {
        0 if len >= size => len - len % size,
        _ => len.min(size - inside),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::alloc::vec;
    use ::alloc::vec::Vec;

    fn check(offset: u64, len: usize) {
        let mut disk: Vec<u8> = (0..4096u32).map(|i| (i * 7 / 5) as u8).collect();
        let at = offset as usize;
        let whole = |at: u64, len: usize| assert!(at.is_multiple_of(512) && len.is_multiple_of(512));
        let mut buf = vec![0; len];
        read_sectors(offset, &mut buf, |at, sectors| {
            whole(at, sectors.len());
            sectors.copy_from_slice(&disk[at as usize..at as usize + sectors.len()]);
            Ok(())
        })
        .unwrap();
        assert_eq!(buf, disk[at..at + len]);
        let mut wanted = disk.clone();
        wanted[at..at + len].fill(0xee);
        let new = vec![0xee; len];
        let before = disk.clone();
        write_sectors(
            offset,
            &new,
            |at, sector| {
                sector.copy_from_slice(&before[at as usize..at as usize + sector.len()]);
                Ok(())
            },
            |at, sectors| {
                whole(at, sectors.len());
                disk[at as usize..at as usize + sectors.len()].copy_from_slice(sectors);
                Ok(())
            },
        )
        .unwrap();
        assert!(disk == wanted, "{offset} {len}");
    }

    #[test]
    fn any_alignment_uses_whole_sectors_only() {
        for offset in [0, 1, 511, 512, 700, 1024, 1535] {
            for len in [0, 1, 2, 511, 512, 513, 1024, 1500, 2048] {
                check(offset, len);
            }
        }
    }
}
