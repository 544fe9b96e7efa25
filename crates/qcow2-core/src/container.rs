//! A LUKS container as a guest disk: the decrypted payload behind its header.

use crate::crypt::{SectorLock, locked, read_sectors, write_sectors};
use crate::error::{Error, ErrorKind, Result};
use crate::port::cipher::{CIPHER_SECTOR, ClusterCipher, EncryptedLayer, Keyring};
use crate::port::disk::{DiskExtent, ExtentState, GuestDisk};
use crate::port::resolver::ResolvedSource;
use crate::port::storage::{Storage, ZeroMode};
use crate::sync::atomic::{AtomicU64, Ordering};
use ::alloc::format;
use ::alloc::sync::Arc;
use ::alloc::vec;
use qcow2_format::crypt::{LUKS_HEADER_LEN, LuksHeader};
use qcow2_format::header::CryptMethod;
use qcow2_format::{GuestOffset, GuestRange, HostOffset, LuksPointer};

/// Bytes that are encrypted at a time.
const PIECE: usize = 1 << 20;

/// A disk inside a LUKS container. Sectors are numbered from the start of the payload. Bytes that were never
/// written read as noise, because the storage's zeroes are decrypted too.
pub struct ContainerDisk {
    storage: Arc<dyn Storage>,
    lock: SectorLock,
    payload: u64,
    size: AtomicU64,
    writable: bool,
}

impl ContainerDisk {
    /// Opens the container in `source` with a key from `keys`. `depth`: how many overlays are above it. Disk:
    /// reads the header; the keyring reads key material. Errors: `Format` for an invalid LUKS header,
    /// `Encrypted`, `Storage`.
    pub fn open(
        source: &ResolvedSource,
        keys: Option<&dyn Keyring>,
        writable: bool,
        depth: usize,
    ) -> Result<Self> {
        let mut bytes = [0; LUKS_HEADER_LEN];
        let len = source.storage.read_at(HostOffset::new(0), &mut bytes)?;
        let bad = |e| Error::new(ErrorKind::Format, "not a usable LUKS container").with_source(e);
        // With a keyring a bad header is no error here: the keyring parses it too and says what is wrong.
        let payload = match LuksHeader::parse(&bytes[..len]) {
            Ok(header) => u64::from(header.payload_offset_sectors) * CIPHER_SECTOR,
            Err(error) if keys.is_none() => return Err(bad(error)),
            Err(_) => 0,
        };
        let none = || Error::new(ErrorKind::Encrypted, "container is encrypted and no key is given");
        let pointer = LuksPointer { offset: HostOffset::new(0), len: payload };
        let name = (depth, &*source.name);
        let layer = EncryptedLayer::new(name, CryptMethod::Luks, Some(pointer), &*source.storage);
        let cipher = keys.ok_or_else(none)?.unlock(&layer).map_err(locked)?;
        Self::new(Arc::clone(&source.storage), payload, cipher, writable)
    }

    /// The disk that begins at byte `payload` of `storage`. Sector 0 of `cipher` is the first of the payload.
    /// Errors: `Storage`.
    pub fn new(
        storage: Arc<dyn Storage>,
        payload: u64,
        cipher: Arc<dyn ClusterCipher>,
        writable: bool,
    ) -> Result<Self> {
        let size = storage.len()?.saturating_sub(payload);
        Ok(Self { storage, lock: SectorLock::new(cipher), payload, size: AtomicU64::new(size), writable })
    }

    fn check(&self, start: GuestOffset, len: u64) -> Result<GuestRange> {
        let size = self.size();
        GuestRange::new(start, len).filter(|range| range.end().value() <= size).ok_or_else(|| {
            Error::new(ErrorKind::OutOfRange, format!("range passes the end of the disk at {size:#x}"))
        })
    }

    fn check_change(&self, start: GuestOffset, len: u64) -> Result<GuestRange> {
        if !self.writable {
            return Err(Error::new(ErrorKind::ReadOnly, "disk is opened for reading only"));
        }
        self.check(start, len)
    }

    fn host(&self, offset: u64) -> HostOffset {
        HostOffset::new(self.payload.saturating_add(offset))
    }

    fn read(&self, at: u64, sectors: &mut [u8]) -> Result<()> {
        self.storage.read_padded(self.host(at), sectors)?;
        self.lock.cipher.decrypt(at / CIPHER_SECTOR, sectors);
        Ok(())
    }

    /// Encrypts and writes whole sectors. `sealed`: a buffer as long as the longest piece.
    fn write(&self, at: u64, sectors: &[u8], sealed: &mut [u8]) -> Result<()> {
        let mut at = at;
        for piece in sectors.chunks(PIECE) {
            let sealed = &mut sealed[..piece.len()];
            sealed.copy_from_slice(piece);
            self.lock.cipher.encrypt(at / CIPHER_SECTOR, sealed);
            self.storage.write_at(self.host(at), sealed)?;
            at += piece.len() as u64;
        }
        Ok(())
    }
}

impl GuestDisk for ContainerDisk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.check(offset, buf.len() as u64)?;
        read_sectors(offset.value(), buf, |at, sectors| self.read(at, sectors))
    }

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        let range = self.check_change(offset, buf.len() as u64)?;
        let _held = self.lock.hold(range);
        let room = buf.len().next_multiple_of(CIPHER_SECTOR as usize).clamp(CIPHER_SECTOR as usize, PIECE);
        let mut sealed = vec![0; room];
        let read = |at, sector: &mut [u8]| self.read(at, sector);
        write_sectors(offset.value(), buf, read, |at, sectors| self.write(at, sectors, &mut sealed))
    }

    fn write_zeroes(&self, range: GuestRange, _mode: ZeroMode) -> Result<()> {
        let range = self.check_change(range.start(), range.len())?;
        let zeroes = vec![0; (range.len() as usize).min(PIECE)];
        let (mut at, end) = (range.start().value(), range.end().value());
        while at < end {
            let len = (end - at).min(PIECE as u64 - at % CIPHER_SECTOR).min(zeroes.len() as u64);
            self.write_at(GuestOffset::new(at), &zeroes[..len as usize])?;
            at += len;
        }
        Ok(())
    }

    /// Discards nothing: holes would reveal which parts of the disk are unused, and would read as noise.
    fn discard(&self, range: GuestRange) -> Result<()> {
        self.check_change(range.start(), range.len()).map(|_| ())
    }

    fn flush(&self) -> Result<()> {
        Ok(self.storage.flush()?)
    }

    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        self.check(range.start(), range.len())?;
        Ok(DiskExtent { len: range.len(), state: ExtentState::Data { host: None } })
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.check_change(GuestOffset::new(0), 0)?;
        let len = self.payload.checked_add(size);
        let len =
            len.ok_or_else(|| Error::new(ErrorKind::InvalidOption, format!("size {size} is too large")))?;
        self.storage.set_len(len)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
