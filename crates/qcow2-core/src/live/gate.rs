//! The gate between requests and an exchange: requests pass it in parallel, an exchange closes it.
//!
//! The value is kept once for each group of threads, under a lock of the group's own. A request read-locks
//! its group's lock only, so requests of different groups share no memory that one of them writes. An
//! exchange write-locks all of them, one after the other: it waits for the requests inside and holds new ones
//! back.

use crate::sync::{
    LockOwner, Mutex, MutexGuard, Rank, RwLock, RwLockReadGuard, RwLockWriteGuard, lock, read, thread_number,
    write,
};
use ::alloc::vec::Vec;
use core::mem;

/// How many groups of threads there are. Origin: ours; more cores than this rarely serve one disk.
const GROUPS: usize = 16;

/// A value that requests use and an exchange replaces.
pub(crate) struct Gate<T> {
    groups: Vec<Group<T>>,
    /// The value once more, held by the exchange. Its rank is before that of the groups: a thread whose own
    /// request is inside would wait for itself, and builds that check the order say so.
    present: Mutex<T>,
}

/// In a cache line of its own, on every processor that we know.
#[repr(align(128))]
struct Group<T>(RwLock<T>);

/// The closed gate; dropping it lets requests in again.
pub(crate) struct Closed<'a, T> {
    // Dropped first: requests are let in before the next exchange is.
    values: Vec<RwLockWriteGuard<'a, T>>,
    present: MutexGuard<'a, T>,
}

impl<T: Clone> Gate<T> {
    pub(crate) fn new(value: &T) -> Self {
        let _owner = LockOwner::new();
        let group = |_| Group(RwLock::new(Rank::Layers, value.clone()));
        let present = Mutex::new(Rank::Exchange, value.clone());
        Self { groups: (0..GROUPS).map(group).collect(), present }
    }

    /// Waits while the gate is closed or about to be. The value stays as it is until the guard is dropped.
    pub(crate) fn enter(&self) -> RwLockReadGuard<'_, T> {
        read(&self.groups[thread_number() % GROUPS].0)
    }

    /// Closes the gate: waits for the requests inside.
    pub(crate) fn close(&self) -> Closed<'_, T> {
        let present = lock(&self.present);
        Closed { values: self.groups.iter().map(|group| write(&group.0)).collect(), present }
    }
}

impl<T: Clone> Closed<'_, T> {
    pub(crate) fn value(&self) -> &T {
        &self.present
    }

    /// Replaces the value; returns the old one.
    pub(crate) fn replace(&mut self, value: &T) -> T {
        self.values.iter_mut().for_each(|kept| **kept = value.clone());
        mem::replace(&mut *self.present, value.clone())
    }
}
