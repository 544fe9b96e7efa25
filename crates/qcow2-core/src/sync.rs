//! Locks and atomics. The only module of this crate that uses `std`.
//!
//! A lock whose holder panicked is taken all the same: no data under these locks is left half-changed by a
//! panic, and a second panic would not help. With the feature `unstable-shuttle` the types come from the
//! shuttle scheduler, which explores thread interleavings in tests.
//!
//! Every lock has a [`Rank`]. A thread takes the locks of one image in ascending order of rank, so that two
//! threads never deadlock. Builds with debug assertions check the order each time a lock is taken.

#[cfg_attr(test, allow(unused_extern_crates))]
extern crate std;

#[cfg(feature = "unstable-shuttle")]
use shuttle::sync as locks;
#[cfg(not(feature = "unstable-shuttle"))]
use std::sync as locks;

use core::ops::{Deref, DerefMut};
pub(crate) use locks::{Condvar, atomic};
pub(crate) use order::LockOwner;
/// From `std` even with shuttle: it is set without waiting, so there are no interleavings to explore.
pub(crate) use std::sync::OnceLock;

/// The order of all locks: a thread that holds one may take only those further down in this list. A thread
/// never holds two locks of the same rank. Each layer of a chain has its own order: a thread that holds locks
/// of an overlay may take any lock of its backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// An exchange of a live disk's layers. Each live disk has an order of its own, like an image.
    Exchange,
    /// A live disk's layers, one lock for each group of threads: read-locked by a request, all of them
    /// write-locked in their order by an exchange.
    Layers,
    /// Read-locked by every request, write-locked by changes of the whole image: snapshots, resize, close.
    /// The only lock that a thread may read-lock more than once, with one write ticket each.
    Structure,
    /// Encrypted images: write-locked by a change of a part of a sector, which reads the rest of it first.
    PartialSector,
    /// The bitmaps and their bits.
    Bitmaps,
    /// Creation of a missing L2 table, or the copy of a shared one.
    NewTable,
    /// A flush round, or a change of the refcounts of whole trees.
    Flushing,
    /// Read-locked while mapping words change, write-locked while a flush copies them.
    Gate,
    /// The refcount table and the start of the search for free clusters.
    Refcounts,
    /// Writeback of refcount blocks and of the refcount table.
    RefcountIo,
    /// The header, also while its sector is written.
    Header,
    /// A read of a table page into the cache: held over I/O; only misses in the same set wait for it.
    CacheLoading,
    /// The cached pages of a set.
    CachePages,
    /// The list of cached pages that wait for writeback.
    CacheDirty,
    /// The L1 table in memory.
    L1Table,
    /// The sectors of the L1 table that wait for writeback.
    L1Dirty,
    /// The clusters that wait to be freed.
    Pending,
    /// A change of both words of an extended L2 entry.
    WordPair,
    /// The list of claims; held only to look at the list, not as long as a claim. A claim itself is taken
    /// under [`Structure`](Self::Structure), several in ascending order of clusters.
    Claims,
    /// The cache of expanded clusters.
    Expanded,
    /// The pool of reusable buffers.
    Scratch,
    /// The map of clusters that hold metadata.
    Metadata,
}

/// A mutex with a rank.
#[derive(Debug)]
pub(crate) struct Mutex<T> {
    place: order::Place,
    inner: locks::Mutex<T>,
}

impl<T> Mutex<T> {
    pub(crate) fn new(rank: Rank, value: T) -> Self {
        Self { place: order::Place::new(rank), inner: locks::Mutex::new(value) }
    }
}

/// A reader-writer lock with a rank.
#[derive(Debug)]
pub(crate) struct RwLock<T> {
    place: order::Place,
    inner: locks::RwLock<T>,
}

impl<T> RwLock<T> {
    pub(crate) fn new(rank: Rank, value: T) -> Self {
        Self { place: order::Place::new(rank), inner: locks::RwLock::new(value) }
    }
}

/// The guard of a held lock. The fields are dropped in order: the lock is released before its rank.
#[derive(Debug)]
pub(crate) struct Held<G> {
    guard: G,
    entered: order::Entered,
}

impl<G: Deref> Deref for Held<G> {
    type Target = G::Target;

    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for Held<G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

pub(crate) type MutexGuard<'a, T> = Held<locks::MutexGuard<'a, T>>;
pub(crate) type RwLockReadGuard<'a, T> = Held<locks::RwLockReadGuard<'a, T>>;
pub(crate) type RwLockWriteGuard<'a, T> = Held<locks::RwLockWriteGuard<'a, T>>;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    let entered = mutex.place.enter();
    Held { guard: mutex.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner), entered }
}

pub(crate) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    let entered = lock.place.enter_shared();
    Held { guard: lock.inner.read().unwrap_or_else(std::sync::PoisonError::into_inner), entered }
}

/// `None` if it would have to wait: for a writer that has the lock or, so that writers get their turn, for
/// one that waits for it.
pub(crate) fn try_read<T>(lock: &RwLock<T>) -> Option<RwLockReadGuard<'_, T>> {
    let guard = match lock.inner.try_read() {
        Ok(guard) => guard,
        Err(locks::TryLockError::Poisoned(error)) => error.into_inner(),
        Err(locks::TryLockError::WouldBlock) => return None,
    };
    Some(Held { guard, entered: lock.place.enter_shared() })
}

pub(crate) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    let entered = lock.place.enter();
    Held { guard: lock.inner.write().unwrap_or_else(std::sync::PoisonError::into_inner), entered }
}

