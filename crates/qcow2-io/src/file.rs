//! Regular files and block devices as a storage.
//!
//! Every call is positional, so any number of threads may use one file. The length is kept here, so that
//! asking for it costs no system call; no other writer is expected (see the image locks). A flush without a
//! change before it costs none either. What the file system cannot do is found out once and then done the
//! slower way.

use crate::direct::{AlignedBuffer, DirectIo};
use crate::dirty::Dirty;
use crate::error::{Call, MAX_LEN};
use crate::lock::unlock_image;
use crate::open::{FileKind, file_kind};
use crate::open_files::{HeldFile, source_id};
use crate::space::Space;
use crate::sys::{self, Run};
use qcow2_core::{
    HostOffset, Limits, SourceId, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode,
};
use std::any::Any;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Bytes of zeroes written at a time where nothing faster exists; a multiple of every block.
const ZERO_BUFFER_LEN: u64 = 1024 * 1024;

/// The error number of failed input or output.
const IO_ERROR: i32 = 5;

/// A regular file or a block device as a [`Storage`]; made by [`OpenFile`](crate::OpenFile).
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    writable: bool,
    /// Whether this is a regular file, whose length can change.
    regular: bool,
    len: AtomicU64,
    /// Held shared by every change, exclusively by whatever sets the length or rewrites parts of a block:
    /// neither may meet another change half-way.
    changes: RwLock<()>,
    dirty: Dirty,
    space: Space,
    /// Present where the file is read and written around the page cache.
    direct: Option<DirectIo>,
    /// Keeps the file among those that are open together.
    held: Option<HeldFile>,
    /// Whether image locks were taken for this storage, and end with it.
    locked: AtomicBool,
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        if self.locked.load(Ordering::Relaxed) {
            unlock_image(&self.file);
        }
    }
}

