//! Who is in the middle of something: operations that may hold an old mapping, and guest clusters whose mapping is
//! being changed.
//!
//! Invariant I3: a cluster that was unlinked in epoch `e` is handed out again only in epoch `e + 2` or later, and the
//! epoch moves on only when no operation of the one before is left.

use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, lock, wait};
use ::alloc::vec::Vec;

/// Counts running operations by epoch.
#[derive(Debug, Default)]
pub(crate) struct Operations {
    epoch: AtomicU64,
    active: [AtomicUsize; 2],
}

/// A running operation; the mappings it has looked up stay valid until it is dropped.
#[derive(Debug)]
pub(crate) struct Operation<'a> {
    active: &'a AtomicUsize,
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        self.active.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Operations {
    /// Starts an operation.
    pub(crate) fn enter(&self) -> Operation<'_> {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let active = &self.active[(epoch & 1) as usize];
            active.fetch_add(1, Ordering::SeqCst);
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return Operation { active };
            }
            active.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The current epoch: what is unlinked now is tagged with it.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Moves the epoch on as far as running operations allow, at most two steps. The caller holds the flush lock, so
    /// that nobody else moves it.
    pub(crate) fn advance(&self) -> u64 {
        for _ in 0..2 {
            let epoch = self.epoch.load(Ordering::SeqCst);
            if self.active[((epoch + 1) & 1) as usize].load(Ordering::SeqCst) != 0 {
                break;
            }
            self.epoch.store(epoch + 1, Ordering::SeqCst);
        }
        self.epoch.load(Ordering::SeqCst)
    }
}

/// Guest clusters whose mapping somebody is changing.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    held: Mutex<Held>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct Held {
    ranges: Vec<(u64, u64)>,
    /// How many threads wait; where none does, letting go costs no system call.
    waiting: usize,
}

/// The right to change the mapping of guest clusters `start..end`.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    claims: &'a Claims,
    range: (u64, u64),
}

impl Claims {
    /// Waits until nobody else changes one of the clusters `start..end`, then claims them. A thread must not claim
    /// while it holds another claim.
    pub(crate) fn claim(&self, start: u64, end: u64) -> Claim<'_> {
        let mut held = lock(&self.held);
        while held.ranges.iter().any(|&(s, e)| s < end && start < e) {
            held.waiting += 1;
            held = wait(&self.released, held);
            held.waiting -= 1;
        }
        held.ranges.push((start, end));
        Claim { claims: self, range: (start, end) }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = lock(&self.claims.held);
        if let Some(at) = held.ranges.iter().position(|&r| r == self.range) {
            held.ranges.swap_remove(at);
        }
        let awaited = held.waiting > 0;
        drop(held);
        if awaited {
            self.claims.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn the_epoch_waits_for_running_operations() {
        let operations = Operations::default();
        assert_eq!(operations.advance(), 2);
        let running = operations.enter();
        assert_eq!(operations.advance(), 3);
        assert_eq!(operations.advance(), 3, "the operation began in epoch 2");
        drop(running);
        assert_eq!(operations.advance(), 5);
    }

    #[test]
    fn overlapping_claims_wait_and_others_do_not() {
        let claims = Claims::default();
        let released = AtomicBool::new(false);
        let first = claims.claim(10, 20);
        drop(claims.claim(20, 30));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _second = claims.claim(15, 25);
                assert!(released.load(Ordering::SeqCst));
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
            released.store(true, Ordering::SeqCst);
            drop(first);
        });
    }
}
