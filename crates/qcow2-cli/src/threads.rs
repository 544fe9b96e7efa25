//! The executor of the command line: plain threads, as many as there are cores.

use qcow2_ops::Executor;
use std::num::NonZero;
use std::thread;

/// Runs jobs on so many threads, the caller's own among them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Threads {
    workers: usize,
}

impl Threads {
    /// `workers` threads, at least one.
    pub(crate) fn new(workers: usize) -> Self {
        Self { workers: workers.max(1) }
    }

    /// One thread a core.
    pub(crate) fn per_core() -> Self {
        Self::new(thread::available_parallelism().map_or(1, NonZero::get))
    }
}

impl Executor for Threads {
    fn workers(&self) -> usize {
        self.workers
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        thread::scope(|scope| {
            for worker in 1..self.workers {
                scope.spawn(move || job(worker));
            }
            job(0);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Barrier, Mutex};

    #[test]
    fn every_worker_runs_at_the_same_time() {
        let (barrier, seen) = (Barrier::new(3), Mutex::new(Vec::new()));
        Threads::new(3).run(&|worker| {
            barrier.wait();
            seen.lock().unwrap().push(worker);
        });
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2]);
    }
}
