//! Requests in flight: operations that may still use an old mapping, and claims on guest clusters.
//!
//! Invariant I3: a cluster that was unlinked in epoch `e` is allocated again only in epoch `e + 2` or later,
//! and the epoch advances only if no operation of the previous epoch is running.

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
        debug_assert!(before > 0, "more operations end than have started");
    }
}

impl Operations {
    /// Starts an operation.
    pub(crate) fn enter(&self) -> Operation<'_> {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let active = &self.active[(epoch & 1) as usize];
            active.fetch_add(1, Ordering::SeqCst);
            // Read again: between load and increment the epoch may have advanced twice, and then `advance`
            // would not wait for this operation.
            if self.epoch.load(Ordering::SeqCst) == epoch {
                return Operation { active };
            }
            active.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The current epoch, the tag of clusters that are unlinked now.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Advances the epoch as far as running operations allow, at most by two. Returns the new epoch. The
    /// caller holds the flush lock, so that nobody else advances it.
    pub(crate) fn advance(&self) -> u64 {
        for _ in 0..2 {
            let epoch = self.epoch.load(Ordering::SeqCst);
            // The next epoch reuses the counter of the previous one, whose operations must have ended: they
            // may still use clusters that were unlinked in it.
            if self.active[((epoch + 1) & 1) as usize].load(Ordering::SeqCst) != 0 {
                break;
            }
            self.epoch.store(epoch + 1, Ordering::SeqCst);
        }
        self.epoch.load(Ordering::SeqCst)
    }
}

/// Claims on guest clusters: exclusive ones for changing the mapping, shared ones for writing in place.
///
/// In-place writes share claims with each other and exclude mapping changes. Without that, a cluster could be
/// marked zero while the bytes of an in-place write are in flight to it; a later partial write that makes it
/// data again would expose them.
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
    /// How many threads wait; if none does, releasing a claim makes no system call.
    waiting: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct ClaimedRange {
    clusters: Range<GuestCluster>,
    shared: bool,
}

impl ClaimedRange {
    /// Whether the two cannot be held at the same time.
    fn meets(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.clusters, &other.clusters);
        theirs.start < ours.end && ours.start < theirs.end && !(other.shared && self.shared)
    }
}

/// The guest clusters that `len` bytes at `offset` touch; at least the cluster of `offset`.
pub(crate) fn touched_clusters(geometry: &Geometry, offset: GuestOffset, len: u64) -> Range<GuestCluster> {
    let last = GuestOffset::new(offset.value().saturating_add(len.max(1) - 1));
    let end = GuestCluster::new(geometry.guest_cluster(last).value() + 1);
    geometry.guest_cluster(offset)..end
}

/// The right to change the mapping of guest clusters, or (shared) to write through it in place. Dropping it
/// releases the clusters.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    claims: &'a Claims,
    range: ClaimedRange,
}

impl Claims {
    /// Waits until no other claim covers any of `clusters`, then claims them. A thread that already holds
    /// claims takes further ones only for later clusters (as a batch of writes does), so that two threads
    /// never wait for each other.
    pub(crate) fn claim(&self, clusters: Range<GuestCluster>) -> Claim<'_> {
        self.enter(ClaimedRange { clusters, shared: false })
    }

    /// Waits until no exclusive claim covers any of `clusters`, then claims them as shared: their mapping
    /// cannot change.
    pub(crate) fn share(&self, clusters: Range<GuestCluster>) -> Claim<'_> {
        self.enter(ClaimedRange { clusters, shared: true })
    }

    /// The same without waiting: `None` if an exclusive claim covers any of `clusters`.
    pub(crate) fn try_share(&self, clusters: Range<GuestCluster>) -> Option<Claim<'_>> {
        let range = ClaimedRange { clusters, shared: true };
        let mut held = lock(&self.held);
        if held.ranges.iter().any(|other| range.meets(other)) {
            return None;
        }
        held.ranges.push(range.clone());
        Some(Claim { claims: self, range })
    }

    fn enter(&self, range: ClaimedRange) -> Claim<'_> {
        debug_assert!(range.clusters.start < range.clusters.end, "an empty claim");
        let mut held = lock(&self.held);
        while held.ranges.iter().any(|other| range.meets(other)) {
            // Every release wakes all waiting threads: claims are few and short, so a queue for each is not
            // worth its cost.
            held.waiting += 1;
            held = wait(&self.released, held);
            held.waiting -= 1;
        }
        held.ranges.push(range.clone());
        Claim { claims: self, range }
    }
}

impl Claim<'_> {
    /// Gives up all clusters but those of `kept`, which the claim covers.
    pub(crate) fn narrow(&mut self, kept: Range<GuestCluster>) {
        if kept == self.range.clusters {
            return;
        }
        let whole = &self.range.clusters;
        debug_assert!(kept.start >= whole.start && kept.end <= whole.end, "a claim gets wider");
        let narrow = ClaimedRange { clusters: kept, shared: self.range.shared };
        let mut held = lock(&self.claims.held);
        if let Some(range) = held.ranges.iter_mut().find(|range| **range == self.range) {
            *range = narrow.clone();
        }
        self.range = narrow;
        let awaited = held.waiting > 0;
        drop(held);
        if awaited {
            self.claims.released.notify_all();
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = lock(&self.claims.held);
        debug_assert!(held.ranges.contains(&self.range), "a claim is released twice");
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
    fn epoch_waits_for_running_operations() {
        let operations = Operations::default();
        assert_eq!(operations.advance(), 2);
        let running = operations.enter();
        assert_eq!(operations.advance(), 3);
        assert_eq!(operations.advance(), 3, "the operation started in epoch 2");
        drop(running);
        assert_eq!(operations.advance(), 5);
    }

    #[test]
    fn shared_claims_exclude_exclusive_ones_only() {
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
    fn only_overlapping_exclusive_claims_wait() {
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