/// The right to change the file; giving it up counts a change.
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
    /// Takes over an open file. `writable` says whether it was opened for writing. Errors: whatever the
    /// system says when asked for kind and length.
    pub fn from_file(file: File, writable: bool) -> io::Result<Self> {
        Self::with_direct(file, writable, None)
    }

    /// Takes over an open file; `direct` where it was opened to bypass the page cache.
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
            held: None,
            locked: AtomicBool::new(false),
        })
    }

    /// Keeps `held` for as long as the file is open.
    pub(crate) fn keep(&mut self, held: Option<HeldFile>) {
        self.held = held;
    }

    /// What makes two openings the same file, where the system tells.
    pub fn id(&self) -> Option<SourceId> {
        source_id(&self.file.metadata().ok()?)
    }

    /// Whether the file was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether this is a regular file (otherwise a block device).
    pub fn is_regular(&self) -> bool {
        self.regular
    }

    /// Asks the file system to give this file space in pieces of `bytes` (0: as it likes), so that a disk
    /// that is written here and there does not fall into many small ones. XFS does so, and takes the wish
    /// only while the file is empty; writes one attribute of the file and no content.
    ///
    /// Errors: what the system says where it does not do it, `Unsupported` on systems and file systems
    /// without such attributes.
    pub fn set_extent_size_hint(&self, bytes: u32) -> io::Result<()> {
        sys::set_extent_size_hint(&self.file, bytes)
    }

    /// Asks the file system to write this file in place where it would write a copy elsewhere. btrfs does so,
    /// and takes the wish only while the file is empty; writes one attribute of the file and no content.
    ///
    /// Errors: what the system says where it does not do it, `Unsupported` on systems without such
    /// attributes.
    pub fn set_no_cow(&self) -> io::Result<()> {
        sys::set_no_cow(&self.file)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Image locks were taken on the file: they are given up when the storage is dropped.
    pub(crate) fn note_locked(&self) {
        self.locked.store(true, Ordering::Relaxed);
    }

    fn length(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    fn grown_to(&self, end: u64) {
        self.len.fetch_max(end, Ordering::AcqRel);
    }

    /// Checks a change and returns the end of its range.
    fn check(&self, call: Call) -> Result<u64, StorageError> {
        let end = call.end()?;
        if !self.writable {
            return Err(call.read_only());
        }
        if !self.regular && end > self.length() {
            return Err(call.past_end(self.length()));
        }
        Ok(end)
    }

    /// The right to change `start..end`: shared, unless parts of a block have to be rewritten.
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

    /// Writes under a guard for (at least) this range.
    fn put(&self, start: u64, buf: &[u8]) -> io::Result<()> {
        let end = start + buf.len() as u64;
        match &self.direct {
            None => sys::write_full(&self.file, start, buf)?,
            Some(direct) => {
                direct.write(&self.file, start, buf)?;
                let len = end.max(self.length());
                if self.regular && end.next_multiple_of(direct.block() as u64) > len {
                    // Whole blocks were written; the file ends inside the last one.
                    self.file.set_len(len)?;
                }
            }
        }
        self.grown_to(end);
        Ok(())
    }

    fn put_zeroes(&self, start: u64, end: u64) -> io::Result<()> {
        let alignment = self.direct.as_ref().map_or(1, DirectIo::block);
        let zeroes = AlignedBuffer::new(ZERO_BUFFER_LEN.min(end - start) as usize, alignment);
        let mut at = start;
        while at < end {
            let count = (end - at).min(ZERO_BUFFER_LEN);
            self.put(at, &zeroes.bytes()[..count as usize])?;
            at += count;
        }
        Ok(())
    }

    /// Zeroes that stay backed by space: one range call, or a hole that is filled with space again, or plain
    /// writes.
    fn zero_allocated(&self, start: u64, end: u64) -> io::Result<()> {
        if self.space.zero(&self.file, start, end)? {
            return Ok(());
        }
        let inside = end.min(self.length());
        let punched = start >= inside || self.space.punch(&self.file, start, inside)?;
        if self.regular && punched && self.space.reserve(&self.file, start, end)? {
            return Ok(());
        }
        self.put_zeroes(start, end)
    }

    /// Zeroes in the existing part of the file, which may become a hole.
    fn zero_unmapped(&self, start: u64, end: u64) -> io::Result<()> {
        if self.space.punch(&self.file, start, end)? || self.space.zero(&self.file, start, end)? {
            return Ok(());
        }
        self.put_zeroes(start, end)
    }

    /// Makes the file at least `len` bytes, the new ones a hole.
    fn grow(&self, len: u64) -> io::Result<()> {
        if self.length() >= len {
            return Ok(());
        }
        let _guard = self.exclusive();
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
                // While the last block is rewritten the file is longer than it says.
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
            // Bytes past the end have no content to keep: writing zeroes reserves their space too.
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
                    StorageErrorKind::Unsupported,
                    format!("resize to {len} bytes: the device has {} and cannot change", self.length()),
                )),
            };
        }
        let _guard = self.exclusive();
        self.file.set_len(len).map_err(|error| call.failed(error))?;
        self.space.forget_data();
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    /// Without a change since the last one this costs no system call. Once it has failed it always fails:
    /// what the page cache has lost does not come back.
    fn flush(&self) -> Result<(), StorageError> {
        let call = Call::new("flush", HostOffset::new(0), self.length());
        let pending = self.dirty.pending().map_err(|code| call.failed(io::Error::from_raw_os_error(code)))?;
        let Some(changes) = pending else {
            return Ok(());
        };
        sys::sync(&self.file).map_err(|error| {
            // Around the page cache nothing is lost by failing: the next try says the truth again.
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

    /// Between two files of this adapter that both use the page cache: around it, the kernel's copy would not
    /// see what the blocks of this program do.
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
        // Of a hole it may make one.
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
        limits.growable = self.regular;
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

    /// A storage with one change that could not be flushed; afterwards its file could be.
    fn after_a_failed_flush(direct: bool) -> FileStorage {
        // A character device takes writes and refuses to sync, and a temporary file takes both.
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let mut storage = FileStorage::from_file(null, true).unwrap();
        storage.write_at(HostOffset::new(0), &[1; 512]).unwrap();
        let block = crate::direct::Alignment { block: 512, memory: 512 };
        storage.direct = direct.then(|| DirectIo::new(block));
        storage.flush().unwrap_err();
        storage.file = tempfile::tempfile().unwrap();
        storage
    }

    /// The system tells once that it lost pages of its cache, and takes them for clean then: the next sync
    /// succeeds.
    #[test]
    fn a_flush_after_a_failed_flush_fails_too() {
        let storage = after_a_failed_flush(false);
        for _ in 0..2 {
            storage.flush().unwrap_err();
            storage.write_at(HostOffset::new(0), &[2; 512]).unwrap();
        }
    }

    #[test]
    fn a_failed_flush_around_the_page_cache_is_tried_again() {
        after_a_failed_flush(true).flush().unwrap();
    }
}
