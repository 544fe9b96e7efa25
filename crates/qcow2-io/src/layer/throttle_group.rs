//! Limits that several disks keep together: a leaky bucket for each.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Time for a group: what it measures, and what it waits with.
pub trait Pace: Send + Sync {
    /// Time since any fixed moment; never less than before.
    fn now(&self) -> Duration;

    /// Returns when `time` has passed, or later.
    fn wait(&self, time: Duration);
}

/// The clock of the system.
#[derive(Clone, Copy, Debug)]
pub struct SystemPace(Instant);

impl SystemPace {
    /// A clock that starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }
}

impl Pace for SystemPace {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn wait(&self, time: Duration) {
        thread::sleep(time);
    }
}

/// How much of something may go in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rate {
    /// Units per second in the long run; 0: no limit.
    pub average: u64,
    /// Units per second in a burst; 0: a tenth of a second's worth may go at once.
    pub burst: u64,
    /// How many seconds a burst may last, at least 1.
    pub burst_seconds: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self { average: 0, burst: 0, burst_seconds: 1 }
    }
}

/// A limit for all requests, or for those of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rates {
    /// Of all requests.
    pub total: Rate,
    /// Of reads.
    pub read: Rate,
    /// Of writes, of zeroes and discards too.
    pub write: Rate,
}

impl Rates {
    fn all(&self) -> [&Rate; 3] {
        [&self.total, &self.read, &self.write]
    }

    /// True if `value` is given for all requests and for a kind of them.
    fn conflicts(&self, value: impl Fn(&Rate) -> u64) -> bool {
        value(&self.total) > 0 && (value(&self.read) > 0 || value(&self.write) > 0)
    }
}

/// The limits of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ThrottleLimits {
    /// Bytes.
    pub bytes: Rates,
    /// Requests.
    pub requests: Rates,
    /// A request of more bytes than this counts as several; 0: every request counts as one.
    pub request_size: u64,
}

/// Why limits cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LimitError {
    /// A limit is given for all requests and for a kind of them.
    TotalAndKind,
    /// The size of a request is given, and no limit for requests.
    SizeWithoutRequests,
    /// A rate is larger than this.
    TooLarge(u64),
    /// A burst of no seconds.
    NoBurstTime,
    /// A time for bursts without their rate.
    BurstTimeWithoutRate,
    /// A burst has more units than can be counted.
    BurstTooLong,
    /// A rate for bursts without an average.
    BurstWithoutAverage,
    /// A burst is slower than the average.
    BurstBelowAverage,
}

impl fmt::Display for LimitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TotalAndKind => "a limit for all requests excludes those for reads and writes",
            Self::SizeWithoutRequests => "a request size needs a limit for requests",
            Self::TooLarge(most) => return write!(f, "a rate is at most {most} a second"),
            Self::NoBurstTime => "a burst lasts at least one second",
            Self::BurstTimeWithoutRate => "the length of bursts needs a rate of bursts",
            Self::BurstTooLong => "the burst is too long for its rate",
            Self::BurstWithoutAverage => "a rate of bursts needs an average rate",
            Self::BurstBelowAverage => "a burst cannot be slower than the average",
        })
    }
}

impl std::error::Error for LimitError {}

impl ThrottleLimits {
    /// Refuses limits that contradict each other.
    pub fn check(&self) -> Result<(), LimitError> {
        let kinds = [&self.bytes, &self.requests];
        if kinds.iter().any(|kind| kind.conflicts(|rate| rate.average) || kind.conflicts(|rate| rate.burst)) {
            return Err(LimitError::TotalAndKind);
        }
        if self.request_size > 0 && self.requests.all().iter().all(|rate| rate.average == 0) {
            return Err(LimitError::SizeWithoutRequests);
        }
        kinds.iter().flat_map(|kind| kind.all()).try_for_each(Rate::check)
    }

    /// The limits in the order of a group's levels: bytes of all requests, of reads, of writes, then
    /// requests.
    fn in_order(&self) -> [&Rate; LEVELS] {
        let [a, b, c] = self.bytes.all();
        let [d, e, f] = self.requests.all();
        [a, b, c, d, e, f]
    }

