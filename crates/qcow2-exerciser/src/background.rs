//! Requests in the background: each on a thread of its own, told when somebody waits for them.

use crate::outcome::Outcome;
use std::collections::VecDeque;
use std::thread::{Builder, JoinHandle};

/// The requests that were made and not yet told, oldest first.
#[derive(Default)]
pub(crate) struct Background {
    running: VecDeque<JoinHandle<Outcome>>,
}

/// How many requests may be in flight; the next one waits for the oldest.
const MAX_IN_FLIGHT: usize = 128;

impl Background {
    /// Starts a request. Returns what there is to tell of older ones.
    pub(crate) fn start(&mut self, request: impl FnOnce() -> Outcome + Send + 'static) -> Vec<Outcome> {
        let mut told = Vec::new();
        while self.running.len() >= MAX_IN_FLIGHT {
            told.extend(self.running.pop_front().map(finish));
        }
        match Builder::new().spawn(request) {
            Ok(thread) => self.running.push_back(thread),
            Err(error) => told.push(Outcome::complaint(format!("cannot start a thread: {error}"))),
        }
        told
    }

    /// What has finished meanwhile, in the order in which it was started.
    pub(crate) fn finished(&mut self) -> Vec<Outcome> {
        let mut told = Vec::new();
        while self.running.front().is_some_and(JoinHandle::is_finished) {
            told.extend(self.running.pop_front().map(finish));
        }
        told
    }

    /// Waits for all.
    pub(crate) fn wait(&mut self) -> Vec<Outcome> {
        self.running.drain(..).map(finish).collect()
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
    fn requests_run_side_by_side_and_are_told_in_order() {
        let mut background = Background::default();
        let (sender, receiver) = mpsc::channel();
        // The first ends only after the second: they must run at the same time.
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
    fn the_number_in_flight_is_bounded() {
        let mut background = Background::default();
        let mut told = 0;
        for _ in 0..MAX_IN_FLIGHT + 10 {
            told += background.start(|| outcome("")).len();
        }
        assert_eq!(told, 10);
        assert_eq!(background.wait().len(), MAX_IN_FLIGHT);
    }
}
