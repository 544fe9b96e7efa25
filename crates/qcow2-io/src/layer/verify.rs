//! A storage that compares another one with a copy that is known to be right.

use qcow2_core::{
    HostOffset, Length, Limits, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode,
};
use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// Two storages that should be the same and are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mismatch {
    /// The request that found it writes.
    pub is_write: bool,
    /// Where the request begins.
    pub offset: HostOffset,
    /// Its bytes.
    pub len: u64,
    /// What differs.
    pub what: MismatchKind,
}

/// What differs between two storages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MismatchKind {
    /// Their content, from this byte on.
    Content(HostOffset),
    /// One of them failed: the system's error code of the tested one and of the copy, 0 for success, and 5
    /// (an input/output error) where the system has none.
    Result(i32, i32),
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let request = if self.is_write { "write" } else { "read" };
        write!(f, "{request} of {} bytes at {}: ", self.len, self.offset)?;
        match self.what {
            MismatchKind::Content(offset) => write!(f, "the two copies differ at {offset}"),
            MismatchKind::Result(tested, copy) => {
                write!(f, "only one of the two copies failed (error codes {tested} and {copy})")
            }
        }
    }
}

impl Error for Mismatch {}

/// Is told of a mismatch before the request fails, from any thread.
pub trait MismatchObserver: Send + Sync {
    /// This was found.
    fn mismatch(&self, found: &Mismatch);
}

/// Wraps two storages: what is written goes to both, what is read is read from both and compared. A request
/// that finds them different fails with [`Mismatch`] as its source. Its length and its content are those of
/// the tested one; where bytes are stored is told by the copy. Discards are dropped, since afterwards each
/// may read as it likes, and its length is fixed.
pub struct VerifyStorage {
    tested: Arc<dyn Storage>,
    copy: Arc<dyn Storage>,
    observer: Option<Arc<dyn MismatchObserver>>,
}

impl VerifyStorage {
    /// Tests `tested` against `copy`, which reads as zeroes past its end. `observer`: is told of the first
    /// mismatch and of all others.
    pub fn new(
        tested: Arc<dyn Storage>,
        copy: Arc<dyn Storage>,
        observer: Option<Arc<dyn MismatchObserver>>,
    ) -> Self {
        Self { tested, copy, observer }
    }

    fn differs(&self, is_write: bool, (offset, len): (HostOffset, u64), what: MismatchKind) -> StorageError {
        let found = Mismatch { is_write, offset, len, what };
        self.observer.iter().for_each(|observer| observer.mismatch(&found));
        StorageError::new(StorageErrorKind::Io, found.to_string()).with_source(found)
    }

    /// What both answer to a request for `place`. Errors: that of both, or a mismatch if one succeeded.
    fn both<T, U>(
        &self,
        is_write: bool,
        place: (HostOffset, u64),
        tested: Result<T, StorageError>,
        copy: Result<U, StorageError>,
    ) -> Result<(T, U), StorageError> {
        let code = |error: Option<&StorageError>| error.map_or(0, |e| e.os_code().unwrap_or(IO_ERROR));
        let (first, second) = (code(tested.as_ref().err()), code(copy.as_ref().err()));
        match (tested, copy) {
            (Ok(tested), Ok(copy)) => Ok((tested, copy)),
            (Err(error), Err(_)) if first == second => Err(error),
            _ => Err(self.differs(is_write, place, MismatchKind::Result(first, second))),
        }
    }

    fn change(
        &self,
        place: (HostOffset, u64),
        change: impl Fn(&dyn Storage) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let (tested, copy) = (change(&*self.tested), change(&*self.copy));
        self.both(true, place, tested, copy).map(drop)
    }
}

impl Storage for VerifyStorage {
    fn len(&self) -> Result<u64, StorageError> {
        self.tested.len()
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        let inside = self.len()?.saturating_sub(offset.value()).min(buf.len() as u64) as usize;
        let buf = &mut buf[..inside];
        let mut expected = vec![0; inside];
        let place = (offset, inside as u64);
        let (tested, copy) =
            (self.tested.read_padded(offset, buf), self.copy.read_padded(offset, &mut expected));
        self.both(false, place, tested, copy)?;
        match buf.iter().zip(&expected).position(|(a, b)| a != b) {
            None => Ok(inside),
            Some(at) => {
                let at = HostOffset::new(offset.value() + at as u64);
                Err(self.differs(false, place, MismatchKind::Content(at)))
            }
        }
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.change((offset, buf.len() as u64), |storage| storage.write_at(offset, buf))
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        self.change((offset, len), |storage| storage.write_zeroes(offset, len, mode))
    }

