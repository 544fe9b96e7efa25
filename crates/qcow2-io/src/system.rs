//! The operating system's random bytes and clock, for encryption keys.

use std::io;
use std::time::{Duration, Instant};

/// Fills `bytes` from the operating system's cryptographically secure source. Errors: it has none, or it
/// failed.
pub fn random_bytes(bytes: &mut [u8]) -> io::Result<()> {
    getrandom::fill(bytes).map_err(|error| io::Error::other(error.to_string()))
}

/// A copy of the descriptor with this number, which this process was started with, such as a socket from a
/// service manager. The original stays open. Errors: there is no such descriptor.
#[cfg(unix)]
pub fn inherited_descriptor(number: i32) -> io::Result<std::os::fd::OwnedFd> {
    crate::sys::inherited(number)
}

/// CPU time of this thread. Where the system does not provide it, wall-clock time; a busy machine then makes
/// key derivation cheaper than requested.
#[derive(Clone, Copy, Debug)]
pub struct ThreadClock(Instant);

impl ThreadClock {
    /// A clock that starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Time from any origin; does not go backwards.
    #[cfg(unix)]
    pub fn now(&self) -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        match (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec)) {
            (Ok(seconds), Ok(nanoseconds)) if (seconds, nanoseconds) != (0, 0) => {
                Duration::new(seconds, nanoseconds)
            }
            _ => self.0.elapsed(),
        }
    }

    /// Time from any origin; does not go backwards.
    #[cfg(not(unix))]
    pub fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_bytes_differ() {
        let (mut a, mut b) = ([0; 32], [0; 32]);
        random_bytes(&mut a).unwrap();
        random_bytes(&mut b).unwrap();
        assert_ne!(a, b);
    }

    #[test]
    fn thread_time_is_monotonic() {
        let clock = ThreadClock::start();
        let first = clock.now();
        assert!(clock.now() >= first);
    }
}
