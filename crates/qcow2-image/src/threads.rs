//! Threads for the procedures of `qcow2-ops`.

use qcow2_ops::Executor;
use std::num::NonZero;
use std::thread;

/// Runs jobs of `qcow2-ops` on a fixed number of threads, one of which is the caller's. Each call of `run`
/// starts the others and waits for all of them.
///
/// ```
/// use qcow2_image::Threads;
/// use qcow2_image::ops::Executor;
/// use std::sync::atomic::{AtomicUsize, Ordering};
///
/// let sum = AtomicUsize::new(0);
/// Threads::new(4).run(&|worker| {
///     sum.fetch_add(worker, Ordering::Relaxed);
/// });
/// assert_eq!(sum.into_inner(), 1 + 2 + 3);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threads {
    workers: usize,
}

impl Threads {
    /// `workers` threads, but at least one.
    pub fn new(workers: usize) -> Self {
        Self { workers: workers.max(1) }
    }

    /// One thread per available processor; one thread if the number is unknown.
    pub fn per_core() -> Self {
        Self::new(thread::available_parallelism().map_or(1, NonZero::get))
    }
}

impl Default for Threads {
    fn default() -> Self {
        Self::per_core()
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
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn all_workers_run_in_parallel() {
        let (barrier, seen) = (Barrier::new(3), AtomicUsize::new(0));
        Threads::new(3).run(&|worker| {
            barrier.wait();
            seen.fetch_or(1 << worker, Ordering::Relaxed);
        });
        assert_eq!(seen.into_inner(), 0b111);
    }

    #[test]
    fn zero_workers_become_one() {
        assert_eq!(Threads::new(0).workers(), 1);
    }
}
