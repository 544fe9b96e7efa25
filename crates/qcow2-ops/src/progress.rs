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

    /// False if nobody looks at totals: what is only needed for them is not worked out.
    fn is_watched(&self) -> bool {
        true
    }

    /// Of two disks that are compared the smaller one has ended, and all was equal up to there.
    fn smaller_ended(&self) {}
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

    fn is_watched(&self) -> bool {
        false
    }
}
