//! The one door to locks, atomics and the standard library; nothing else in this crate can name `std`.
//!
//! A lock whose holder panicked is taken all the same: no data under these locks is left half-changed by a panic,
//! and a second panic would help nobody. With the feature `shuttle` the same types come from a scheduler that tries
//! orders of execution, so that a test can look for the one that hurts.

#[cfg_attr(test, allow(unused_extern_crates))]
extern crate std;

#[cfg(feature = "shuttle")]
use shuttle::sync as locks;
#[cfg(not(feature = "shuttle"))]
use std::sync as locks;

pub(crate) use locks::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, atomic};
/// Filled without waiting for anybody, so there is no order to explore.
pub(crate) use std::sync::OnceLock;

pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub(crate) fn read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub(crate) fn write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub(crate) fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Lets whoever is being waited for go on.
pub(crate) fn spin() {
    #[cfg(feature = "shuttle")]
    shuttle::thread::yield_now();
    #[cfg(not(feature = "shuttle"))]
    core::hint::spin_loop();
}
