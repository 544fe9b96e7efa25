//! The threads that do what has to wait.

use crate::request::{Completion, Request};
use qcow2_core::{Error, ErrorKind, GuestDisk};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// Called from a thread when there is a completion and the queue's owner may be asleep elsewhere.
pub(crate) type Wake = Box<dyn Fn() + Send + Sync>;

/// Threads with one list of requests. They begin with the first request. Dropping this waits for what has
/// begun.
pub(crate) struct Threads {
    disk: Arc<dyn GuestDisk>,
    shared: Arc<Shared>,
    most: usize,
    running: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// There is a request, or it is the end.
    work: Condvar,
    /// There is a completion.
    done: Condvar,
    wake: Option<Wake>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(u64, Request)>,
    finished: Vec<Completion>,
    /// Threads that wait for a request.
    idle: usize,
    /// The owner waits in a way that needs `wake`.
    asleep: bool,
    end: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Threads {
    /// At most `most` threads, at least 1. `wake`: what ends a wait that is not [`wait`](Self::wait).
    pub(crate) fn new(disk: Arc<dyn GuestDisk>, most: usize, wake: Option<Wake>) -> Self {
        let (state, work, done) = (Mutex::default(), Condvar::new(), Condvar::new());
        Self { disk, shared: Arc::new(Shared { state, work, done, wake }), most, running: Vec::new() }
    }

    /// Puts a request at the end of the list.
    pub(crate) fn add(&mut self, token: u64, request: Request) {
        let mut state = self.shared.state();
        state.waiting.push_back((token, request));
        let too_few = state.idle < state.waiting.len();
        drop(state);
        if too_few && self.running.len() < self.most && self.start() {
            return;
        }
        self.shared.work.notify_one();
    }

    /// Starts a thread. Without one the owner does what is in the list, see [`take`](Self::take).
    fn start(&mut self) -> bool {
        let (shared, disk) = (Arc::clone(&self.shared), Arc::clone(&self.disk));
        let name = format!("queue {}", self.running.len());
        let started = thread::Builder::new().name(name).spawn(move || serve(&shared, &*disk));
        started.map(|thread| self.running.push(thread)).is_ok()
    }

    /// Takes a request out that has not begun.
    pub(crate) fn cancel(&self, token: u64) -> Option<Request> {
        let mut state = self.shared.state();
        let at = state.waiting.iter().position(|(other, _)| *other == token)?;
        state.waiting.remove(at).map(|(_, request)| request)
    }

    /// True if requests wait and there is no thread to do them, so that [`take`](Self::take) would.
    pub(crate) fn are_missed(&self) -> bool {
        self.running.is_empty() && !self.shared.state().waiting.is_empty()
    }

    /// Moves what has finished to `to`. `asleep`: whether the owner is about to wait elsewhere; nothing may
    /// have been moved for that.
    pub(crate) fn take(&self, to: &mut Vec<Completion>, asleep: bool) {
        let mut state = self.shared.state();
        if self.running.is_empty() {
            drop(state);
            let next = || self.shared.state().waiting.pop_front();
            while let Some((token, request)) = next() {
                to.push(request.run(token, &*self.disk));
            }
            return;
        }
        state.asleep = asleep && state.finished.is_empty();
        to.append(&mut state.finished);
    }

    /// The same; waits until there is one.
    pub(crate) fn wait(&self, to: &mut Vec<Completion>) {
        if self.running.is_empty() {
            return self.take(to, false);
        }
        let mut state = self.shared.state();
        while state.finished.is_empty() {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        to.append(&mut state.finished);
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.waiting.clear();
        state.end = true;
        drop(state);
        self.shared.work.notify_all();
        for thread in self.running.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn serve(shared: &Shared, disk: &dyn GuestDisk) {
    let mut state = shared.state();
    loop {
        if state.end {
            return;
        }
        let Some((token, request)) = state.waiting.pop_front() else {
            state.idle += 1;
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
            continue;
        };
        drop(state);
        // Whoever waits for it is told, whatever a disk of somebody else's does.
        let run = AssertUnwindSafe(|| request.run(token, disk));
        let completion = catch_unwind(run).unwrap_or_else(|_| {
            let error = Error::new(ErrorKind::Storage, "the request panicked");
            Completion { token, buffer: None, result: Err(error) }
        });
        state = shared.state();
        state.finished.push(completion);
        let asleep = std::mem::take(&mut state.asleep);
        shared.done.notify_one();
        if let Some(wake) = shared.wake.as_ref().filter(|_| asleep) {
            wake();
        }
    }
}