    /// What a request of `len` bytes counts for, in the same order.
    fn costs(&self, kind: RequestKind, len: u64) -> [f64; LEVELS] {
        let bytes = len as f64;
        let requests = match self.request_size {
            0 => 1.0,
            size => (bytes / size as f64).max(1.0),
        };
        match kind {
            RequestKind::Read => [bytes, bytes, 0.0, requests, requests, 0.0],
            RequestKind::Write => [bytes, 0.0, bytes, requests, 0.0, requests],
        }
    }
}

impl Rate {
    fn check(&self) -> Result<(), LimitError> {
        match *self {
            Self { average, burst, .. } if average.max(burst) > MAX_RATE => {
                Err(LimitError::TooLarge(MAX_RATE))
            }
            Self { burst_seconds: 0, .. } => Err(LimitError::NoBurstTime),
            Self { burst: 0, burst_seconds: 2.., .. } => Err(LimitError::BurstTimeWithoutRate),
            Self { burst: 0, .. } => Ok(()),
            Self { burst, burst_seconds, .. } if burst_seconds > MAX_RATE / burst => {
                Err(LimitError::BurstTooLong)
            }
            Self { average: 0, .. } => Err(LimitError::BurstWithoutAverage),
            Self { average, burst, .. } if burst < average => Err(LimitError::BurstBelowAverage),
            _ => Ok(()),
        }
    }
}

/// What a request does, as far as limits tell requests apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// It reads.
    Read,
    /// It writes, zeroes or discards.
    Write,
}

/// Several disks that keep limits together. A request goes as soon as the ones before it are paid for,
/// however large it is itself; the next one waits for it.
pub struct ThrottleGroup {
    limits: ThrottleLimits,
    pace: Box<dyn Pace>,
    state: Mutex<State>,
}

impl fmt::Debug for ThrottleGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThrottleGroup").field("limits", &self.limits).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    /// When the levels were right.
    at: Duration,
    levels: [Level; LEVELS],
}

/// What has gone and is not paid for yet.
#[derive(Clone, Copy, Default)]
struct Level {
    /// At the average rate.
    average: f64,
    /// At the rate of bursts.
    burst: f64,
}

impl Level {
    fn pay(&mut self, rate: &Rate, seconds: f64) {
        self.average = (self.average - rate.average as f64 * seconds).max(0.0);
        self.burst = (self.burst - rate.burst as f64 * seconds).max(0.0);
    }

    /// Seconds until the next request may go.
    fn seconds_left(&self, rate: &Rate) -> f64 {
        let (average, burst) = (rate.average as f64, rate.burst as f64);
        if rate.average == 0 {
            return 0.0;
        }
        let room = match rate.burst {
            0 => average * BURST_WITHOUT_RATE,
            _ => burst * rate.burst_seconds as f64,
        };
        let left = ((self.average - room) / average).max(0.0);
        if rate.burst_seconds < 2 {
            return left;
        }
        // A long burst has a rate of its own to keep.
        left.max((self.burst - burst * BURST_WITHOUT_RATE) / burst)
    }
}

impl ThrottleGroup {
    /// A group that keeps `limits`, measured and waited for with `pace`. Errors: limits that contradict each
    /// other.
    pub fn new(limits: ThrottleLimits, pace: impl Pace + 'static) -> Result<Self, LimitError> {
        limits.check()?;
        Ok(Self { limits, pace: Box::new(pace), state: Mutex::default() })
    }

    /// The limits.
    pub fn limits(&self) -> &ThrottleLimits {
        &self.limits
    }

    /// Waits until a request of `len` bytes may go, and counts it.
    pub fn pass(&self, kind: RequestKind, len: u64) {
        while let Some(time) = self.time_left(kind, len) {
            self.pace.wait(time);
        }
    }

    /// How long such a request has to wait; `None`: it may go, and is counted.
    fn time_left(&self, kind: RequestKind, len: u64) -> Option<Duration> {
        let (rates, costs) = (self.limits.in_order(), self.limits.costs(kind, len));
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.pace.now().max(state.at);
        let seconds = (now - state.at).as_secs_f64();
        state.at = now;
        let mut longest = 0f64;
        for ((level, rate), cost) in state.levels.iter_mut().zip(rates).zip(costs) {
            level.pay(rate, seconds);
            if cost > 0.0 {
                longest = longest.max(level.seconds_left(rate));
            }
        }
        // What rounds to nothing would be waited for without end.
        let wait = Duration::try_from_secs_f64(longest).unwrap_or(Duration::MAX);
        if !wait.is_zero() {
            return Some(wait);
        }
        for ((level, rate), cost) in state.levels.iter_mut().zip(rates).zip(costs) {
            if rate.average > 0 {
                level.average += cost;
                level.burst += cost;
            }
        }
        None
    }
}

