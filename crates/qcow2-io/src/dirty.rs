//! Tracks whether a flush has anything to do: changes are counted, and a flush records the count it made
//! durable.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// Counter of finished changes. A change counts before its call returns, so that a later flush covers it.
///
/// A failed flush is remembered. Linux reports a failed writeback once and then marks the pages clean: a
/// second fsync would succeed although the data is lost.
#[derive(Debug, Default)]
pub(crate) struct Dirty {
    changes: AtomicU64,
    durable: AtomicU64,
    /// Error number of the failed flush; 0 if none failed.
    broken: AtomicI32,
}

impl Dirty {
    /// Counts a change that finished or failed part-way.
    pub(crate) fn changed(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Returns the count that a flush starting now would make durable; `None` if an earlier flush covered
    /// everything. Errors: the number of an earlier flush failure.
    pub(crate) fn pending(&self) -> Result<Option<u64>, i32> {
        match self.broken.load(Ordering::Acquire) {
            0 => {}
            code => return Err(code),
        }
        let changes = self.changes.load(Ordering::Acquire);
        Ok((self.durable.load(Ordering::Acquire) < changes).then_some(changes))
    }

    /// Records that a flush succeeded which started when `changes` was the count.
    pub(crate) fn made_durable(&self, changes: u64) {
        self.durable.fetch_max(changes, Ordering::AcqRel);
    }

    /// Records that a flush failed with error number `code`: changes may be lost, and no later flush can
    /// detect it.
    pub(crate) fn broke(&self, code: i32) {
        self.broken.store(code, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_only_changes_before_its_start() {
        let dirty = Dirty::default();
        assert_eq!(dirty.pending(), Ok(None));
        dirty.changed();
        let first = dirty.pending();
        assert_eq!(first, Ok(Some(1)));
        // A change made while the flush runs needs another flush.
        dirty.changed();
        dirty.made_durable(1);
        assert_eq!(dirty.pending(), Ok(Some(2)));
        dirty.made_durable(2);
        assert_eq!(dirty.pending(), Ok(None));
        // A flush that started earlier and ends later must not lower the durable count.
        dirty.made_durable(1);
        assert_eq!(dirty.pending(), Ok(None));
    }

    #[test]
    fn a_failed_flush_keeps_failing() {
        let dirty = Dirty::default();
        dirty.changed();
        dirty.broke(5);
        assert_eq!(dirty.pending(), Err(5));
        dirty.made_durable(1);
        assert_eq!(dirty.pending(), Err(5));
    }
}
