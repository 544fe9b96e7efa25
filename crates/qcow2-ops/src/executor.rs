//! The port for parallel work: a procedure brings the job, the caller brings the threads.

/// Runs one job on several workers at once.
pub trait Executor: Sync {
    /// How many workers [`run`](Self::run) uses: at least 1. Procedures size their buffers by it.
    fn workers(&self) -> usize;

    /// Calls `job(0)`, `job(1)` ... `job(workers() - 1)`, each once, and returns when all have returned. They
    /// may run at the same time or one after the other, in any order: jobs share work between them so that
    /// either is right.
    fn run(&self, job: &(dyn Fn(usize) + Sync));
}

/// One worker: the caller itself.
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
