//! A raw disk whose format was guessed. Whoever writes it could make it look like an image that names other
//! files, and the next one to guess would open those: such writes to the first sector are refused.

use crate::{MemoryStorage, probe_format};
use qcow2_core::{
    Error, ErrorKind, GuestDisk, GuestOffset, GuestRange, ImageFormat, Result, ZeroMode, forward_guest_disk,
};

use std::sync::{Arc, Mutex, PoisonError};

/// Bytes that a guess looks at.
const PROBED_LEN: u64 = 512;

/// Wraps a raw disk: a write that would make its first sector look like another format fails with
/// [`ErrorKind::ReadOnly`] and changes nothing. Zeroes and discards count as writes: a signature may hold
/// zeroes.
pub struct GuardedRaw {
    inner: Arc<dyn GuestDisk>,
    /// Held while the first sector changes.
    first_sector: Mutex<()>,
}

impl GuardedRaw {
    /// Wraps `inner`, which is raw as far as anybody knows.
    pub fn new(inner: Arc<dyn GuestDisk>) -> Self {
        Self { inner, first_sector: Mutex::new(()) }
    }

    /// Makes a change that puts `buf` at `offset`, unless it is refused.
    fn guarded(&self, offset: u64, buf: &[u8], change: impl FnOnce() -> Result<()>) -> Result<()> {
        if offset >= PROBED_LEN || buf.is_empty() {
            return change();
        }
        let _alone = self.first_sector.lock().unwrap_or_else(PoisonError::into_inner);
        self.check(offset, buf)?;
        change()
    }

    /// Refuses `buf` at `offset` where the first sector would then look like another format.
    fn check(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let mut sector = vec![0; PROBED_LEN as usize];
        let there = self.inner.size().min(PROBED_LEN) as usize;
        self.inner.read_at(GuestOffset::new(0), &mut sector[..there])?;
        let start = offset as usize;
        let len = buf.len().min(sector.len() - start);
        sector[start..start + len].copy_from_slice(&buf[..len]);
        match probe_format(&MemoryStorage::from(sector))? {
            ImageFormat::Raw => Ok(()),
            other => {
                let text =
                    format!("the first sector would turn a disk that was taken for raw into {other:?}");
                Err(Error::new(ErrorKind::ReadOnly, text))
            }
        }
    }
}

/// What zeroes in `range` put into the first sector.
fn zeroes(range: GuestRange) -> &'static [u8] {
    static ZEROES: [u8; PROBED_LEN as usize] = [0; PROBED_LEN as usize];
    &ZEROES[..range.len().min(PROBED_LEN) as usize]
}

impl GuestDisk for GuardedRaw {
    forward_guest_disk!(inner: size read_at flush extent_at resize);

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        self.guarded(offset.value(), buf, || self.inner.write_at(offset, buf))
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        self.guarded(range.start().value(), zeroes(range), || self.inner.write_zeroes(range, mode))
    }

    fn discard(&self, range: GuestRange) -> Result<()> {
        self.guarded(range.start().value(), zeroes(range), || self.inner.discard(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::RawDisk;

    #[test]
    fn no_write_makes_it_an_image() {
        let storage = Arc::new(MemoryStorage::with_len(10_000));
        let disk = GuardedRaw::new(Arc::new(RawDisk::new(storage.clone(), true).unwrap()));
        let write =
            |offset, bytes: &[u8]| disk.write_at(GuestOffset::new(offset), bytes).map_err(|e| e.kind());
        let header = b"QFI\xfb\x00\x00\x00\x03";
        assert_eq!(write(0, header), Err(ErrorKind::ReadOnly));
        assert_eq!(write(0, &[header.as_slice(), &[0; 8000]].concat()), Err(ErrorKind::ReadOnly));
        // Not in pieces either, whatever piece comes last.
        assert_eq!(write(0, &header[..4]), Ok(()));
        assert_eq!(write(4, &header[4..]), Err(ErrorKind::ReadOnly));
        assert_eq!(write(0, b"zzzz"), Ok(()));
        assert_eq!(write(4, &header[4..]), Ok(()));
        assert_eq!(write(0, &header[..4]), Err(ErrorKind::ReadOnly));
        assert_eq!(write(512, header), Ok(()));
        assert_eq!(&storage.to_vec()[..8], b"zzzz\x00\x00\x00\x03");
    }

    #[test]
    fn no_zero_completes_a_signature() {
        let luks = b"LUKS\xba\xbe\xff\x01";
        for discard in [false, true] {
            let storage = Arc::new(MemoryStorage::with_len(10_000));
            let disk = GuardedRaw::new(Arc::new(RawDisk::new(storage.clone(), true).unwrap()));
            disk.write_at(GuestOffset::new(0), luks).unwrap();
            let zero = |offset, len| {
                let range = GuestRange::new(GuestOffset::new(offset), len).unwrap();
                let done = match discard {
                    true => disk.discard(range),
                    false => disk.write_zeroes(range, ZeroMode::MayUnmap),
                };
                done.map_err(|e| e.kind())
            };
            assert_eq!(zero(6, 1), Err(ErrorKind::ReadOnly));
            assert_eq!(&storage.to_vec()[..8], luks);
            assert_eq!(zero(512, 9000), Ok(()));
            assert_eq!(zero(0, 10_000), Ok(()));
        }
    }
}
