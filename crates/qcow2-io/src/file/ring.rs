//! Requests to files that finish later.

use super::{ChangeGuard, ChangeLock, FileStorage};
use crate::buffer::IoBuffer;
use crate::error::{Call, MAX_LEN};
use crate::sys::uring::{Direction, Part, Transfers};
use qcow2_core::{HostOffset, StorageError};
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, TryLockError};

/// Bytes of a buffer, and the offset in the file at which they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePart {
    /// The bytes of the buffer.
    pub bytes: Range<usize>,
    /// Where the first of them is in the file.
    pub offset: HostOffset,
}

/// A request that has finished.
#[derive(Debug)]
pub struct Transfer<P> {
    /// What came with the request.
    pub payload: P,
    /// Its buffer: of a read that went well with all parts filled, as far as the file goes, and zeroes past
    /// its end.
    pub buffer: IoBuffer,
    /// How it went. After an error any part may have been moved.
    pub result: Result<(), StorageError>,
}

/// Reads and writes of files that are started and finish later, on io_uring. For one thread: what it starts
/// is handed to the system with the next [`submit`](Self::submit) or [`wait`](Self::wait), all in one system
/// call. In any order: whoever needs one before the other starts that one when the first has finished.
///
/// Dropping it waits for what is in flight.
pub struct FileRing<'f, P> {
    transfers: Transfers<'f, Kept<'f, P>>,
}

struct Kept<'f, P> {
    payload: P,
    call: Call,
    _guard: Option<ChangeGuard<'f>>,
}

/// Ends a wait of another thread, see [`FileRing::wait`].
#[derive(Clone, Debug)]
pub struct RingWaker(Arc<OwnedFd>);

impl RingWaker {
    /// Lets the present wait return, or the next one.
    pub fn wake(&self) {
        // Any number will do. It fails where it was called in vain so often that the sum is full.
        let _ = rustix::io::write(&*self.0, &1_u64.to_le_bytes());
    }
}

impl<P> fmt::Debug for FileRing<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileRing").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}

impl<'f, P> FileRing<'f, P> {
    /// A ring for `depth` parts in flight, 1 to 4095. Errors: of the system, which may refuse (a kernel
    /// before 5.6, a container that allows no io_uring); `InvalidInput` for another depth.
    pub fn new(depth: u32) -> io::Result<Self> {
        if depth == 0 || depth > 4095 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self { transfers: Transfers::new(depth)? })
    }

    /// For other threads: ends a wait.
    pub fn waker(&self) -> RingWaker {
        RingWaker(Arc::clone(self.transfers.waker()))
    }

    /// Requests in flight, those included that have finished and were not yet [polled](Self::poll).
    pub fn in_flight(&self) -> usize {
        self.transfers.in_flight()
    }

    /// Starts to read `parts` of `buffer` from `file`. `Err` with what was given if it cannot be done here
    /// and now: no room, or not aligned as direct I/O needs it. No part may be empty, nor may two overlap.
    ///
    /// # Panics
    ///
    /// If `parts` is empty or a part is, or is not in the buffer.
    pub fn read(
        &mut self,
        payload: P,
        file: &'f FileStorage,
        buffer: IoBuffer,
        parts: &[FilePart],
    ) -> Result<(), (P, IoBuffer)> {
        if !self.transfers.has_room(parts.len()) || !parts.iter().all(|part| file.suits(&buffer, part)) {
            return Err((payload, buffer));
        }
        let len = parts.iter().map(|part| part.bytes.len() as u64).sum();
        let call = Call::new("read", parts[0].offset, len);
        let block = file.direct.as_ref().map_or(1, |direct| direct.block());
        self.start(Direction::Read { block }, file, buffer, parts, Kept { payload, call, _guard: None });
        Ok(())
    }

    /// Starts to write `part` of `buffer` to `file`; durable after a flush that starts when it has finished.
    /// `Err` with what was given if it cannot be done here and now: as [`read`](Self::read); the part ends
    /// past the end of the file; the file is for reading; its length is being changed.
    ///
    /// # Panics
    ///
    /// If the part is empty or not in the buffer.
    pub fn write(
        &mut self,
        payload: P,
        file: &'f FileStorage,
        buffer: IoBuffer,
        part: &FilePart,
    ) -> Result<(), (P, IoBuffer)> {
        let len = part.bytes.len() as u64;
        // First: with it the length stays what it is.
        let Some(guard) = file.try_guard() else { return Err((payload, buffer)) };
        let inside = part.offset.checked_add(len).is_some_and(|end| end.value() <= file.length());
        if !inside || !file.writable || !self.transfers.has_room(1) || !file.suits(&buffer, part) {
            return Err((payload, buffer));
        }
        let kept = Kept { payload, call: Call::new("write", part.offset, len), _guard: Some(guard) };
        self.start(Direction::Write, file, buffer, std::slice::from_ref(part), kept);
        Ok(())
    }

    fn start(
        &mut self,
        direction: Direction,
        file: &'f FileStorage,
        buffer: IoBuffer,
        parts: &[FilePart],
        kept: Kept<'f, P>,
    ) {
        let parts = parts.iter().map(|part| Part { bytes: part.bytes.clone(), offset: part.offset.value() });
        self.transfers.start(direction, &file.file, buffer, parts, kept);
    }

    /// Hands what was started to the system, and does not wait. Errors: of the system.
    pub fn submit(&mut self) -> io::Result<()> {
        self.transfers.submit()
    }

    /// The same, and waits until something has finished or the waker was called. Errors: of the system.
    pub fn wait(&mut self) -> io::Result<()> {
        self.transfers.wait()
    }

    /// Calls `each` with every request that has finished, and does not wait.
    pub fn poll(&mut self, mut each: impl FnMut(Transfer<P>)) {
        self.transfers.reap(|(kept, buffer, result)| {
            let Kept { payload, call, .. } = kept;
            each(Transfer { payload, buffer, result: result.map_err(|error| call.failed(error)) });
        });
    }
}

