//! A time limit for work that might never end: a hang becomes a test failure that names what hung.

use std::panic::resume_unwind;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// Runs `work` on a thread of its own and returns its result. Panics if `work` panics, or with `what` once
/// `limit` has passed; the thread then keeps running.
pub fn within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (sender, receiver) = channel();
    let thread = thread::spawn(move || {
        let result = work();
        // The receiver is gone if the limit has passed.
        let _ = sender.send(result);
    });
    match receiver.recv_timeout(limit) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => panic!("{what}: no end after {limit:?}"),
        Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => resume_unwind(panic),
            Ok(()) => panic!("{what}: ended without a result"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "sleeper: no end after 10ms")]
    fn work_past_the_limit_panics() {
        within(Duration::from_millis(10), "sleeper", || thread::sleep(Duration::from_secs(60)));
    }

    #[test]
    fn results_and_panics_are_passed_on() {
        assert_eq!(within(Duration::from_secs(60), "sum", || 2 + 2), 4);
        let panic = thread::spawn(|| within(Duration::from_secs(60), "panic", || panic!("this one")));
        assert_eq!(panic.join().unwrap_err().downcast_ref::<&str>(), Some(&"this one"));
    }
}
