//! What is under way: operations that may hold an old mapping, and guest clusters whose mapping is being
//! changed.
//!
//! Invariant I3: a cluster that was unlinked in epoch `e` is handed out again only in epoch `e + 2` or later,
//! and the epoch moves on only when no operation of the one before is left.

use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, Rank, lock, wait};
use ::alloc::vec::Vec;
use core::ops::Range;
use qcow2_format::{Geometry, GuestCluster, GuestOffset};

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
        let before = self.active.fetch_sub(1, Ordering::SeqCst);
        debug_assert!(before > 0, "more operations end than have begun");
    }
}

impl Operations {
    /// Starts an operation.
    pub(crate) fn enter(&self) -> Operation<'_> {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let active = &self.active[(epoch & 1) as usize];
            active.fetch_add(1, Ordering::SeqCst);
            // Read again: between the load and the count the epoch may have moved on twice, and then nobody
            // would wait for this operation.
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

    /// Moves the epoch on as far as running operations allow, at most two steps. The caller holds the flush
    /// lock, so that nobody else moves it.
    pub(crate) fn advance(&self) -> u64 {
        for _ in 0..2 {
            let epoch = self.epoch.load(Ordering::SeqCst);
            // The next epoch reuses the counter of the one before: its operations must have ended, since they
            // may still look at what was unlinked in it.
            if self.active[((epoch + 1) & 1) as usize].load(Ordering::SeqCst) != 0 {
                break;
            }
            self.epoch.store(epoch + 1, Ordering::SeqCst);
        }
        self.epoch.load(Ordering::SeqCst)
    }
}

/// Guest clusters whose mapping somebody is changing, or writes through.
///
/// A write in place shares its clusters with others of its kind and keeps out whoever changes the mapping:
/// zeroes would otherwise be recorded while its bytes are still on their way, and a later write beside them
/// would uncover those.
#[derive(Debug)]
pub(crate) struct Claims {
    held: Mutex<Held>,
    released: Condvar,
}

impl Default for Claims {
    fn default() -> Self {
        Self { held: Mutex::new(Rank::Claims, Held::default()), released: Condvar::new() }
    }
}

#[derive(Debug, Default)]
struct Held {
    ranges: Vec<ClaimedRange>,
    /// How many threads wait; where none does, letting go costs no system call.
    waiting: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct ClaimedRange {
    clusters: Range<GuestCluster>,
    shared: bool,
}

/// The guest clusters that `len` bytes from `offset` on touch; at least the one that holds `offset`.
pub(crate) fn touched_clusters(geometry: &Geometry, offset: GuestOffset, len: u64) -> Range<GuestCluster> {
    let last = GuestOffset::new(offset.value().saturating_add(len.max(1) - 1));
    let end = GuestCluster::new(geometry.guest_cluster(last).value() + 1);
    geometry.guest_cluster(offset)..end
}

/// The right to change the mapping of guest clusters, or (shared) to write through it.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    claims: &'a Claims,
    range: ClaimedRange,
}

impl Claims {
    /// Waits until nobody else changes or writes through one of `clusters`, then claims them.
    /// A thread that holds claims already takes further ones only for later clusters (as a batch of writes
    /// does): two threads that do so never wait for each other.
    pub(crate) fn claim(&self, clusters: Range<GuestCluster>) -> Claim<'_> {
        self.enter(ClaimedRange { clusters, shared: false })
    }

    /// Waits until nobody changes the mapping of one of `clusters`, and keeps it from being changed.
    pub(crate) fn share(&self, clusters: Range<GuestCluster>) -> Claim<'_> {
        self.enter(ClaimedRange { clusters, shared: true })
    }

    fn enter(&self, range: ClaimedRange) -> Claim<'_> {
        let meets = |other: &ClaimedRange| {
            let (ours, theirs) = (&range.clusters, &other.clusters);
            theirs.start < ours.end && ours.start < theirs.end && !(other.shared && range.shared)
        };
        debug_assert!(range.clusters.start < range.clusters.end, "a claim of nothing");
        let mut held = lock(&self.held);
        while held.ranges.iter().any(meets) {
            // Woken by every release, wanted or not: claims are few and short, a queue for each is not worth
            // its cost.
            held.waiting += 1;
            held = wait(&self.released, held);
            held.waiting -= 1;
        }
        held.ranges.push(range.clone());
        Claim { claims: self, range }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = lock(&self.claims.held);
        debug_assert!(held.ranges.contains(&self.range), "a claim is given up twice");
        if let Some(at) = held.ranges.iter().position(|range| *range == self.range) {
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

    fn clusters(range: Range<u64>) -> Range<GuestCluster> {
        GuestCluster::new(range.start)..GuestCluster::new(range.end)
    }

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
    fn shared_claims_keep_changes_out_and_nothing_else() {
        let claims = Claims::default();
        let released = AtomicBool::new(false);
        let (first, _second) = (claims.share(clusters(10..20)), claims.share(clusters(25..30)));
        drop(claims.share(clusters(15..25)));
        drop(claims.claim(clusters(20..25)));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _change = claims.claim(clusters(5..15));
                assert!(released.load(Ordering::SeqCst));
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
            released.store(true, Ordering::SeqCst);
            drop(first);
        });
    }

    #[test]
    fn overlapping_claims_wait_and_others_do_not() {
        let claims = Claims::default();
        let released = AtomicBool::new(false);
        let first = claims.claim(clusters(10..20));
        drop(claims.claim(clusters(20..30)));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _second = claims.claim(clusters(15..25));
                assert!(released.load(Ordering::SeqCst));
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
            released.store(true, Ordering::SeqCst);
            drop(first);
        });
    }
}