impl FileStorage {
    /// Whether the system takes `part` of `buffer` as it is.
    fn suits(&self, buffer: &IoBuffer, part: &FilePart) -> bool {
        let start = part.offset.value();
        let ends = start.checked_add(part.bytes.len() as u64).is_some_and(|end| end <= MAX_LEN);
        let Some(bytes) = buffer.get(part.bytes.clone()).filter(|_| ends) else { return ends };
        self.direct.as_ref().is_none_or(|direct| {
            // A part that ends past the end of the file may have bytes of a block that is being written.
            let inside = start + bytes.len() as u64 <= self.length();
            inside && direct.is_whole_blocks(start, bytes.len()) && direct.is_aligned(bytes)
        })
    }

    /// Locks for a change inside the file, of whole blocks; `None` if the length is being changed.
    fn try_guard(&self) -> Option<ChangeGuard<'_>> {
        let lock = match self.changes.try_read() {
            Ok(lock) => lock,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(ChangeGuard { _lock: ChangeLock::Shared(lock), dirty: &self.dirty })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OpenFile;
    use qcow2_core::{Storage, StorageErrorKind};
    use std::path::PathBuf;

    fn ring<'f>(depth: u32) -> Option<FileRing<'f, u32>> {
        let ring = FileRing::new(depth);
        if let Err(error) = &ring {
            println!("skipped: no io_uring: {error}");
        }
        ring.ok()
    }

    fn file(folder: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
        let path = folder.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn part(bytes: Range<usize>, offset: u64) -> FilePart {
        FilePart { bytes, offset: HostOffset::new(offset) }
    }

    fn all(ring: &mut FileRing<'_, u32>) -> Vec<Transfer<u32>> {
        let mut done = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait().unwrap();
            ring.poll(|transfer| done.push(transfer));
        }
        done.sort_by_key(|transfer| transfer.payload);
        done
    }

    #[test]
    fn parts_are_filled_and_the_file_ends_in_zeroes() {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..10_000).map(|i| (i % 251) as u8).collect();
        let file = OpenFile::read_only().open_file(&file(&folder, &bytes)).unwrap();
        let Some(mut ring) = ring(4) else { return };
        let parts = [part(0..100, 9_950), part(200..300, 20_000), part(100..200, 50)];
        ring.read(7, &file, IoBuffer::from(vec![1; 301]), &parts).unwrap();
        let done = all(&mut ring).pop().unwrap();
        done.result.unwrap();
        let wanted = [&bytes[9_950..], &[0; 50], &bytes[50..150], &[0; 100], &[1]].concat();
        assert_eq!((done.payload, &done.buffer[..]), (7, &wanted[..]));
    }

