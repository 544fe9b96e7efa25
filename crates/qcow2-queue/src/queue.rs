//! The queue: which way a request goes, and what has come back.

use crate::direct::{Direct, Tried};
use crate::request::{Completion, Request};
use crate::threads::Threads;
use qcow2_core::GuestDisk;
use std::fmt;
use std::io;
use std::sync::Arc;

/// How a queue works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueOptions {
    /// Parts of requests that io_uring has in flight at most, 1 to 4095; what is beyond goes to the threads.
    /// 0: no io_uring.
    pub depth: u32,
    /// Threads for what has to wait, begun when they are needed. 0: none; the queue's own thread does it
    /// then, when it is asked for completions.
    pub threads: usize,
}

impl Default for QueueOptions {
    /// A depth of 128, and 4 threads.
    fn default() -> Self {
        Self { depth: 128, threads: 4 }
    }
}

impl QueueOptions {
    /// With another [`depth`](Self::depth).
    #[must_use]
    pub fn with_depth(self, depth: u32) -> Self {
        Self { depth, ..self }
    }

    /// With other [`threads`](Self::threads).
    #[must_use]
    pub fn with_threads(self, threads: usize) -> Self {
        Self { threads, ..self }
    }
}

/// Requests of one thread to a disk, in flight at the same time. See the [crate](crate).
///
/// The queue holds parts of the image back from changes while requests are in flight. Changes of the whole
/// image (snapshots, resize, close) by other threads wait for those, and new ones wait for the change. The
/// queue's own thread makes no other call to the disk, nor to a second queue on it, while something is in
/// flight: it could wait for what it holds itself.
pub struct Queue<'d> {
    // Dropped in this order: pins and claims go before the threads are waited for, which may wait for them.
    direct: Option<Direct<'d>>,
    threads: Threads,
    /// Completions that were not yet asked for.
    finished: Vec<Completion>,
    in_flight: usize,
}

impl fmt::Debug for Queue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (in_flight, uses_ring) = (self.in_flight, self.uses_ring());
        f.debug_struct("Queue").field("in_flight", &in_flight).field("uses_ring", &uses_ring).finish()
    }
}

impl<'d> Queue<'d> {
    /// A queue of requests to `disk`. Where the system refuses io_uring, or the disk is not one whose bytes
    /// lie in a file (see [`uses_ring`](Self::uses_ring)), all goes to the threads.
    pub fn new(disk: &'d Arc<dyn GuestDisk>, options: &QueueOptions) -> Self {
        let direct = Direct::new(&**disk, options.depth);
        let wake = direct.as_ref().map(Direct::waker);
        let threads = Threads::new(Arc::clone(disk), options.threads, wake);
        Self { direct, threads, finished: Vec::new(), in_flight: 0 }
    }

    /// True if requests can go by io_uring: on Linux, for a raw disk in a file, and for a qcow2 image that is
    /// not encrypted and whose data is in one. Not for a disk whose layers can be exchanged.
    pub fn uses_ring(&self) -> bool {
        self.direct.is_some()
    }

    /// Requests whose completions were not yet delivered.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Takes a request. `token`: a number of the caller's, which its completion has. Does not wait. What goes
    /// by io_uring is handed to the system with the next [`poll`](Self::poll) or [`wait`](Self::wait).
    pub fn submit(&mut self, token: u64, request: Request) {
        self.in_flight += 1;
        let tried = match &mut self.direct {
            Some(direct) => direct.start(token, request),
            None => Tried::No(request),
        };
        match tried {
            Tried::Started => {}
            Tried::Done(completion) => self.finished.push(completion),
            Tried::No(request) => self.threads.add(token, request),
        }
    }

    /// Gives back a request that has not begun. Others go on: what a completion tells of is done.
    pub fn cancel(&mut self, token: u64) -> Option<Request> {
        let request = self.threads.cancel(token)?;
        self.in_flight -= 1;
        Some(request)
    }

    /// Calls `each` with every request that has finished, in no order; returns how many there were. Does not
    /// wait, unless there are no threads: then it does what they would have done. Errors: of the system, of
    /// io_uring itself; the requests stay in flight.
    pub fn poll(&mut self, each: impl FnMut(Completion)) -> io::Result<usize> {
        let mut result = Ok(());
        if let Some(direct) = &mut self.direct {
            result = direct.submit();
            direct.poll(&mut self.finished);
            // This thread would wait for what it holds itself.
            while self.threads.are_missed() && direct.in_flight() > 0 && result.is_ok() {
                result = direct.wait();
                direct.poll(&mut self.finished);
            }
        }
        if result.is_ok() {
            self.threads.take(&mut self.finished, false);
        }
        self.deliver(result, each)
    }

    /// The same, and waits until there is one, if any is in flight.
    pub fn wait(&mut self, mut each: impl FnMut(Completion)) -> io::Result<usize> {
        loop {
            let count = self.poll(&mut each)?;
            if count > 0 || self.in_flight == 0 {
                return Ok(count);
            }
            match &mut self.direct {
                Some(direct) if direct.in_flight() > 0 => {
                    // Whatever finishes from here on wakes the ring.
                    self.threads.take(&mut self.finished, true);
                    if self.finished.is_empty() {
                        direct.wait()?;
                    }
                }
                _ => self.threads.wait(&mut self.finished),
            }
        }
    }

    fn deliver(&mut self, result: io::Result<()>, each: impl FnMut(Completion)) -> io::Result<usize> {
        let count = self.finished.len();
        self.in_flight -= count;
        self.finished.drain(..).for_each(each);
        result.map(|()| count)
    }
}
