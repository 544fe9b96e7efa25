//! Who counts what a guest asks for.

use std::fmt;
use std::time::{Duration, Instant};

/// Kinds of requests that reach the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes for the guest.
    Read,
    /// Bytes of the guest.
    Write,
    /// A flush, also one for a change that must be durable at once.
    Flush,
    /// One range of a discard.
    Discard,
    /// One range that is zeroed.
    WriteZeroes,
}

/// A request that has ended, well or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// What it was.
    pub kind: Kind,
    /// Bytes of its range.
    pub bytes: u64,
    /// How long the disk took.
    pub latency: Duration,
}

/// Is called on the thread of the request's queue, before the guest gets its answer.
type Call = Box<dyn Fn(Ended) + Send + Sync>;

/// Who is told of each request, if anybody.
#[derive(Default)]
pub(crate) struct Observer(Option<Call>);

impl Observer {
    pub(crate) fn new(call: impl Fn(Ended) + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(call)))
    }

    /// Runs a request. Without an observer nobody looks at the clock.
    pub(crate) fn time<T>(&self, kind: Kind, bytes: u64, request: impl FnOnce() -> T) -> T {
        let Some(call) = &self.0 else { return request() };
        let begin = Instant::now();
        let done = request();
        call(Ended { kind, bytes, latency: begin.elapsed() });
        done
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Observer").field(&self.0.is_some()).finish()
    }
}
