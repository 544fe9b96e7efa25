//! Reads and writes of encrypted guest data.

use super::{read_sectors, write_sectors};
use crate::error::Result;
use crate::image::Image;
use crate::port::cipher::{CIPHER_SECTOR, ClusterCipher, SectorNumbering};
use crate::port::storage::Storage;
use crate::write::apply::move_data;
use qcow2_format::{GuestOffset, HostOffset};

/// Bytes that are encrypted at a time at most: the largest cluster, so that no cluster is written in two
/// halves.
const PIECE: u64 = 2 << 20;

impl Image {
    /// Reads and decrypts the guest bytes at `guest`, which are stored at `host`.
    pub(crate) fn read_encrypted(&self, guest: GuestOffset, host: HostOffset, buf: &mut [u8]) -> Result<()> {
        let cipher = self.crypt.cipher()?;
        let data = self.file.data()?;
        // Guest and host offset have the same position within a sector.
        read_sectors(guest.value(), buf, |at, sectors| {
            let host = HostOffset::new(host.value() + at - guest.value());
            read_sealed(&**data, cipher, (GuestOffset::new(at), host), sectors)
        })
    }

    /// Encrypts and writes `buf` at `offset`. Reads the rest of sectors that it covers in part first; the
    /// caller excludes concurrent changes of parts of sectors, see [`Crypt::hold`](super::Crypt::hold).
    pub(crate) fn write_encrypted(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        self.crypt.cipher()?;
        let read = |at: u64, sector: &mut [u8]| {
            let inside = self.size().saturating_sub(at).min(sector.len() as u64) as usize;
            sector[inside..].fill(0);
            self.read_range(GuestOffset::new(at), &mut sector[..inside])
        };
        write_sectors(offset.value(), buf, read, |at, sectors| self.write_whole_sectors(at, sectors))
    }

    fn write_whole_sectors(&self, offset: u64, sectors: &[u8]) -> Result<()> {
        let (mut at, mut rest) = (offset, sectors);
        while !rest.is_empty() {
            let wanted = (rest.len() as u64).min(PIECE - at % PIECE);
            let prepared = self.prepare(GuestOffset::new(at), wanted)?;
            let (part, next) = rest.split_at(prepared.len as usize);
            assert!(!part.is_empty(), "writing at {at:#x} makes no progress");
            let mut sealed = self.scratch.take_exact(part.len());
            sealed.copy_from_slice(part);
            self.seal(GuestOffset::new(at), prepared.host, &mut sealed)?;
            let batch = [(prepared, &sealed[..])];
            let moved = move_data(&**self.file.data()?, &batch);
            let [(prepared, _)] = batch;
            self.scratch.give(sealed);
            moved?;
            prepared.commit()?;
            at += part.len() as u64;
            rest = next;
        }
        Ok(())
    }

    /// Encrypts whole sectors of guest bytes for their host offset; does nothing if the image is not
    /// encrypted.
    pub(crate) fn seal(&self, guest: GuestOffset, host: HostOffset, sectors: &mut [u8]) -> Result<()> {
        if !self.crypt.is_plain() {
            let cipher = self.crypt.cipher()?;
            debug_assert!(
                (guest.value() | sectors.len() as u64).is_multiple_of(CIPHER_SECTOR),
                "parts of sectors are encrypted"
            );
            cipher.encrypt(number(cipher, guest, host), sectors);
        }
        Ok(())
    }
}

/// Reads and decrypts whole sectors.
fn read_sealed(
    data: &dyn Storage,
    cipher: &dyn ClusterCipher,
    (guest, host): (GuestOffset, HostOffset),
    sectors: &mut [u8],
) -> Result<()> {
    debug_assert!(sectors.len().is_multiple_of(CIPHER_SECTOR as usize), "parts of sectors are decrypted");
    data.read_padded(host, sectors)?;
    cipher.decrypt(number(cipher, guest, host), sectors);
    Ok(())
}

fn number(cipher: &dyn ClusterCipher, guest: GuestOffset, host: HostOffset) -> u64 {
    match cipher.numbering() {
        SectorNumbering::Guest => guest.value() / CIPHER_SECTOR,
        SectorNumbering::Host => host.value() / CIPHER_SECTOR,
    }
}
