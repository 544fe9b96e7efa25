//! State shared by all workers of a check: work distribution, findings, progress, first error.

use super::collect::{Collector, Key};
use super::finding::Finding;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::progress::Progress;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

pub(super) struct Shared<'a> {
    pub(super) executor: &'a dyn Executor,
    pub(super) progress: &'a dyn Progress,
    pub(super) collector: Collector,
}

impl Shared<'_> {
    /// Records a finding that counts `times` times.
    pub(super) fn found(&self, key: Key, finding: Finding, times: u64) {
        self.collector.add(key, finding, times);
    }

    /// Reports `bytes` of tables as done.
    pub(super) fn advance(&self, bytes: u64) {
        self.progress.advance(bytes);
    }

    /// Runs `work` on all of `range`, `step` items at a time; each worker has its own buffer. Returns the
    /// first error, or `Stopped` if the progress asked to stop.
    pub(super) fn in_pieces(
        &self,
        range: Range<u64>,
        step: u64,
        work: impl Fn(Range<u64>, &mut Vec<u8>) -> Result<()> + Sync,
    ) -> Result<()> {
        let next = AtomicU64::new(range.start);
        let failed = AtomicBool::new(false);
        let error = Mutex::new(None);
        self.executor.run(&|_worker| {
            let mut buffer = Vec::new();
            while !failed.load(Ordering::Relaxed) {
                let start = next.fetch_add(step, Ordering::Relaxed);
                if start >= range.end {
                    break;
                }
                let result = if self.progress.should_stop() {
                    Err(Error::new(ErrorKind::Stopped, "check was stopped"))
                } else {
                    work(start..range.end.min(start.saturating_add(step)), &mut buffer)
                };
                if let Err(e) = result {
                    failed.store(true, Ordering::Relaxed);
                    error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
                }
            }
        });
        error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}
