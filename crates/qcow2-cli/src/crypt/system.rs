//! Random bytes and time, from the operating system.

use qcow2_crypt::{CryptError, CryptErrorKind, Random, Stopwatch};
use std::time::{Duration, Instant};

/// The system's random bytes.
#[derive(Debug)]
pub(crate) struct SystemRandom;

impl Random for SystemRandom {
    fn fill(&mut self, buf: &mut [u8]) -> Result<(), CryptError> {
        getrandom::fill(buf).map_err(|error| {
            CryptError::new(CryptErrorKind::Random, format!("the system gives no random bytes: {error}"))
        })
    }
}

/// The time that this thread has computed for; where the system does not tell, the time of day.
#[derive(Debug)]
pub(crate) struct ThreadTime(Instant);

impl ThreadTime {
    /// Starts now.
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }
}

impl Stopwatch for ThreadTime {
    #[cfg(unix)]
    fn now(&self) -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
        let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or(0);
        match (seconds, nanoseconds) {
            (0, 0) => self.0.elapsed(),
            _ => Duration::new(seconds, nanoseconds),
        }
    }

    #[cfg(not(unix))]
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}
