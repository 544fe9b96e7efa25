//! The operating system's random bytes and clock, for encryption keys.

use qcow2_crypt::{CryptError, CryptErrorKind, Random, Stopwatch};
use std::time::{Duration, Instant};

/// The operating system's random source, for new keys.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemRandom;

impl Random for SystemRandom {
    fn fill(&mut self, buf: &mut [u8]) -> Result<(), CryptError> {
        getrandom::fill(buf).map_err(|error| {
            CryptError::new(
                CryptErrorKind::Random,
                format!("the operating system returned no random bytes: {error}"),
            )
        })
    }
}

/// CPU time of this thread. Where the system does not provide it, wall-clock time; a busy machine then makes
/// key derivation cheaper than requested.
#[derive(Clone, Copy, Debug)]
pub struct ThreadTime(Instant);

impl ThreadTime {
    /// A stopwatch that starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }
}

impl Stopwatch for ThreadTime {
    #[cfg(unix)]
    fn now(&self) -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        match (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec)) {
            (Ok(seconds), Ok(nanoseconds)) if (seconds, nanoseconds) != (0, 0) => {
                Duration::new(seconds, nanoseconds)
            }
            _ => self.0.elapsed(),
        }
    }

    #[cfg(not(unix))]
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_bytes_differ() {
        let (mut a, mut b) = ([0; 32], [0; 32]);
        SystemRandom.fill(&mut a).unwrap();
        SystemRandom.fill(&mut b).unwrap();
        assert_ne!(a, b);
    }

    #[test]
    fn thread_time_is_monotonic() {
        let watch = ThreadTime::start();
        let first = watch.now();
        assert!(watch.now() >= first);
    }
}
