//! The one door to the locks of the standard library; nothing else in this crate can name `std`.

extern crate std;

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
