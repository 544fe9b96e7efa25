//! A pipeline over pieces of work: claimed in order, prepared by all workers in parallel, finished in claim
//! order or in any order.
//!
//! Pieces live in at most [`SLOTS_PER_WORKER`] slots per worker. That bounds the memory, and the distance
//! between the fastest worker and the slowest piece. No worker waits for its turn to finish: it queues its
//! prepared piece for whoever finishes the piece before it, and claims the next one.

use crate::error::Result;
use crate::executor::Executor;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Pieces in flight per worker.
pub(crate) const SLOTS_PER_WORKER: usize = 2;

/// The order in which pieces are finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// One at a time, in claim order: the result does not depend on the number of workers.
    Claimed,
    /// In any order, several in parallel.
    Any,
}

/// The three stages of a piece.
pub(crate) trait Stages: Sync {
    /// The state of claiming, for example an offset.
    type Cursor: Send;
    /// A piece with its buffers, reused for later pieces.
    type Slot: Send;

    /// Creates an empty slot.
    fn slot(&self) -> Self::Slot;

    /// Puts the next piece into `slot`. Returns `false` if there is none left. Called by one worker at a
    /// time.
    fn claim(&self, cursor: &mut Self::Cursor, slot: &mut Self::Slot) -> Result<bool>;

    /// The expensive stage; runs on all workers in parallel.
    fn prepare(&self, slot: &mut Self::Slot) -> Result<()>;

    /// The last stage. `Break` ends the whole run early, successfully.
    fn finish(&self, slot: &mut Self::Slot) -> Result<ControlFlow<()>>;
}

/// Runs all pieces from `cursor` on. With [`Order::Claimed`], the error or `Break` of the earliest piece
/// wins, and every piece before it has been finished.
pub(crate) fn run<S: Stages>(
    stages: &S,
    cursor: S::Cursor,
    order: Order,
    executor: &dyn Executor,
) -> Result<()> {
    let pipeline = Pipeline {
        stages,
        order,
        limit: executor.workers().max(1) * SLOTS_PER_WORKER,
        claims: Mutex::new(Claims { cursor: Some(cursor), next: 0 }),
        queue: Mutex::new(Queue {
            made: 0,
            free: Vec::new(),
            ready: VecDeque::new(),
            next: 0,
            finishing: false,
            over: false,
            outcome: Ok(()),
        }),
        changed: Condvar::new(),
    };
    executor.run(&|_| pipeline.work());
    pipeline.queue.into_inner().unwrap_or_else(PoisonError::into_inner).outcome
}

// Lock order: `claims` and `queue` are never held together, and neither is held while a piece is prepared or
// finished.
struct Pipeline<'a, S: Stages> {
    stages: &'a S,
    order: Order,
    limit: usize,
    claims: Mutex<Claims<S::Cursor>>,
    queue: Mutex<Queue<S::Slot>>,
    changed: Condvar,
}

struct Claims<C> {
    /// `None` once there is nothing left to claim.
    cursor: Option<C>,
    next: u64,
}

struct Queue<T> {
    made: usize,
    free: Vec<T>,
    /// Prepared pieces from number `next` on; `None` for one that is still being prepared.
    ready: VecDeque<Option<(T, Result<()>)>>,
    next: u64,
    finishing: bool,
    over: bool,
    outcome: Result<()>,
}

