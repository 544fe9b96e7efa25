//! Work in pieces: claimed in order, prepared on all workers at once, finished in order or as they come.
//!
//! Pieces live in slots, of which there are at most [`SLOTS_PER_WORKER`] for each worker: that bounds the
//! memory, and how far the fastest worker gets ahead of the slowest piece. Nobody waits for a turn: a worker
//! that has prepared a piece leaves it for whoever finishes the one before, and goes on.

use crate::error::Result;
use crate::executor::Executor;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How many pieces are in the making for each worker.
pub(crate) const SLOTS_PER_WORKER: usize = 2;

/// Whether pieces are finished one after the other in the order of their claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// One at a time, in order: what is finished does not depend on the number of workers.
    Claimed,
    /// As they come, several at once.
    Any,
}

/// The three steps of a piece.
pub(crate) trait Stages: Sync {
    /// Where the claims stand.
    type Cursor: Send;
    /// A piece and its buffers, used again for later ones.
    type Slot: Send;

    /// A slot with nothing in it.
    fn slot(&self) -> Self::Slot;

    /// Puts the next piece into `slot`; `false` when there is none left. Called by one worker at a time.
    fn claim(&self, cursor: &mut Self::Cursor, slot: &mut Self::Slot) -> Result<bool>;

    /// The costly part, on all workers at once.
    fn prepare(&self, slot: &mut Self::Slot) -> Result<()>;

    /// The end of a piece. `Break` ends the whole work early, as a success.
    fn finish(&self, slot: &mut Self::Slot) -> Result<ControlFlow<()>>;
}

/// Runs all pieces from `cursor` on. With [`Order::Claimed`], the error or `Break` of the earliest piece
/// counts, and every piece before it has been finished.
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
    /// Prepared pieces from number `next` on; `None` while one is still being prepared.
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
        std::mem::forget(guard);
    }

    /// A free slot, or `None` once all is over.
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
            Err(error) => {
                claims.cursor = None;
                Err(error)
            }
        };
        let number = claims.next;
        claims.next += 1;
        Some((number, claimed))
    }

    /// Leaves a prepared piece for finishing, and finishes what is due unless somebody else does already.
    fn leave(&self, number: u64, slot: S::Slot, prepared: Result<()>) {
        let mut queue = self.queue();
        let index = (number - queue.next) as usize;
        if queue.ready.len() <= index {
            queue.ready.resize_with(index + 1, || None);
        }
        queue.ready[index] = Some((slot, prepared));
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

    /// The first end counts.
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

/// Takes the piece that is due, if it is prepared and nothing ended the work before it.
fn next_ready<T>(queue: &mut Queue<T>) -> Option<Option<(T, Result<()>)>> {
    if queue.over || !matches!(queue.ready.front(), Some(Some(_))) {
        return None;
    }
    queue.next += 1;
    queue.ready.pop_front()
}

/// Lets the others end when a worker panics: its slot and its piece will never come back.
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

    /// Counts to `count`; piece `n` takes a time that depends on `n`.
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
    fn workers_may_run_one_after_the_other() {
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
    fn the_earliest_error_counts_and_all_before_it_is_finished() {
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
    fn a_break_is_an_early_success() {
        let work = Counting { stop: Some(33), fail: vec![34], ..Counting::new(500) };
        run(&work, 0, Order::Claimed, &Threads(4)).unwrap();
        assert_eq!(*work.done.lock().unwrap(), (0..34).collect::<Vec<_>>());
        run(&Counting::new(0), 0, Order::Claimed, &Inline).unwrap();
    }

    #[test]
    fn a_panic_ends_the_others() {
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
                assert!(*slot != 20, "this panic belongs to the test");
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
