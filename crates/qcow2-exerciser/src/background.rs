//! Background requests: one thread each, reported when a later command collects them.

use crate::outcome::Outcome;
use std::collections::VecDeque;
use std::thread::{Builder, JoinHandle};

/// Requests that have been started and not yet reported, oldest first.
#[derive(Default)]
pub(crate) struct Background {
    running: VecDeque<JoinHandle<Outcome>>,
    /// Requests that were refused when they were started.
    refused: Vec<Outcome>,
}

/// Maximum number of requests in flight. Starting one more waits for the oldest.
const MAX_IN_FLIGHT: usize = 128;

impl Background {
    /// Starts a request on a new thread. Returns the outcomes of older requests that had to be waited for, or
    /// the failure to start a thread.
    pub(crate) fn start(&mut self, request: impl FnOnce() -> Outcome + Send + 'static) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        while self.running.len() >= MAX_IN_FLIGHT {
            outcomes.extend(self.running.pop_front().map(finish));
        }
        match Builder::new().spawn(request) {
            Ok(thread) => self.running.push_back(thread),
            Err(error) => outcomes.push(Outcome::complaint(format!("cannot start a thread: {error}"))),
        }
        outcomes
    }

    /// Adds a request that was refused when it was started.
    pub(crate) fn add_refused(&mut self, outcome: Outcome) {
        self.refused.push(outcome);
    }

    /// Outcomes of the requests that have finished: those that were refused, as in qemu-io the last one
    /// first, then the others in the order in which they were started. Stops at the first one that is still
    /// running, so that the order of reports is the order of the commands.
    pub(crate) fn finished(&mut self) -> Vec<Outcome> {
        let mut outcomes: Vec<Outcome> = self.refused.drain(..).rev().collect();
        while self.running.front().is_some_and(JoinHandle::is_finished) {
            outcomes.extend(self.running.pop_front().map(finish));
        }
        outcomes
    }

    /// Waits for all requests in flight and returns their outcomes, oldest first.
    pub(crate) fn wait(&mut self) -> Vec<Outcome> {
        self.refused.drain(..).rev().chain(self.running.drain(..).map(finish)).collect()
    }
}

fn finish(thread: JoinHandle<Outcome>) -> Outcome {
    thread.join().unwrap_or_else(|_| Outcome::complaint("a request in the background panicked".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn outcome(text: &str) -> Outcome {
        Outcome::success(text.to_owned())
    }

    fn texts(outcomes: Vec<Outcome>) -> Vec<String> {
        outcomes.into_iter().map(|outcome| outcome.text).collect()
    }

    #[test]
    fn requests_run_in_parallel_and_are_reported_in_start_order() {
        let mut background = Background::default();
        let (sender, receiver) = mpsc::channel();
        // The first request ends only after the second has run: they must run in parallel.
        background.start(move || {
            receiver.recv().unwrap();
            outcome("first")
        });
        assert!(background.finished().is_empty());
        background.start(move || {
            sender.send(()).unwrap();
            outcome("second")
        });
        assert_eq!(texts(background.wait()), ["first", "second"]);
        assert!(background.wait().is_empty());
    }

    #[test]
    fn at_most_128_requests_are_in_flight() {
        let mut background = Background::default();
        let mut reported = 0;
        for _ in 0..MAX_IN_FLIGHT + 10 {
            reported += background.start(|| outcome("")).len();
        }
        assert_eq!(reported, 10);
        assert_eq!(background.wait().len(), MAX_IN_FLIGHT);
    }
}
