//! The port for parallel work: a procedure supplies the job, the caller supplies the threads.

/// Runs a job on several workers.
pub trait Executor: Sync {
    /// Number of workers that [`run`](Self::run) uses, at least 1. Procedures size their buffers by it.
    fn workers(&self) -> usize;

    /// Calls `job(0)`, `job(1)` ... `job(workers() - 1)`, each once, and returns when all have returned. They
    /// may run in parallel or one after the other, in any order; jobs distribute their work so that both are
    /// correct.
    fn run(&self, job: &(dyn Fn(usize) + Sync));
}

/// A single worker: the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inline;

impl Executor for Inline {
    fn workers(&self) -> usize {
        1
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        job(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn inline_runs_the_job_once() {
        let seen = Mutex::new(Vec::new());
        Inline.run(&|worker| seen.lock().unwrap().push(worker));
        assert_eq!(*seen.lock().unwrap(), [0]);
        assert_eq!(Inline.workers(), 1);
    }
}
