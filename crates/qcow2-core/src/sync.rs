//! The one door to locks, atomics and the standard library; nothing else in this crate can name `std`.
//!
//! A lock whose holder panicked is taken all the same: no data under these locks is left half-changed by a
//! panic, and a second panic would help nobody. With the feature `unstable-shuttle` the same types come from
//! a scheduler that tries orders of execution, so that a test can look for the one that hurts.
//!
//! Every lock has a [`Rank`], and a thread takes the locks of one image in the order of their ranks only. So
//! two threads never wait for each other, whatever they do. Builds with debug assertions check it at every
//! lock.

#[cfg_attr(test, allow(unused_extern_crates))]
extern crate std;

#[cfg(feature = "unstable-shuttle")]
use shuttle::sync as locks;
#[cfg(not(feature = "unstable-shuttle"))]
use std::sync as locks;

use core::ops::{Deref, DerefMut};
pub(crate) use locks::{Condvar, atomic};
pub(crate) use order::LockOwner;
/// Filled without waiting for anybody, so there is no order to explore.
pub(crate) use std::sync::OnceLock;

/// The order of all locks: whoever holds one may take only those below it. Two locks of the same rank are
/// never held at once. Layers of a chain are images of their own: who holds locks of an overlay may take any
/// of its backing file's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// Shared by every request, alone for what changes the image as a whole: snapshots, resize, close. The
    /// one lock that a thread may share several times over, with a write ticket each.
    Structure,
    /// Encrypted images: alone for a change of a part of a sector, which reads the rest of it first.
    PartialSector,
    /// The bitmaps and their bits.
    Bitmaps,
    /// A missing or shared L2 table is being replaced.
    NewTable,
    /// A flush round, or a change of whole trees of refcounts.
    Flushing,
    /// Shared while mapping words change, alone while a flush copies them.
    Gate,
    /// The refcount table and where free clusters are looked for.
    Refcounts,
    /// Refcount blocks or the table are being written.
    RefcountIo,
    /// The header, also while its sector is written.
    Header,
    /// A cached page of a table is being read: held over I/O, by those who miss in the same set only.
    CacheLoading,
    /// The cached pages of a set.
    CachePages,
    /// Which cached pages wait for write-back.
    CacheDirty,
    /// The L1 table in memory.
    L1Table,
    /// Which of its sectors wait for write-back.
    L1Dirty,
    /// Clusters that wait to be freed.
    Pending,
    /// Two words of an L2 entry are being changed together.
    WordPair,
    /// Who claims which guest clusters: held to look, not for the claim's time. A claim itself is taken under
    /// [`Structure`](Self::Structure), several of them in ascending order of clusters.
    Claims,
    /// A few expanded clusters.
    Expanded,
    /// Buffers for reuse.
    Scratch,
    /// Which clusters hold metadata.
    Metadata,
}

/// A mutual exclusion lock with a place in the order.
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

/// A lock for many readers or one writer, with a place in the order.
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

/// A lock that is held. Let go before its place in the order is.
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

pub(crate) fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    let entered = lock.place.enter();
    Held { guard: lock.inner.write().unwrap_or_else(std::sync::PoisonError::into_inner), entered }
}

/// Lets the lock go until `condition` is signalled.
pub(crate) fn wait<'a, T>(condition: &Condvar, held: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    let Held { guard, entered } = held;
    Held { guard: condition.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner), entered }
}

/// Lets whoever is being waited for go on.
pub(crate) fn spin() {
    #[cfg(feature = "unstable-shuttle")]
    shuttle::thread::yield_now();
    #[cfg(not(feature = "unstable-shuttle"))]
    core::hint::spin_loop();
}

/// The check of the order. Which locks a thread holds is known to that thread alone, so that the check itself
/// neither waits nor changes what it looks at.
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

    /// While it lives, the locks that this thread makes belong to one image.
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

        /// Notes that this thread is about to wait for the lock; panics where it holds one that comes later.
        pub(super) fn enter(self) -> Entered {
            self.enter_after(|last| last < self.rank)
        }

        /// The same for a reader. A thread may hold several write tickets, each of which shares the
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

    /// A place that the thread has entered.
    #[derive(Debug)]
    pub(super) struct Entered {
        place: Place,
    }

    impl Drop for Entered {
        fn drop(&mut self) {
            let wanted = (self.place.owner, self.place.rank);
            // At the end of a thread its list may be gone before a lock is let go.
            let _ = HELD.try_with(|held| {
                let mut held = held.borrow_mut();
                if let Some(at) = held.iter().rposition(|held| *held == wanted) {
                    held.remove(at);
                }
            });
        }
    }
}

/// The order is not checked here.
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
    fn a_lock_out_of_order_is_caught() {
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
        assert!(twice.is_err(), "a reader that reads again waits for a writer who waits for it");
        // Another image's locks are in another order.
        let _other_owner = LockOwner::new();
        let other = Mutex::new(Rank::Structure, 4);
        let (_second, _other) = (read(&second), lock(&other));
    }
}
