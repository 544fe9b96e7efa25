//! The port for the bytes of an image file.

use super::event::Events;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::any::Any;
use core::fmt;
use qcow2_format::{GuestOffset, HostOffset};

/// The kind of a storage error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StorageErrorKind {
    /// The device or file failed.
    Io,
    /// No space is left.
    NoSpace,
    /// The storage was opened for reading only.
    ReadOnly,
    /// This storage does not have the operation, for any range.
    Unsupported,
    /// Past 2^63 - 1, or a request that the storage cannot have meant.
    OutOfRange,
    /// Another length than the one that this kind of storage always has.
    FixedLength(Length),
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

    /// The kind of the error.
    pub fn kind(&self) -> StorageErrorKind {
        self.kind
    }

    /// The operating system's error number, if there was one.
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

/// What writing zeroes may do with the space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// The range stays allocated, so that a later write cannot run out of space.
    KeepAllocated,
    /// The space may be deallocated.
    MayUnmap,
}

/// A run of a storage that is all data or all hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageExtent {
    /// Bytes in the run, at least 1.
    pub len: u64,
    /// False if the run is a hole, which reads as zeroes. True if it may have nonzero bytes.
    pub data: bool,
}

/// What a server tells of a run, which may be no sort of its content: marks of a bitmap, or a depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageStatus {
    /// Bytes in the run, at least 1.
    pub len: u64,
    /// True if the run is said to be stored.
    pub data: bool,
    /// True if the run is said to read as zeroes.
    pub zero: bool,
}

/// Whether a storage can change its length, and what has the length if not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Length {
    /// It has the length it is given, as a file does.
    Grows,
    /// A block device.
    Device,
    /// A server's export.
    Export,
    /// A part of another storage, of a given length.
    Window,
    /// Something else of fixed length.
    Fixed,
}

/// Properties of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// The alignment of offsets and lengths for the fast path, a power of two. Other requests work too: an
    /// adapter that cannot do them natively goes through a buffer.
    pub alignment: u32,
    /// Whether a write past the end makes the storage longer.
    pub length: Length,
    /// True if [`Storage::write_zeroes`] is cheaper than writing zeroes.
    pub fast_zeroes: bool,
}

impl Limits {
    /// Whether a write past the end makes the storage longer.
    pub fn growable(&self) -> bool {
        self.length == Length::Grows
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { alignment: 1, length: Length::Grows, fast_zeroes: false }
    }
}

/// The bytes of an image file: a file, a block device, memory, or a wrapper around another storage.
///
/// Calls block, have explicit offsets, and may come from any number of threads concurrently. Calls on
/// disjoint ranges do not affect each other. After overlapping concurrent writes each 512-byte sector has the
/// bytes of one of them.
///
/// For crash safety the engine assumes: after a crash a 512-byte sector has its old or its new bytes, never a
/// mix; of the writes since the last [`flush`](Self::flush) any subset may be on the medium; everything
/// before a successful flush is.
pub trait Storage: Send + Sync {
    /// The length in bytes. Reading at or past it returns no bytes.
    fn len(&self) -> Result<u64, StorageError>;

    /// True if the length is 0.
    fn is_empty(&self) -> Result<bool, StorageError> {
        Ok(self.len()? == 0)
    }

    /// Reads into `buf` at `offset`. Returns the number of bytes read: fewer than `buf.len()` only at the
    /// end.
    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError>;

    /// Writes all of `buf` at `offset`. Grows a growable storage; the gap before `offset` reads as zeroes.
    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError>;

    /// Writes the buffers one after the other at `offset`. Default: one write for each.
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

    /// Makes `len` bytes at `offset` read as zeroes. Grows a growable storage. Never fails with
    /// `Unsupported`: an adapter without a faster way writes zeroes.
    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError>;

    /// Deallocates space; a hint. The range reads as zeroes or as before afterwards. It never passes the end.
    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError>;

    /// Reserves space for `len` bytes at `offset` and makes the storage at least that long. Content does not
    /// change; new bytes read as zeroes. Errors: `NoSpace`; `Unsupported` if the storage cannot reserve
    /// space.
    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError>;

    /// Truncates or extends the storage to `len` bytes; new bytes read as zeroes. Errors: `FixedLength` if it
    /// cannot have another length than it has.
    fn set_len(&self, len: u64) -> Result<(), StorageError>;

    /// A barrier: makes everything durable that was written by calls that returned before this one, and the
    /// length.
    fn flush(&self) -> Result<(), StorageError>;

    /// The data or hole at `offset`, at most `len` bytes of it. `offset + len` must not pass the end; `len`
    /// must not be 0. Default: everything is data, which is correct and slower.
    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let _ = offset;
        Ok(StorageExtent { len, data: true })
    }

    /// What is told of the bytes at `offset`, at most `len` of them, to be shown and not to be relied on:
    /// unlike the runs of [`extent_at`](Self::extent_at) this may be another thing than where data is.
    /// `None`, the default: nothing more than those.
    fn status_at(&self, offset: HostOffset, len: u64) -> Result<Option<StorageStatus>, StorageError> {
        let _ = (offset, len);
        Ok(None)
    }

    /// The properties of this storage.
    fn limits(&self) -> Limits {
        Limits::default()
    }

    /// Bytes of space that the storage uses ("disk size"); `None` if unknown.
    fn used_bytes(&self) -> Result<Option<u64>, StorageError> {
        Ok(None)
    }

    /// The guest disk whose bytes these are, an `Arc<dyn GuestDisk>`, and the guest offset of byte 0: it
    /// knows more of how they are stored than [`extent_at`](Self::extent_at) tells. For
    /// [`shown_disk`](crate::shown_disk). Default: `None`: no disk, or one that nobody need know of.
    fn guest_disk(&self) -> Option<(&dyn Any, GuestOffset)> {
        None
    }

    /// An observer of the engine's steps on this storage, for fault injection in tests. Default: `None`.
    fn events(&self) -> Option<Arc<dyn Events>> {
        None
    }

    /// Copy offload: the system copies `len` bytes at `from` in `source` to `offset` in this storage, or
    /// makes both files share the space. The range must lie before the end of `source`; a growable storage
    /// grows. After an error the target range may hold anything; the caller then copies with reads and
    /// writes, which also shows which side fails. Errors: `Unsupported` if these two storages cannot do it
    /// (the default); `ReadOnly`; errors of the system.
    fn copy_from(
        &self,
        source: &dyn Storage,
        from: HostOffset,
        offset: HostOffset,
        len: u64,
    ) -> Result<(), StorageError> {
        let _ = (source, from, offset, len);
        Err(StorageError::new(StorageErrorKind::Unsupported, "this storage has no copy offload"))
    }

    /// The storage itself for downcasts: [`copy_from`](Self::copy_from) of an adapter looks for its own type
    /// in the source. Default: `None`: every byte has to be read through this storage.
    fn copy_source(&self) -> Option<&dyn Any> {
        None
    }

    /// Makes the storage `len` bytes long like [`set_len`](Self::set_len); one of fixed length only has to be
    /// as long. Errors: `FixedLength` if it is shorter.
    fn fit(&self, len: u64) -> Result<(), StorageError> {
        if !self.limits().growable() && self.len()? >= len {
            return Ok(());
        }
        self.set_len(len)
    }

    /// Fills all of `buf` like [`read_at`](Self::read_at); bytes past the end are zeroes.
    fn read_padded(&self, offset: HostOffset, buf: &mut [u8]) -> Result<(), StorageError> {
        let n = self.read_at(offset, buf)?;
        buf[n..].fill(0);
        Ok(())
    }
}