    #[test]
    fn what_finds_no_room_or_does_not_fit_is_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, &[5; 8192]);
        let writable = OpenFile::writable().open_file(&path).unwrap();
        let other = FileStorage::from_file(std::fs::File::open(&path).unwrap(), false).unwrap();
        let Some(mut ring) = ring(2) else { return };
        let buffer = || IoBuffer::zeroed(4096);
        let refused = |result: Result<(), (u32, IoBuffer)>| {
            assert!(result.is_err_and(|(payload, buffer)| payload == 9 && buffer.len() == 4096));
        };
        let three = [part(0..1, 0), part(1..2, 0), part(2..3, 0)];
        refused(ring.read(9, &writable, buffer(), &three));
        refused(ring.write(9, &writable, buffer(), &part(0..4096, 4097)));
        refused(ring.write(9, &writable, buffer(), &part(0..4096, u64::MAX)));
        refused(ring.read(9, &writable, buffer(), &[part(0..4096, u64::MAX)]));
        refused(ring.write(9, &other, buffer(), &part(0..4096, 0)));
        let guard = writable.exclusive();
        refused(ring.write(9, &writable, buffer(), &part(0..4096, 0)));
        drop(guard);
        ring.write(1, &writable, buffer(), &part(0..4096, 0)).unwrap();
        ring.read(2, &writable, buffer(), &[part(0..4096, 4096)]).unwrap();
        refused(ring.read(9, &writable, buffer(), &[part(0..4096, 0)]));
        let done = all(&mut ring);
        assert!(done.iter().all(|transfer| transfer.result.is_ok()));
        assert!(done[1].buffer[..] == [5; 4096]);
        assert!(std::fs::read(&path).unwrap() == [[0; 4096], [5; 4096]].concat());
    }

    /// A flush costs a system call only after a change, and one of these is a change.
    #[test]
    fn a_write_is_flushed_once_it_has_finished() {
        let folder = tempfile::tempdir().unwrap();
        let file = OpenFile::writable().open_file(&file(&folder, &[5; 8192])).unwrap();
        let Some(mut ring) = ring(2) else { return };
        ring.write(1, &file, IoBuffer::zeroed(512), &part(0..512, 0)).unwrap();
        assert_eq!(file.dirty.pending(), Ok(None));
        assert!(file.changes.try_write().is_err(), "its length could change below the write");
        all(&mut ring);
        assert_eq!(file.dirty.pending(), Ok(Some(1)));
        file.flush().unwrap();
        assert_eq!(file.dirty.pending(), Ok(None));
    }

    #[test]
    fn the_systems_errors_name_the_call() {
        let folder = tempfile::tempdir().unwrap();
        // A folder can be opened and not read.
        let opened = std::fs::File::open(folder.path()).unwrap();
        let file = FileStorage::from_file(opened, false).unwrap();
        let Some(mut ring) = ring(2) else { return };
        ring.read(1, &file, IoBuffer::zeroed(512), &[part(0..512, 0)]).unwrap();
        let error = all(&mut ring).pop().unwrap().result.unwrap_err();
        assert_eq!((error.kind(), error.os_code()), (StorageErrorKind::Io, Some(libc::EISDIR)));
        assert_eq!(error.to_string(), "read of 512 bytes at 0x0 failed");
    }

    /// What is in flight beside it is accounted for, and nobody waits for it in vain.
    #[test]
    fn a_panic_of_the_caller_holds_nothing_up() {
        let folder = tempfile::tempdir().unwrap();
        let file = OpenFile::writable().open_file(&file(&folder, &[5; 8192])).unwrap();
        let Some(mut ring) = ring(8) else { return };
        for n in 0..8 {
            ring.read(n, &file, IoBuffer::zeroed(512), &[part(0..512, 0)]).unwrap();
        }
        ring.wait().unwrap();
        let poll = std::panic::AssertUnwindSafe(|| ring.poll(|_| panic!("of the caller")));
        std::panic::catch_unwind(poll).unwrap_err();
        assert_eq!(all(&mut ring).len(), 7);
    }

    #[test]
    fn a_waker_ends_a_wait_and_a_dropped_ring_waits() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder, &[5; 1 << 20]);
        let file = OpenFile::writable().open_file(&path).unwrap();
        let Some(mut ring) = ring(64) else { return };
        for _ in 0..3 {
            let waker = ring.waker();
            std::thread::spawn(move || waker.wake());
            ring.wait().unwrap();
            ring.poll(|_| panic!("nothing was started"));
        }
        for n in 0..64 {
            ring.write(n, &file, IoBuffer::zeroed(16_384), &part(0..16_384, u64::from(n) * 16_384)).unwrap();
        }
        drop(ring);
        assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    }
}