    fn discard(&self, _offset: HostOffset, _len: u64) -> Result<(), StorageError> {
        Ok(())
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.change((offset, len), |storage| storage.allocate(offset, len))
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        match self.len()? {
            own if own == len => Ok(()),
            own => Err(StorageError::new(
                StorageErrorKind::FixedLength(Length::Fixed),
                format!("resize to {len} bytes: two storages of {own} are compared and cannot change"),
            )),
        }
    }

    /// The copy can be made again.
    fn flush(&self) -> Result<(), StorageError> {
        self.tested.flush()
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        match self.copy.len()?.saturating_sub(offset.value()) {
            0 => Ok(StorageExtent { len, data: false }),
            rest => self.copy.extent_at(offset, len.min(rest)),
        }
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.length = Length::Fixed;
        limits
    }
}

/// `EIO`, for errors that the system has no code for.
const IO_ERROR: i32 = 5;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LimitStorage, MemoryStorage};
    use std::sync::Mutex;

    #[derive(Default)]
    struct Found(Mutex<Vec<Mismatch>>);

    impl MismatchObserver for Found {
        fn mismatch(&self, found: &Mismatch) {
            self.0.lock().unwrap().push(*found);
        }
    }

    fn at(offset: u64) -> HostOffset {
        HostOffset::new(offset)
    }

    #[test]
    fn writes_go_to_both_and_reads_compare() {
        let (tested, copy) =
            (Arc::new(MemoryStorage::with_len(4096)), Arc::new(MemoryStorage::with_len(1024)));
        let found = Arc::new(Found::default());
        let both = VerifyStorage::new(tested.clone(), copy.clone(), Some(found.clone()));
        let mut buf = [9; 3000];
        assert_eq!(both.read_at(at(2000), &mut buf).unwrap(), 2096);
        both.write_at(at(100), &[7; 50]).unwrap();
        both.discard(at(0), 4096).unwrap();
        assert_eq!(both.read_at(at(0), &mut buf).unwrap(), 3000);
        assert_eq!((buf[99], buf[100]), (0, 7));
        both.write_zeroes(at(100), 10, ZeroMode::MayUnmap).unwrap();
        for storage in [&tested, &copy] {
            let mut byte = [1; 2];
            storage.read_at(at(109), &mut byte).unwrap();
            assert_eq!(byte, [0, 7]);
        }
        assert!(found.0.lock().unwrap().is_empty());
        copy.write_at(at(520), &[1]).unwrap();
        both.read_at(at(0), &mut buf[..520]).unwrap();
        let error = both.read_at(at(512), &mut buf[..64]).unwrap_err();
        let told = found.0.lock().unwrap()[0];
        assert_eq!(told.what, MismatchKind::Content(at(520)));
        assert_eq!((told.is_write, told.offset, told.len), (false, at(512), 64));
        assert_eq!(error.source().unwrap().downcast_ref::<Mismatch>(), Some(&told));
    }

    #[test]
    fn a_failure_of_one_is_a_mismatch() {
        let limited = Arc::new(LimitStorage::new(Arc::new(MemoryStorage::with_len(512)), 512));
        let found = Arc::new(Found::default());
        let both = VerifyStorage::new(Arc::new(MemoryStorage::new()), limited.clone(), Some(found.clone()));
        assert!(both.write_at(at(1000), &[1]).is_err());
        assert!(matches!(found.0.lock().unwrap()[0].what, MismatchKind::Result(0, 1..)));
        let neither = VerifyStorage::new(limited.clone(), limited, Some(found.clone()));
        assert_eq!(neither.write_at(at(1000), &[1]).unwrap_err().kind(), StorageErrorKind::NoSpace);
        assert_eq!(found.0.lock().unwrap().len(), 1);
    }
}
