//! The bytes an image lives in.

use super::event::Events;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::any::Any;
use core::fmt;
use qcow2_format::HostOffset;

/// What kind of trouble a storage had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StorageErrorKind {
    /// The device or file failed.
    Io,
    /// There is no room left.
    NoSpace,
    /// The storage was opened for reading only.
    ReadOnly,
    /// This storage cannot do what was asked, on any range.
    Unsupported,
    /// Past the end of a storage that cannot grow, or past 2^63 - 1.
    OutOfRange,
}

/// A failed storage call.
#[derive(Debug)]
pub struct StorageError {
    kind: StorageErrorKind,
    message: String,
    os_code: Option<i32>,
    source: Option<Box<dyn core::error::Error + Send + Sync>>,
}

impl StorageError {
    /// An error of `kind`; `message` says which call failed and where.
    pub fn new(kind: StorageErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), os_code: None, source: None }
    }

    /// Adds the operating system's error number, for callers that report it.
    pub fn with_os_code(mut self, code: i32) -> Self {
        self.os_code = Some(code);
        self
    }

    /// Adds the underlying error.
    pub fn with_source(mut self, source: impl core::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// What kind of trouble it was.
    pub fn kind(&self) -> StorageErrorKind {
        self.kind
    }

    /// The operating system's error number, where there was one.
    pub fn os_code(&self) -> Option<i32> {
        self.os_code
    }
}

impl fmt::Display for StorageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl core::error::Error for StorageError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as _)
    }
}

/// How zeroes may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// The range stays backed by space, so that a later write cannot run out of room.
    KeepAllocated,
    /// The space may be given back.
    MayUnmap,
}

/// A run of a storage that is all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageExtent {
    /// Bytes in the run, at least 1.
    pub len: u64,
    /// Whether the run may hold something else than zeroes. `false` promises zeroes.
    pub data: bool,
}

/// What a storage wants of its callers, and what it promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Offsets and lengths that are multiples of this (a power of two) are served without a detour. Others
    /// are served too: an adapter that cannot do them natively buffers them itself.
    pub alignment: u32,
    /// Whether a write past the end makes the storage longer.
    pub growable: bool,
    /// Whether [`Storage::write_zeroes`] is cheaper than writing zeroes.
    pub fast_zeroes: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { alignment: 1, growable: true, fast_zeroes: false }
    }
}

/// The bytes an image lives in: a file, a block device, memory, or a wrapper around another storage.
///
/// Blocking, positional, usable from any number of threads. Calls on disjoint ranges never influence each
/// other; of overlapping concurrent writes the result per 512-byte sector is that of one of them. Nothing is
/// durable before [`flush`](Self::flush) returns.
pub trait Storage: Send + Sync {
    /// Bytes that may be read; reading at or after it gives nothing.
    fn len(&self) -> Result<u64, StorageError>;

    /// Whether the storage has no byte.
    fn is_empty(&self) -> Result<bool, StorageError> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` from `offset` on. Returns how many bytes were read: fewer than `buf.len()` only at the
    /// end.
    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError>;

    /// Writes all of `buf`; makes a growable storage longer, the gap before `offset` reading as zeroes.
    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError>;

    /// Writes the buffers one after the other as one run from `offset` on. The default writes each in turn.
    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        let mut at = offset;
        for buf in bufs {
            self.write_at(at, buf)?;
            at = at
                .checked_add(buf.len() as u64)
                .ok_or_else(|| StorageError::new(StorageErrorKind::OutOfRange, "write past 2^64 - 1"))?;
        }
        Ok(())
    }

    /// Makes `len` bytes from `offset` read as zeroes, growing a growable storage. Never `Unsupported`: an
    /// adapter without a faster way writes zeroes.
    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError>;

    /// Gives space back; a hint. Afterwards the range reads as zeroes or as before. Never past the end.
    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError>;

    /// Reserves space for `len` bytes from `offset` and makes the storage at least that long; content does
    /// not change and new bytes read as zeroes. Errors: `NoSpace`; `Unsupported` where space cannot be
    /// reserved.
    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError>;

    /// Cuts the storage or makes it longer; new bytes read as zeroes. Errors: `Unsupported` on a fixed-size
    /// device (unless `len` is its length already).
    fn set_len(&self, len: u64) -> Result<(), StorageError>;

    /// Returns when everything written by calls that returned before this one is durable, and so is the
    /// length.
    fn flush(&self) -> Result<(), StorageError>;

    /// The run that starts at `offset`, cut at `len` bytes; `offset + len` must not pass the end and `len`
    /// must not be 0. The default calls everything data, which is merely slower.
    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let _ = offset;
        Ok(StorageExtent { len, data: true })
    }

    /// Wishes and promises of this storage.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Bytes of real space used ("disk size"), where that is known.
    fn used_bytes(&self) -> Result<Option<u64>, StorageError> {
        Ok(None)
    }

    /// Who wants to be told of the engine's steps on this storage, if anybody does. The default: nobody.
    fn events(&self) -> Option<Arc<dyn Events>> {
        None
    }

    /// Copies `len` bytes from `from` of `source` to `offset` without their passing through the program: the
    /// system does it, or makes both files share the space. All of the source's range must lie before its
    /// end; a growable storage grows. After an error the range may hold anything, and nothing was lost but
    /// time: whoever asked reads and writes instead, and learns which of both fails. Errors: `Unsupported`
    /// where these two storages cannot (the default); `ReadOnly`; the system's own.
    fn copy_from(
        &self,
        source: &dyn Storage,
        from: HostOffset,
        offset: HostOffset,
        len: u64,
    ) -> Result<(), StorageError> {
        let _ = (source, from, offset, len);
        Err(StorageError::new(StorageErrorKind::Unsupported, "this storage copies nothing by itself"))
    }

    /// What an adapter of the same kind looks for in the source of [`copy_from`](Self::copy_from): its own
    /// type. `None` (the default) where every byte has to be read through this storage.
    fn copy_source(&self) -> Option<&dyn Any> {
        None
    }

    /// Fills `buf` like [`read_at`](Self::read_at); bytes past the end become zeroes.
    fn read_padded(&self, offset: HostOffset, buf: &mut [u8]) -> Result<(), StorageError> {
        let n = self.read_at(offset, buf)?;
        buf[n..].fill(0);
        Ok(())
    }
}
