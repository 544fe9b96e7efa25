//! Storage on a regular file or a block device.
//!
//! Every call is positional, so any number of threads may use one file. The length is cached, so that asking
//! for it costs no system call; this assumes no other writer, which the image locks ensure. A flush without a
//! change before it costs no system call either. Operations that the file system does not support are tried
//! once and then emulated.

use crate::buffer::IoBuffer;
use crate::direct::DirectIo;
use crate::dirty::Dirty;
use crate::early::Early;
use crate::error::{Call, MAX_LEN};
use crate::lock::unlock_image;
use crate::open::{FileKind, file_kind};
use crate::open_files::HeldFile;
use crate::reach::source_id;
use crate::space::Space;
use crate::sys::{self, Run};
use qcow2_core::{
    HostOffset, Length, Limits, SourceId, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode,
};
use std::any::Any;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

#[cfg(all(target_os = "linux", feature = "guest-memory"))]
mod guest;
#[cfg(all(target_os = "linux", feature = "uring"))]
pub(crate) mod ring;

/// Zeroes written per call where the file system has no faster way; a multiple of every block size.
const ZERO_BUFFER_LEN: u64 = 1024 * 1024;

/// `EIO`.
const IO_ERROR: i32 = 5;

/// A regular file or a block device as a [`Storage`]; opened with [`OpenFile`](crate::OpenFile).
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    writable: bool,
    /// True for a regular file, whose length can change; false for a block device.
    regular: bool,
    len: AtomicU64,
    /// Held shared by every change; held exclusively by whatever sets the length or does a read-modify-write
    /// of a block, since either would undo or lose part of a concurrent change.
    changes: RwLock<()>,
    dirty: Dirty,
    space: Space,
    /// Set if the file was opened with direct I/O.
    direct: Option<DirectIo>,
    /// Set if writeback of new data starts before it is flushed.
    early: Option<Early>,
    /// Keeps the file registered in the set of open files ([`OpenFiles`](crate::OpenFiles)).
    held: Option<HeldFile>,
    /// True if image locks were taken for this storage; they are released when it is dropped.
    locked: AtomicBool,
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        if self.locked.load(Ordering::Relaxed) {
            unlock_image(&self.file);
        }
    }
}

/// Held during a change of the file; dropping it counts the change as unflushed.
struct ChangeGuard<'a> {
    _lock: ChangeLock<'a>,
    dirty: &'a Dirty,
}

#[expect(dead_code, reason = "the guards are held, not looked at")]
enum ChangeLock<'a> {
    Shared(RwLockReadGuard<'a, ()>),
    Exclusive(RwLockWriteGuard<'a, ()>),
}

impl Drop for ChangeGuard<'_> {
    fn drop(&mut self) {
        self.dirty.changed();
    }
}

impl FileStorage {
    /// Takes over an open file. `writable`: whether it was opened for writing. Errors: the system's, when
    /// asked for file type and length.
    pub fn from_file(file: File, writable: bool) -> io::Result<Self> {
        Self::with_direct(file, writable, None)
    }

    /// Takes over an open file; `direct` if it was opened with direct I/O.
    pub(crate) fn with_direct(file: File, writable: bool, direct: Option<DirectIo>) -> io::Result<Self> {
        let data = file.metadata()?;
        let regular = file_kind(&data) != FileKind::BlockDevice;
        let len = if regular { data.len() } else { sys::device_len(&file)? };
        Ok(Self {
            file,
            writable,
            regular,
            len: AtomicU64::new(len),
            changes: RwLock::new(()),
            dirty: Dirty::default(),
            space: Space::new(!regular),
            direct,
            early: None,
            held: None,
            locked: AtomicBool::new(false),
        })
    }

    /// Takes the file for a device, which has a length of its own. Errors: the system's, when asked for that.
    pub(crate) fn into_device(mut self) -> io::Result<Self> {
        self.len = AtomicU64::new(sys::device_len(&self.file)?);
        (self.regular, self.space) = (false, Space::new(true));
        Ok(self)
    }

    /// Starts writeback of data at the end of the file before it is flushed. Not for files that may never be,
    /// and useless for direct I/O.
    pub(crate) fn write_back_early(&mut self) {
        self.early = (self.regular && self.direct.is_none()).then(|| Early::new(self.length()));
    }

    /// Keeps `held` for as long as this storage exists.
    pub(crate) fn keep(&mut self, held: Option<HeldFile>) {
        self.held = held;
    }

