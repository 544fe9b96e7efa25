//! The ports of this crate: random bytes and time.

use crate::error::CryptError;
use std::time::Duration;

/// A cryptographically secure source of random bytes.
pub trait Random {
    /// Fills `buf`. Errors: `Random`.
    fn fill(&mut self, buf: &mut [u8]) -> Result<(), CryptError>;
}

/// Measures how long key derivation takes on this machine.
pub trait Stopwatch {
    /// CPU time used by this thread, from any origin. Must not go backwards.
    fn now(&self) -> Duration;
}
