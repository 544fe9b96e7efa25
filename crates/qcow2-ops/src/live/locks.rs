//! Locks and atomics. With the feature `unstable-shuttle` they come from the shuttle scheduler, which
//! explores thread interleavings in tests.

#[cfg(feature = "unstable-shuttle")]
use shuttle::sync;
#[cfg(not(feature = "unstable-shuttle"))]
use std::sync;

pub(super) use sync::atomic::{AtomicBool, Ordering};
pub(super) use sync::{Condvar, Mutex, MutexGuard, PoisonError};