    /// Identifies the file (device and inode, or block device), for comparing two openings; `None` where the
    /// system does not tell.
    pub fn id(&self) -> Option<SourceId> {
        source_id(&self.file.metadata().ok()?)
    }

    /// True if the file was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// True for a regular file, false for a device.
    pub fn is_regular(&self) -> bool {
        self.regular
    }

    /// Asks the file system to allocate this file in extents of `bytes` (0: its default), to limit
    /// fragmentation under random writes. XFS supports it, and only while the file is empty. Sets one
    /// attribute of the file and changes no content.
    ///
    /// Errors: the system's where it refuses; `Unsupported` on systems and file systems without such
    /// attributes.
    pub fn set_extent_size_hint(&self, bytes: u32) -> io::Result<()> {
        sys::set_extent_size_hint(&self.file, bytes)
    }

    /// Asks the file system to overwrite this file in place instead of copy-on-write. btrfs supports it, and
    /// only while the file is empty. Sets one attribute of the file and changes no content.
    ///
    /// Errors: the system's where it refuses; `Unsupported` on systems without such attributes.
    pub fn set_no_cow(&self) -> io::Result<()> {
        sys::set_no_cow(&self.file)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Records that image locks were taken on the file, to be released when the storage is dropped.
    pub(crate) fn note_locked(&self) {
        self.locked.store(true, Ordering::Relaxed);
    }

    fn length(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn grown_to(&self, end: u64) {
        // A maximum: concurrent writers may have grown the file further, and only `set_len` may shrink it.
        self.len.fetch_max(end, Ordering::AcqRel);
    }

    /// Checks that the storage is writable and returns the end of the call's range.
    fn check(&self, call: Call) -> Result<u64, StorageError> {
        let end = call.end()?;
        if !self.writable {
            return Err(call.read_only());
        }
        if !self.regular && end > self.length() {
            return Err(call.no_room(self.length()));
        }
        Ok(end)
    }

    /// Locks for a change of `start..end`: shared, or exclusive if blocks are changed in part.
    fn guard(&self, start: u64, end: u64) -> ChangeGuard<'_> {
        match &self.direct {
            Some(direct) if !direct.is_whole_blocks(start, (end - start) as usize) => self.exclusive(),
            _ => {
                let lock = self.changes.read().unwrap_or_else(PoisonError::into_inner);
                ChangeGuard { _lock: ChangeLock::Shared(lock), dirty: &self.dirty }
            }
        }
    }

    fn exclusive(&self) -> ChangeGuard<'_> {
        let lock = self.changes.write().unwrap_or_else(PoisonError::into_inner);
        ChangeGuard { _lock: ChangeLock::Exclusive(lock), dirty: &self.dirty }
    }

    /// Writes `buf` at `start`. The caller holds a guard for at least this range.
    fn put(&self, start: u64, buf: &[u8]) -> io::Result<()> {
        let end = start + buf.len() as u64;
        match &self.direct {
            None => {
                sys::write_full(&self.file, start, buf)?;
                self.grown_to(end);
                self.start_early(start, end);
                return Ok(());
            }
            Some(direct) => {
                direct.write(&self.file, start, buf)?;
                let len = end.max(self.length());
                if self.regular && end.next_multiple_of(direct.block() as u64) > len {
                    // Direct I/O wrote whole blocks; cut the file back to the real end inside the last one.
                    self.file.set_len(len)?;
                }
            }
        }
        self.grown_to(end);
        Ok(())
    }

    /// `start..end` was written.
    fn start_early(&self, start: u64, end: u64) {
        if let Some((from, len)) = self.early.as_ref().and_then(|early| early.wrote(start, end)) {
            // A hint; what fails here is reported by the flush.
            let _ = sys::start_writeback(&self.file, from, len);
        }
    }

    fn put_zeroes(&self, start: u64, end: u64) -> io::Result<()> {
        let alignment = self.direct.as_ref().map_or(1, DirectIo::block);
        let zeroes = IoBuffer::aligned(ZERO_BUFFER_LEN.min(end - start) as usize, alignment);
        let mut at = start;
        while at < end {
            let count = (end - at).min(ZERO_BUFFER_LEN);
            self.put(at, &zeroes[..count as usize])?;
            at += count;
        }
        Ok(())
    }

    /// Zeroes `start..end` and keeps it allocated: one `fallocate` call, or punch and reserve, or plain
    /// writes.
    fn zero_allocated(&self, start: u64, end: u64) -> io::Result<()> {
        if self.space.zero(&self.file, start, end)? {
            return Ok(());
        }
        let inside = end.min(self.length());
        // A hole reads as zeroes, and reserving it allocates it again. Devices cannot reserve, so they get
        // plain writes.
        let punched = start >= inside || self.space.punch(&self.file, start, inside)?;
        if self.regular && punched && self.space.reserve(&self.file, start, end)? {
            return Ok(());
        }
        self.put_zeroes(start, end)
    }

