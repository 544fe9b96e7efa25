//! The port for progress reports and stop requests.

/// Receives progress from any worker, and is asked between pieces of work whether to stop.
pub trait Progress: Sync {
    /// Sets the total to `bytes`. Called before the first [`advance`](Self::advance), and again if the total
    /// changes.
    fn set_total(&self, bytes: u64);

    /// Reports that `bytes` more are done.
    fn advance(&self, bytes: u64);

    /// True if the procedure should end with [`ErrorKind::Stopped`](crate::ErrorKind::Stopped). Once true, it
    /// must stay true.
    fn should_stop(&self) -> bool;
}

/// Shows no progress and never stops.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn set_total(&self, _bytes: u64) {}

    fn advance(&self, _bytes: u64) {}

    fn should_stop(&self) -> bool {
        false
    }
}