const LEVELS: usize = 6;
/// Seconds' worth that may go at once where no burst is allowed for.
const BURST_WITHOUT_RATE: f64 = 0.1;
/// The largest rate, and the most units of a burst.
const MAX_RATE: u64 = 1_000_000_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Time that passes by being waited for.
    #[derive(Clone, Default)]
    struct Waited(Arc<Mutex<Duration>>);

    impl Pace for Waited {
        fn now(&self) -> Duration {
            *self.0.lock().unwrap()
        }

        fn wait(&self, time: Duration) {
            *self.0.lock().unwrap() += time;
        }
    }

    /// Milliseconds that `requests` take one after the other under `limits`.
    #[track_caller]
    fn check(limits: ThrottleLimits, requests: &[(RequestKind, u64)], milliseconds: u128) {
        let time = Waited::default();
        let group = ThrottleGroup::new(limits, time.clone()).unwrap();
        requests.iter().for_each(|(kind, len)| group.pass(*kind, *len));
        assert_eq!((time.now() + Duration::from_micros(1)).as_millis(), milliseconds);
    }

    fn rate(average: u64, burst: u64, burst_seconds: u64) -> Rate {
        Rate { average, burst, burst_seconds }
    }

    #[test]
    fn requests_wait_for_the_ones_before() {
        use RequestKind::{Read, Write};
        let mut limits = ThrottleLimits::default();
        limits.requests.total = rate(10, 0, 1);
        // One may go at once, and one is a tenth of a second's worth.
        check(limits, &[(Write, 1 << 40); 2], 0);
        check(limits, &[(Write, 1), (Read, 1), (Write, 1), (Read, 1), (Write, 1)], 300);
        limits.request_size = 512;
        check(limits, &[(Read, 5120), (Read, 1)], 900);

        let mut limits = ThrottleLimits::default();
        limits.bytes.write = rate(1000, 0, 1);
        check(limits, &[(Write, 1100), (Write, 1)], 1000);
        check(limits, &[(Write, 1100), (Read, 1 << 30), (Read, 1)], 0);
        check(ThrottleLimits::default(), &[(Write, u64::MAX), (Write, u64::MAX)], 0);
    }

    #[test]
    fn a_burst_is_faster_until_it_is_used_up() {
        let mut limits = ThrottleLimits::default();
        limits.bytes.total = rate(100, 1000, 1);
        check(limits, &[(RequestKind::Read, 1000), (RequestKind::Read, 50), (RequestKind::Read, 1)], 500);
        limits.bytes.total = rate(100, 1000, 2);
        // Two seconds' worth at 1,000 a second, of which a tenth may go at once.
        check(limits, &[(RequestKind::Read, 1000), (RequestKind::Read, 1)], 900);
    }

    #[test]
    fn limits_that_contradict_each_other() {
        let refused = |set: &dyn Fn(&mut ThrottleLimits)| {
            let mut limits = ThrottleLimits::default();
            set(&mut limits);
            limits.check().unwrap_err()
        };
        use LimitError as E;
        for (expected, total, read) in [
            (E::TotalAndKind, rate(1, 0, 1), rate(1, 0, 1)),
            (E::TooLarge(MAX_RATE), rate(MAX_RATE + 1, 0, 1), Rate::default()),
            (E::NoBurstTime, rate(1, 1, 0), Rate::default()),
            (E::BurstTimeWithoutRate, rate(1, 0, 2), Rate::default()),
            (E::BurstTooLong, rate(1, MAX_RATE, 2), Rate::default()),
            (E::BurstWithoutAverage, rate(0, 1, 1), Rate::default()),
            (E::BurstBelowAverage, rate(2, 1, 1), Rate::default()),
        ] {
            let error = refused(&|limits| (limits.bytes.total, limits.bytes.read) = (total, read));
            assert_eq!(error, expected);
        }
        let mut limits = ThrottleLimits { request_size: 512, ..ThrottleLimits::default() };
        assert_eq!(limits.check(), Err(E::SizeWithoutRequests));
        limits.requests.read.average = 1;
        assert_eq!(limits.check(), Ok(()));
    }
}