    /// Zeroes a range inside the file, as a hole if the file system can punch one.
    fn zero_unmapped(&self, start: u64, end: u64) -> io::Result<()> {
        if self.space.punch(&self.file, start, end)? || self.space.zero(&self.file, start, end)? {
            return Ok(());
        }
        self.put_zeroes(start, end)
    }

    /// Makes the file at least `len` bytes long; the new part is a hole.
    fn grow(&self, len: u64) -> io::Result<()> {
        if self.length() >= len {
            return Ok(());
        }
        let _guard = self.exclusive();
        // Another thread may have grown the file while this one waited for the lock.
        if self.length() < len {
            self.file.set_len(len)?;
            self.grown_to(len);
        }
        Ok(())
    }
}

impl Storage for FileStorage {
    fn len(&self) -> Result<u64, StorageError> {
        Ok(self.length())
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        if offset.value() > MAX_LEN {
            return Ok(0);
        }
        let call = Call::new("read", offset, buf.len() as u64);
        let count = match &self.direct {
            None => sys::read_full(&self.file, offset.value(), buf),
            Some(direct) => {
                // A direct write of a partial last block leaves the file longer than `len` for a moment; do
                // not return those bytes.
                let inside = self.length().saturating_sub(offset.value()).min(buf.len() as u64);
                direct.read(&self.file, offset.value(), &mut buf[..inside as usize])
            }
        };
        count.map_err(|error| call.failed(error))
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        let call = Call::new("write", offset, buf.len() as u64);
        let end = self.check(call)?;
        if buf.is_empty() {
            return Ok(());
        }
        let _guard = self.guard(offset.value(), end);
        self.put(offset.value(), buf).map_err(|error| call.failed(error))
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        let len = bufs.iter().fold(0u64, |sum, buf| sum.saturating_add(buf.len() as u64));
        let call = Call::new("write", offset, len);
        let end = self.check(call)?;
        if len == 0 {
            return Ok(());
        }
        let _guard = self.guard(offset.value(), end);
        if self.direct.is_some() {
            return self.put(offset.value(), &bufs.concat()).map_err(|error| call.failed(error));
        }
        sys::write_vectored_full(&self.file, offset.value(), bufs).map_err(|error| call.failed(error))?;
        self.grown_to(end);
        self.start_early(offset.value(), end);
        Ok(())
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        let call = Call::new("zero", offset, len);
        let end = self.check(call)?;
        if len == 0 {
            return Ok(());
        }
        let start = offset.value();
        let guard = self.guard(start, end);
        let result = match mode {
            ZeroMode::KeepAllocated => self.zero_allocated(start, end).map(|()| self.grown_to(end)),
            ZeroMode::MayUnmap => match end.min(self.length()) {
                inside if inside > start => self.zero_unmapped(start, inside),
                _ => Ok(()),
            },
        };
        // `grow` takes the same lock exclusively.
        drop(guard);
        result.and_then(|()| self.grow(end)).map_err(|error| call.failed(error))
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let call = Call::new("discard", offset, len);
        if !self.writable {
            return Err(call.read_only());
        }
        let end = call.end()?.min(self.length());
        if offset.value() >= end {
            return Ok(());
        }
        let _guard = self.guard(offset.value(), end);
        self.space.punch(&self.file, offset.value(), end).map(|_| ()).map_err(|error| call.failed(error))
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        let call = Call::new("allocate", offset, len);
        let end = self.check(call)?;
        if len == 0 || !self.regular {
            return Ok(());
        }
        let _guard = self.guard(offset.value(), end);
        let done = match self.space.reserve(&self.file, offset.value(), end) {
            // Bytes past the end have no content to preserve, so writing zeroes reserves their space just as
            // well.
            Ok(false) if offset.value() >= self.length() => {
                self.put_zeroes(offset.value(), end).map(|()| true)
            }
            other => other,
        };
        match done.map_err(|error| call.failed(error))? {
            true => self.grown_to(end),
            false => return Err(call.failed(io::ErrorKind::Unsupported.into())),
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        let call = Call::new("resize", HostOffset::new(0), len);
        call.end()?;
        if !self.writable {
            return Err(call.read_only());
        }
        if !self.regular {
            return match len == self.length() {
                true => Ok(()),
                false => Err(StorageError::new(
                    StorageErrorKind::FixedLength(Length::Device),
                    format!("resize to {len} bytes: the device has a fixed size of {} bytes", self.length()),
                )),
            };
        }
        let _guard = self.exclusive();
        self.file.set_len(len).map_err(|error| call.failed(error))?;
        if let Some(early) = &self.early {
            early.cut(len);
        }
        self.space.forget_data();
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    /// Costs no system call if nothing changed since the last flush. After one failure every flush fails,
    /// because data that the page cache lost cannot be recovered.
    fn flush(&self) -> Result<(), StorageError> {
        let call = Call::new("flush", HostOffset::new(0), self.length());
        // The count is read before the sync: a change that finishes during the sync may not be covered by it.
        let pending = self.dirty.pending().map_err(|code| call.failed(io::Error::from_raw_os_error(code)))?;
        let Some(changes) = pending else {
            return Ok(());
        };
        sys::sync(&self.file).map_err(|error| {
            // With direct I/O no data sits in the page cache, so a retry reports the true state.
            if self.direct.is_none() {
                self.dirty.broke(error.raw_os_error().unwrap_or(IO_ERROR));
            }
            call.failed(error)
        })?;
        self.dirty.made_durable(changes);
        Ok(())
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let call = Call::new("map", offset, len);
        let end = call.end()?;
        let (stop, data) = match self.space.run_at(&self.file, offset.value()) {
            Ok(Some(Run::DataUntil(stop))) => (stop, true),
            Ok(Some(Run::HoleUntil(stop))) => (stop, false),
            Ok(Some(Run::HoleToEnd)) => (end, false),
            Ok(None) => (end, true),
            Err(error) => return Err(call.failed(error)),
        };
        Ok(StorageExtent { len: stop.min(end) - offset.value(), data })
    }

    /// Copies between two files of this adapter that both use the page cache. With direct I/O the kernel's
    /// copy would go through the page cache and miss what was written around it.
    fn copy_from(
        &self,
        source: &dyn Storage,
        from: HostOffset,
        offset: HostOffset,
        len: u64,
    ) -> Result<(), StorageError> {
        let call = Call::new("copy", offset, len);
        let end = self.check(call)?;
        let source = source.copy_source().and_then(|source| source.downcast_ref::<Self>());
        let source = source.filter(|source| source.direct.is_none() && self.direct.is_none());
        let Some(source) = source else {
            return Err(call.failed(io::ErrorKind::Unsupported.into()));
        };
        let _guard = self.guard(offset.value(), end);
        let copied = sys::copy_range(&source.file, from.value(), &self.file, offset.value(), len);
        // Copying a hole may create a hole in the target.
        self.space.forget_data();
        copied.map_err(|error| call.failed(error))?;
        self.grown_to(end);
        Ok(())
    }

    fn copy_source(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        limits.length = if self.regular { Length::Grows } else { Length::Device };
        limits.fast_zeroes = self.space.has_fast_zeroes();
        limits.alignment = self.direct.as_ref().map_or(1, |direct| direct.block() as u32);
        limits
    }

    fn used_bytes(&self) -> Result<Option<u64>, StorageError> {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let call = Call::new("stat", HostOffset::new(0), self.length());
            let data = self.file.metadata().map_err(|error| call.failed(error))?;
            Ok(Some(data.blocks() * 512))
        }
        #[cfg(not(unix))]
        Ok(None)
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    /// A storage whose one flush failed, over a file that could be flushed now.
    fn after_a_failed_flush(direct: bool) -> FileStorage {
        // /dev/null takes writes and refuses fsync; a temporary file takes both.
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let mut storage = FileStorage::from_file(null, true).unwrap();
        storage.write_at(HostOffset::new(0), &[1; 512]).unwrap();
        let block = crate::direct::Alignment { block: 512, memory: 512 };
        storage.direct = direct.then(|| DirectIo::new(block));
        storage.flush().unwrap_err();
        storage.file = tempfile::tempfile().unwrap();
        storage
    }

    /// The kernel reports lost pages once and then marks them clean: the next fsync succeeds.
    #[test]
    fn a_flush_fails_for_ever_after_one_failure() {
        let storage = after_a_failed_flush(false);
        for _ in 0..2 {
            storage.flush().unwrap_err();
            storage.write_at(HostOffset::new(0), &[2; 512]).unwrap();
        }
    }

    #[test]
    fn a_failed_flush_with_direct_io_is_retried() {
        after_a_failed_flush(true).flush().unwrap();
    }
}