impl<S: Stages> Pipeline<'_, S> {
    fn work(&self) {
        let guard = EndOnPanic { pipeline: self };
        while let Some(mut slot) = self.take_slot() {
            let Some((number, claimed)) = self.claim(&mut slot) else {
                self.give_back(slot);
                break;
            };
            let prepared = claimed.and_then(|()| self.stages.prepare(&mut slot));
            match self.order {
                Order::Claimed => self.leave(number, slot, prepared),
                Order::Any => {
                    let flow = prepared.and_then(|()| self.stages.finish(&mut slot));
                    self.settle(&mut self.queue(), slot, flow);
                }
            }
        }
        // Not dropped: the guard is for panics only.
        std::mem::forget(guard);
    }

    /// A free slot, waiting for one if necessary. `None` once the run is over.
    fn take_slot(&self) -> Option<S::Slot> {
        let mut queue = self.queue();
        loop {
            if queue.over {
                return None;
            }
            if let Some(slot) = queue.free.pop() {
                return Some(slot);
            }
            if queue.made < self.limit {
                queue.made += 1;
                return Some(self.stages.slot());
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn give_back(&self, slot: S::Slot) {
        self.queue().free.push(slot);
        self.changed.notify_one();
    }

    fn claim(&self, slot: &mut S::Slot) -> Option<(u64, Result<()>)> {
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let claimed = match self.stages.claim(claims.cursor.as_mut()?, slot) {
            Ok(true) => Ok(()),
            Ok(false) => {
                claims.cursor = None;
                return None;
            }
            // An error is numbered like a piece and finished in its turn, so that the earliest error wins.
            Err(error) => {
                claims.cursor = None;
                Err(error)
            }
        };
        let number = claims.next;
        claims.next += 1;
        Some((number, claimed))
    }

    /// Queues a prepared piece, and finishes all pieces that are due unless another worker is already doing
    /// that.
    fn leave(&self, number: u64, slot: S::Slot, prepared: Result<()>) {
        let mut queue = self.queue();
        let index = (number - queue.next) as usize;
        if queue.ready.len() <= index {
            queue.ready.resize_with(index + 1, || None);
        }
        queue.ready[index] = Some((slot, prepared));
        // The worker that is finishing looks at the queue again after each piece, and will find this one.
        if queue.finishing {
            return;
        }
        queue.finishing = true;
        while let Some(Some((mut slot, prepared))) = next_ready(&mut queue) {
            drop(queue);
            let flow = prepared.and_then(|()| self.stages.finish(&mut slot));
            queue = self.queue();
            self.settle(&mut queue, slot, flow);
        }
        queue.finishing = false;
    }

    fn settle(&self, queue: &mut Queue<S::Slot>, slot: S::Slot, flow: Result<ControlFlow<()>>) {
        queue.free.push(slot);
        match flow {
            Ok(ControlFlow::Continue(())) => self.changed.notify_one(),
            Ok(ControlFlow::Break(())) => self.end(queue, Ok(())),
            Err(error) => self.end(queue, Err(error)),
        }
    }

    /// Ends the run; only the first outcome is kept.
    fn end(&self, queue: &mut Queue<S::Slot>, outcome: Result<()>) {
        if !queue.over {
            queue.over = true;
            queue.outcome = outcome;
        }
        self.changed.notify_all();
    }

    fn queue(&self) -> MutexGuard<'_, Queue<S::Slot>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the next piece in order, if it is prepared and the run is not over.
fn next_ready<T>(queue: &mut Queue<T>) -> Option<Option<(T, Result<()>)>> {
    if queue.over || !matches!(queue.ready.front(), Some(Some(_))) {
        return None;
    }
    queue.next += 1;
    queue.ready.pop_front()
}

/// Ends the run when a worker panics: its slot and its piece are lost, and the others would wait for them.
struct EndOnPanic<'p, 'a, S: Stages> {
    pipeline: &'p Pipeline<'a, S>,
}

impl<S: Stages> Drop for EndOnPanic<'_, '_, S> {
    fn drop(&mut self) {
        self.pipeline.end(&mut self.pipeline.queue(), Ok(()));
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests bring real threads")]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::executor::Inline;
    use crate::testing::Threads;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    /// Counts to `count`. Preparing piece `n` takes a time that depends on `n`.
    struct Counting {
        count: u64,
        stop: Option<u64>,
        fail: Vec<u64>,
        done: Mutex<Vec<u64>>,
        alive: AtomicUsize,
        most_alive: AtomicUsize,
    }

    impl Counting {
        fn new(count: u64) -> Self {
            Self {
                count,
                stop: None,
                fail: Vec::new(),
                done: Mutex::default(),
                alive: AtomicUsize::new(0),
                most_alive: AtomicUsize::new(0),
            }
        }
    }

    impl Stages for Counting {
        type Cursor = u64;
        type Slot = u64;

        fn slot(&self) -> u64 {
            let alive = self.alive.fetch_add(1, Ordering::SeqCst) + 1;
            self.most_alive.fetch_max(alive, Ordering::SeqCst);
            0
        }

        fn claim(&self, cursor: &mut u64, slot: &mut u64) -> Result<bool> {
            *slot = *cursor;
            *cursor += 1;
            Ok(*slot < self.count)
        }

        fn prepare(&self, slot: &mut u64) -> Result<()> {
            std::thread::sleep(Duration::from_micros(*slot * 7919 % 300));
            if self.fail.contains(slot) {
                return Err(Error::new(ErrorKind::Read, format!("piece {slot}")));
            }
            Ok(())
        }

        fn finish(&self, slot: &mut u64) -> Result<ControlFlow<()>> {
            self.done.lock().unwrap().push(*slot);
            Ok(if self.stop == Some(*slot) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        }
    }

    #[test]
    fn finishes_in_order_with_bounded_slots() {
        for workers in [1, 2, 7] {
            let work = Counting::new(500);
            run(&work, 0, Order::Claimed, &Threads(workers)).unwrap();
            assert_eq!(*work.done.lock().unwrap(), (0..500).collect::<Vec<_>>());
            assert!(work.most_alive.load(Ordering::SeqCst) <= workers * SLOTS_PER_WORKER);
        }
    }

    #[test]
    fn any_order_finishes_everything() {
        let work = Counting::new(500);
        run(&work, 0, Order::Any, &Threads(5)).unwrap();
        let mut done = work.done.into_inner().unwrap();
        done.sort_unstable();
        assert_eq!(done, (0..500).collect::<Vec<_>>());
    }

    #[test]
    fn workers_may_run_sequentially() {
        struct InTurn;
        impl Executor for InTurn {
            fn workers(&self) -> usize {
                3
            }
            fn run(&self, job: &(dyn Fn(usize) + Sync)) {
                (0..3).for_each(job);
            }
        }
        let work = Counting::new(40);
        run(&work, 0, Order::Claimed, &InTurn).unwrap();
        assert_eq!(work.done.lock().unwrap().len(), 40);
    }

    #[test]
    fn earliest_error_wins_and_all_pieces_before_it_finish() {
        for workers in [1, 4] {
            let work = Counting { fail: vec![90, 60, 61], ..Counting::new(500) };
            let error = run(&work, 0, Order::Claimed, &Threads(workers)).unwrap_err();
            assert_eq!(error.to_string(), "piece 60");
            assert_eq!(*work.done.lock().unwrap(), (0..60).collect::<Vec<_>>());
        }
        let work = Counting { fail: vec![90], ..Counting::new(500) };
        assert!(run(&work, 0, Order::Any, &Threads(4)).is_err());
    }

    #[test]
    fn break_ends_the_run_successfully() {
        let work = Counting { stop: Some(33), fail: vec![34], ..Counting::new(500) };
        run(&work, 0, Order::Claimed, &Threads(4)).unwrap();
        assert_eq!(*work.done.lock().unwrap(), (0..34).collect::<Vec<_>>());
        run(&Counting::new(0), 0, Order::Claimed, &Inline).unwrap();
    }

    #[test]
    fn panic_of_one_worker_ends_the_others() {
        struct Panics;
        impl Stages for Panics {
            type Cursor = u64;
            type Slot = u64;
            fn slot(&self) -> u64 {
                0
            }
            fn claim(&self, cursor: &mut u64, slot: &mut u64) -> Result<bool> {
                *slot = *cursor;
                *cursor += 1;
                Ok(true)
            }
            fn prepare(&self, slot: &mut u64) -> Result<()> {
                assert!(*slot != 20, "expected panic of this test");
                Ok(())
            }
            fn finish(&self, _: &mut u64) -> Result<ControlFlow<()>> {
                Ok(ControlFlow::Continue(()))
            }
        }
        let caught = std::panic::catch_unwind(|| run(&Panics, 0, Order::Claimed, &Threads(4)));
        assert!(caught.is_err());
    }
}
