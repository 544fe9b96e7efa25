//! The port for progress: how much there is to do, how much is done, and whether to stop.

/// Told how the work goes, from any worker; asked between pieces of work whether to go on.
pub trait Progress: Sync {
    /// The whole work is `bytes`; called before the first [`advance`](Self::advance), and again if it turns
    /// out otherwise.
    fn set_total(&self, bytes: u64);

    /// `bytes` more are done.
    fn advance(&self, bytes: u64);

    /// Whether the procedure should give up with [`ErrorKind::Stopped`](crate::ErrorKind::Stopped). Once
    /// true, it stays true.
    fn should_stop(&self) -> bool;
}

/// Shows nothing and never stops.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn set_total(&self, _bytes: u64) {}

    fn advance(&self, _bytes: u64) {}

    fn should_stop(&self) -> bool {
        false
    }
}