/// Waits for `condition`; the lock is released meanwhile.
pub(crate) fn wait<'a, T>(condition: &Condvar, held: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    let Held { guard, entered } = held;
    Held { guard: condition.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner), entered }
}

/// A small number of the calling thread, the same in all its calls. Threads that start one after the other
/// have numbers one after the other.
pub(crate) fn thread_number() -> usize {
    use core::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    std::thread_local! {
        static NUMBER: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    // When a thread ends, its number may be gone before its last request.
    NUMBER.try_with(|number| *number).unwrap_or(0)
}

/// Yields in a loop that waits for another thread.
pub(crate) fn spin() {
    #[cfg(feature = "unstable-shuttle")]
    shuttle::thread::yield_now();
    #[cfg(not(feature = "unstable-shuttle"))]
    core::hint::spin_loop();
}

/// The check of the lock order. The list of held locks is thread-local, so that the check itself takes no
/// lock and adds no synchronisation that would hide a bug.
#[cfg(all(debug_assertions, not(feature = "unstable-shuttle")))]
mod order {
    use super::Rank;
    use super::std::cell::{Cell, RefCell};
    use super::std::thread_local;
    use ::alloc::vec::Vec;
    use core::sync::atomic::{AtomicU64, Ordering};

    static OWNERS: AtomicU64 = AtomicU64::new(1);
    thread_local! {
        static MAKING: Cell<u64> = const { Cell::new(0) };
        static HELD: RefCell<Vec<(u64, Rank)>> = const { RefCell::new(Vec::new()) };
    }

    /// Locks that this thread creates while the value lives belong to one image.
    pub(crate) struct LockOwner {
        before: u64,
    }

    impl LockOwner {
        pub(crate) fn new() -> Self {
            Self { before: MAKING.replace(OWNERS.fetch_add(1, Ordering::Relaxed)) }
        }
    }

    impl Drop for LockOwner {
        fn drop(&mut self) {
            MAKING.set(self.before);
        }
    }

    /// A lock's image and rank. Locks without an image are not checked.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Place {
        owner: u64,
        rank: Rank,
    }

    impl Place {
        pub(super) fn new(rank: Rank) -> Self {
            Self { owner: MAKING.get(), rank }
        }

        /// Records that this thread is about to take the lock. Panics if it holds one of the same or a later
        /// rank.
        pub(super) fn enter(self) -> Entered {
            let again = self.rank == Rank::Layers;
            self.enter_after(|last| last < self.rank || again && last == self.rank)
        }

        /// The same for a read lock. A thread may hold several write tickets, each with a read lock of the
        /// structure.
        pub(super) fn enter_shared(self) -> Entered {
            let again = self.rank == Rank::Structure;
            self.enter_after(|last| last < self.rank || again && last == self.rank)
        }

        fn enter_after(self, may_follow: impl FnOnce(Rank) -> bool) -> Entered {
            HELD.with_borrow_mut(|held| {
                let same = held.iter().filter(|(owner, _)| *owner == self.owner && self.owner != 0);
                let last = same.map(|(_, rank)| *rank).max();
                assert!(
                    last.is_none_or(may_follow),
                    "lock order: {:?} is taken while {last:?} is held",
                    self.rank
                );
                held.push((self.owner, self.rank));
            });
            Entered { place: self }
        }
    }

    /// An entry in the thread's list of held locks; dropping it removes the entry.
    #[derive(Debug)]
    pub(super) struct Entered {
        place: Place,
    }

    impl Drop for Entered {
        fn drop(&mut self) {
            let wanted = (self.place.owner, self.place.rank);
            // When a thread ends, its list may be destroyed before it releases its last lock.
            let _ = HELD.try_with(|held| {
                let mut held = held.borrow_mut();
                if let Some(at) = held.iter().rposition(|held| *held == wanted) {
                    held.remove(at);
                }
            });
        }
    }
}

/// Without debug assertions, and under shuttle, the order is not checked.
#[cfg(any(not(debug_assertions), feature = "unstable-shuttle"))]
mod order {
    use super::Rank;

    pub(crate) struct LockOwner;

    impl LockOwner {
        pub(crate) const fn new() -> Self {
            Self
        }
    }

    #[derive(Clone, Copy, Debug)]
    pub(super) struct Place;

    impl Place {
        pub(super) const fn new(_rank: Rank) -> Self {
            Self
        }

        pub(super) const fn enter(self) -> Entered {
            Entered
        }

        pub(super) const fn enter_shared(self) -> Entered {
            Entered
        }
    }

    #[derive(Debug)]
    pub(super) struct Entered;
}

#[cfg(all(test, debug_assertions, not(feature = "unstable-shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn taking_a_lock_out_of_order_panics() {
        let _owner = LockOwner::new();
        let (first, second) = (Mutex::new(Rank::Refcounts, 1), RwLock::new(Rank::Header, 2));
        {
            let (_first, _second) = (lock(&first), read(&second));
        }
        {
            let held = lock(&first);
            drop(held);
            let (_second, _other) = (write(&second), Mutex::new(Rank::Refcounts, 3));
        }
        let wrong = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let (_second, _first) = (read(&second), lock(&first));
        }));
        let message = *wrong.unwrap_err().downcast::<std::string::String>().unwrap();
        assert_eq!(message, "lock order: Refcounts is taken while Some(Header) is held");
        let twice = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let (_one, _two) = (read(&second), read(&second));
        }));
        assert!(twice.is_err(), "a second read lock waits for a writer that waits for the first one");
        // Locks of another image have an order of their own.
        let _other_owner = LockOwner::new();
        let other = Mutex::new(Rank::Structure, 4);
        let (_second, _other) = (read(&second), lock(&other));
    }
}
