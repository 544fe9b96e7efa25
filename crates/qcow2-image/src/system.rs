//! Random bytes and time for keys, from the operating system.

use qcow2_crypt::{CryptError, CryptErrorKind, Random, Stopwatch};
use std::time::{Duration, Instant};

/// The system's random bytes, for new keys.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemRandom;

impl Random for SystemRandom {
    fn fill(&mut self, buf: &mut [u8]) -> Result<(), CryptError> {
        getrandom::fill(buf).map_err(|error| {
            CryptError::new(CryptErrorKind::Random, format!("the system gives no random bytes: {error}"))
        })
    }
}

/// The processor time of this thread; where the system does not tell, the time that passes. A busy machine
/// then makes key derivation cheaper than was asked for.
#[derive(Clone, Copy, Debug)]
pub struct ThreadTime(Instant);

impl ThreadTime {
    /// Starts now.
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
    fn time_does_not_go_back() {
        let watch = ThreadTime::start();
        let first = watch.now();
        assert!(watch.now() >= first);
    }
}
