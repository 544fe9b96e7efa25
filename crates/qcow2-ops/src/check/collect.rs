//! Collects the findings of all workers in a fixed order, up to a limit.

use super::finding::{Class, Finding, Found};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Sort key of a finding: the phase, then two numbers that order findings within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key(pub(super) Phase, pub(super) u64, pub(super) u64);

/// The order in which findings are listed; QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    SnapshotTable,
    Header,
    Active,
    Snapshots,
    Tables,
    Bitmaps,
    RefcountBlocks,
    Refcounts,
    Copied,
}

/// Receives findings from any worker.
pub(super) struct Collector {
    limit: usize,
    corruptions: AtomicU64,
    leaks: AtomicU64,
    check_errors: AtomicU64,
    total: AtomicU64,
    needs_rebuild: AtomicBool,
    kept: Mutex<Vec<(Key, Found)>>,
}

/// The collected findings and totals.
pub(super) struct Collected {
    pub(super) corruptions: u64,
    pub(super) leaks: u64,
    pub(super) check_errors: u64,
    pub(super) needs_rebuild: bool,
    pub(super) findings: Vec<Found>,
    pub(super) omitted: u64,
}

impl Collector {
    /// A collector that keeps the first `limit` findings in key order.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            corruptions: AtomicU64::new(0),
            leaks: AtomicU64::new(0),
            check_errors: AtomicU64::new(0),
            total: AtomicU64::new(0),
            needs_rebuild: AtomicBool::new(false),
            kept: Mutex::new(Vec::new()),
        }
    }

    /// Counts a finding, and keeps it if it is among the first. Findings with equal keys stay in arrival
    /// order.
    pub(super) fn add(&self, key: Key, finding: Finding, times: u64) {
        let count = match finding.class() {
            Class::Corruption => &self.corruptions,
            Class::Leak => &self.leaks,
            Class::CheckError => &self.check_errors,
        };
        count.fetch_add(times, Ordering::Relaxed);
        self.total.fetch_add(1, Ordering::Relaxed);
        if finding.needs_rebuild() {
            self.needs_rebuild.store(true, Ordering::Relaxed);
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push((key, Found { finding, times }));
        if kept.len() >= self.limit.saturating_mul(2).max(1024) {
            self.cut(&mut kept);
        }
    }

    fn cut(&self, kept: &mut Vec<(Key, Found)>) {
        kept.sort_by_key(|(key, _)| *key);
        kept.truncate(self.limit);
    }

    pub(super) fn finish(self) -> Collected {
        let mut kept = self.kept.into_inner().unwrap_or_else(PoisonError::into_inner);
        kept.sort_by_key(|(key, _)| *key);
        kept.truncate(self.limit);
        let findings: Vec<_> = kept.into_iter().map(|(_, found)| found).collect();
        Collected {
            corruptions: self.corruptions.into_inner(),
            leaks: self.leaks.into_inner(),
            check_errors: self.check_errors.into_inner(),
            needs_rebuild: self.needs_rebuild.into_inner(),
            omitted: self.total.into_inner() - findings.len() as u64,
            findings,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_first_findings_and_counts_all() {
        let collector = Collector::new(3);
        for cluster in (0..5000).rev() {
            let finding = Finding::Refcount { cluster, stored: 1, references: cluster % 2 * 2 };
            collector.add(Key(Phase::Refcounts, cluster, 0), finding, 1);
        }
        collector.add(Key(Phase::Header, 0, 0), Finding::RefcountUnreadable { cluster: 7 }, 4);
        let collected = collector.finish();
        assert_eq!((collected.corruptions, collected.leaks, collected.check_errors), (2500, 2500, 4));
        assert_eq!((collected.findings.len(), collected.omitted), (3, 4998));
        assert_eq!(collected.findings[0].finding, Finding::RefcountUnreadable { cluster: 7 });
        assert_eq!(collected.findings[2].finding, Finding::Refcount { cluster: 1, stored: 1, references: 2 });
        assert!(!collected.needs_rebuild);
    }
}
