//! The ports of this crate: random bytes and time.

use crate::error::{CryptError, CryptErrorKind};
use std::io;
use std::time::Duration;

/// A cryptographically secure source of random bytes.
pub trait Random {
    /// Fills `buf`. Errors: `Random`.
    fn fill(&mut self, buf: &mut [u8]) -> Result<(), CryptError>;
}

/// A function that fills bytes, as the operating system's.
impl<F: FnMut(&mut [u8]) -> io::Result<()>> Random for F {
    fn fill(&mut self, buf: &mut [u8]) -> Result<(), CryptError> {
        self(buf).map_err(|error| {
            CryptError::new(CryptErrorKind::Random, format!("the system gives no random bytes: {error}"))
        })
    }
}

/// Measures how long key derivation takes on this machine.
pub trait Stopwatch {
    /// CPU time used by this thread, from any origin. Must not go backwards.
    fn now(&self) -> Duration;
}

/// A function that tells the time.
impl<F: Fn() -> Duration> Stopwatch for F {
    fn now(&self) -> Duration {
        self()
    }
}
