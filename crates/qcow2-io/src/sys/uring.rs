//! Reads and writes that are started and finish later, by io_uring.
//!
//! The system uses a buffer until the request has finished. So the buffers belong to [`Transfers`] until
//! then, and it is not dropped before: that is what every `unsafe` block here relies on.

use crate::buffer::IoBuffer;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// The mark of the request that looks out for a call of the waker.
const WAKE: u64 = u64::MAX;

/// Bytes of a buffer, and where in a file they are.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) bytes: Range<usize>,
    pub(crate) offset: u64,
}

/// Which way the bytes go. For a read: the block that the file is read in, of which a part is read only where
/// the file ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Read { block: usize },
    Write,
}

/// A request that has finished: what came with it, its buffer, and how it went.
pub(crate) type Finished<P> = (P, IoBuffer, io::Result<()>);

/// Requests in flight, and the ring that they are in. `P` comes with a request and goes with its end.
pub(crate) struct Transfers<'f, P> {
    ring: IoUring,
    slots: Vec<Slot<'f, P>>,
    free: Vec<usize>,
    /// Parts in the ring, and how many there may be: never more than it has entries for.
    parts: usize,
    most: usize,
    /// Marks and results that were taken from the ring.
    taken: Vec<(u64, i32)>,
    /// Requests that have finished and were not yet handed out.
    ended: Vec<Finished<P>>,
    waker: Arc<OwnedFd>,
}

struct Slot<'f, P> {
    busy: Option<Busy<'f, P>>,
    // Kept from request to request.
    parts: Vec<Part>,
}

struct Busy<'f, P> {
    file: &'f File,
    direction: Direction,
    buffer: IoBuffer,
    /// The first byte of `buffer`, which is not looked at before the end.
    start: *mut u8,
    left: usize,
    error: Option<io::Error>,
    payload: P,
}

