//! What this crate asks of the world: random bytes and time.

use crate::error::CryptError;
use std::time::Duration;

/// A source of random bytes that nobody can guess.
pub trait Random {
    /// Fills `buf`. Errors: `Random`.
    fn fill(&mut self, buf: &mut [u8]) -> Result<(), CryptError>;
}

/// Tells how long key derivation takes on this machine.
pub trait Stopwatch {
    /// The time that this thread has computed for, counted from anywhere; never goes back.
    fn now(&self) -> Duration;
}
