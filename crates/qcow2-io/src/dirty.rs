//! Whether a barrier has anything to do: changes are counted, and a barrier notes how many it has made
//! durable.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// Counts finished changes. A change counts before its call returns, so a later barrier sees it.
///
/// A failed barrier is remembered: the system reports lost pages of its cache once and takes them for clean
/// then, so that a second try would succeed without them.
#[derive(Debug, Default)]
pub(crate) struct Dirty {
    changes: AtomicU64,
    durable: AtomicU64,
    /// The error number of the barrier that failed; 0: none did.
    broken: AtomicI32,
}

impl Dirty {
    /// Notes a change that is done, or was given up half-way.
    pub(crate) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// How many changes a barrier that starts now would make durable; `None` where an earlier one did it all.
    /// Errors: the number of an earlier failure.
    pub(crate) fn pending(&self) -> Result<Option<u64>, i32> {
        match self.broken.load(Ordering::Acquire) {
            0 => {}
            code => return Err(code),
        }
        let changes = self.changes.load(Ordering::Acquire);
        Ok((self.durable.load(Ordering::Acquire) < changes).then_some(changes))
    }

    /// Notes that a barrier has succeeded that started when `changes` were pending.
    pub(crate) fn made_durable(&self, changes: u64) {
        self.durable.fetch_max(changes, Ordering::AcqRel);
    }

    /// Notes that a barrier has failed with error number `code`: changes may be lost, and no later barrier
    /// can tell.
    pub(crate) fn broke(&self, code: i32) {
        self.broken.store(code, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_covers_what_came_before_it_and_no_more() {
        let dirty = Dirty::default();
        assert_eq!(dirty.pending(), Ok(None));
        dirty.changed();
        let first = dirty.pending();
        assert_eq!(first, Ok(Some(1)));
        // A change while the barrier runs needs another one.
        dirty.changed();
        dirty.made_durable(1);
        assert_eq!(dirty.pending(), Ok(Some(2)));
        dirty.made_durable(2);
        assert_eq!(dirty.pending(), Ok(None));
        // An older barrier that ends late takes nothing back.
        dirty.made_durable(1);
        assert_eq!(dirty.pending(), Ok(None));
    }

    #[test]
    fn a_failed_barrier_is_not_forgotten() {
        let dirty = Dirty::default();
        dirty.changed();
        dirty.broke(5);
        assert_eq!(dirty.pending(), Err(5));
        dirty.made_durable(1);
        assert_eq!(dirty.pending(), Err(5));
    }
}