impl<'f, P> Transfers<'f, P> {
    /// Room for `most` parts. Errors: of the system; `Unsupported` if it has a ring that cannot do this.
    pub(crate) fn new(most: u32) -> io::Result<Self> {
        // One more for the waker.
        let ring = IoUring::new((most + 1).next_power_of_two())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::PollAdd::CODE];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let waker = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (slots, free, taken, ended) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut made = Self { ring, slots, free, parts: 0, most: most as usize, taken, ended, waker };
        made.look_out();
        Ok(made)
    }

    /// What another thread writes eight bytes to, a 1, to end a wait.
    pub(crate) fn waker(&self) -> &Arc<OwnedFd> {
        &self.waker
    }

    /// Whether `parts` more find room.
    pub(crate) fn has_room(&self, parts: usize) -> bool {
        self.parts + parts <= self.most
    }

    /// Requests in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.ended.len()
    }

    /// Starts a request of at least one part, none of them empty, which have room. It goes to the system with
    /// the next [`submit`](Self::submit) or [`wait`](Self::wait).
    pub(crate) fn start(
        &mut self,
        direction: Direction,
        file: &'f File,
        mut buffer: IoBuffer,
        parts: impl Iterator<Item = Part>,
        payload: P,
    ) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { busy: None, parts: Vec::new() });
            self.slots.len() - 1
        });
        let kept = &mut self.slots[slot];
        kept.parts.clear();
        kept.parts.extend(parts);
        let left = kept.parts.len();
        let inside = |part: &Part| part.bytes.start < part.bytes.end && part.bytes.end <= buffer.len();
        assert!(left > 0 && kept.parts.iter().all(inside), "parts of a buffer that are not in it");
        assert!(self.parts + left <= self.most, "more parts than there is room for");
        let start = buffer.as_mut_ptr();
        kept.busy = Some(Busy { file, direction, buffer, start, left, error: None, payload });
        self.parts += left;
        for part in 0..left {
            self.push(slot, part);
        }
    }

    /// Hands what was started to the system.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(drop),
            }
        }
    }

    /// The same, and waits until a request has finished in part or the waker was called.
    pub(crate) fn wait(&mut self) -> io::Result<()> {
        if !self.taken.is_empty() || !self.ended.is_empty() {
            return self.submit();
        }
        loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(drop),
            }
        }
    }

    /// Calls `each` with every request that has finished. Never waits.
    pub(crate) fn reap(&mut self, mut each: impl FnMut(Finished<P>)) {
        // All are accounted for before a foreign call, which may panic.
        self.account();
        while let Some(finished) = self.ended.pop() {
            each(finished);
        }
    }

    fn account(&mut self) {
        let mut taken = std::mem::take(&mut self.taken);
        taken.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
        for (mark, moved) in taken.drain(..) {
            if mark == WAKE {
                self.woken();
                continue;
            }
            let (slot, part) = ((mark >> 32) as usize, mark as u32 as usize);
            match self.moved(slot, part, moved) {
                Ok(false) => self.push(slot, part),
                Ok(true) => self.part_done(slot, None),
                Err(error) => self.part_done(slot, Some(error)),
            }
            let finished = self.finished(slot);
            self.ended.extend(finished);
        }
        taken.append(&mut self.taken);
        self.taken = taken;
    }

    fn push(&mut self, slot: usize, part: usize) {
        let kept = &self.slots[slot];
        let (Some(busy), Some(piece)) = (&kept.busy, kept.parts.get(part)) else { return };
        let (fd, start) = (types::Fd(busy.file.as_raw_fd()), busy.start.wrapping_add(piece.bytes.start));
        // The rest of what is longer is moved when this has been.
        let len = piece.bytes.len().min(1 << 30) as u32;
        let entry = match busy.direction {
            Direction::Read { .. } => opcode::Read::new(fd, start, len).offset(piece.offset).build(),
            Direction::Write => opcode::Write::new(fd, start, len).offset(piece.offset).build(),
        };
        let mark = (slot as u64) << 32 | part as u64;
        if !self.push_entry(&entry.user_data(mark)) {
            // It ends like one that the system refuses.
            self.taken.push((mark, -libc::EBUSY));
        }
    }

    #[allow(unsafe_code, reason = "what an entry refers to must outlive it")]
    fn push_entry(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: the buffer that an entry of `push` refers to is in its slot until all its parts are done,
        // and the slots outlive the requests, see `drop`; the range lies inside, see `start`, and nothing
        // else refers to it. Its file is borrowed for as long as `self` lives. The entry of `look_out`
        // refers to no memory, and its descriptor is closed after the ring.
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }

    /// Accounts for `moved` bytes of a part, or an error number below zero. Returns true if it is done.
    #[allow(unsafe_code, reason = "zeroes go to a buffer that nothing refers to")]
    fn moved(&mut self, slot: usize, part: usize, moved: i32) -> io::Result<bool> {
        let kept = &mut self.slots[slot];
        let (Some(busy), Some(piece)) = (&kept.busy, kept.parts.get_mut(part)) else { return Ok(true) };
        let Ok(count) = usize::try_from(moved) else {
            let error = io::Error::from_raw_os_error(-moved);
            let again = [io::ErrorKind::Interrupted, io::ErrorKind::WouldBlock].contains(&error.kind());
            return if again { Ok(false) } else { Err(error) };
        };
        piece.bytes.start += count.min(piece.bytes.len());
        piece.offset += count as u64;
        match busy.direction {
            _ if piece.bytes.is_empty() => Ok(true),
            Direction::Write if count == 0 => Err(io::ErrorKind::WriteZero.into()),
            Direction::Read { block } if !count.is_multiple_of(block) || count == 0 => {
                // SAFETY: the range lies inside the buffer, which is in its slot; the system is done with
                // this part of it, and uses no other part of the range.
                unsafe { busy.start.add(piece.bytes.start).write_bytes(0, piece.bytes.len()) };
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn part_done(&mut self, slot: usize, error: Option<io::Error>) {
        self.parts -= 1;
        if let Some(busy) = &mut self.slots[slot].busy {
            busy.left -= 1;
            busy.error = busy.error.take().or(error);
        }
    }

    fn finished(&mut self, slot: usize) -> Option<Finished<P>> {
        let busy = self.slots[slot].busy.take_if(|busy| busy.left == 0)?;
        self.free.push(slot);
        Some((busy.payload, busy.buffer, busy.error.map_or(Ok(()), Err)))
    }

    /// Puts the request into the ring that finishes when the waker is called.
    fn look_out(&mut self) {
        let descriptor = types::Fd(self.waker.as_raw_fd());
        let entry = opcode::PollAdd::new(descriptor, libc::POLLIN as u32).build().user_data(WAKE);
        let looking = self.push_entry(&entry);
        debug_assert!(looking, "no room in the ring for the waker");
    }

    fn woken(&mut self) {
        // How often it was called does not matter.
        let _ = rustix::io::read(&*self.waker, &mut [0; 8]);
        self.look_out();
    }
}

impl<P> Drop for Transfers<'_, P> {
    /// Waits until the system is done with all buffers.
    fn drop(&mut self) {
        while self.parts > 0 {
            let waited = self.wait();
            // What came with a request is dropped after all, with the fields: that may panic too.
            self.account();
            if waited.is_err() && self.parts > 0 {
                // Nobody knows when the system will be done with them, so they stay.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
        }
    }
}
