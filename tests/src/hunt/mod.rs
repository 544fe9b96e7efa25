//! A hunt for differences from qemu-img and qemu-io: a grammar makes histories of command lines, both tools
//! run them in folders of their own, and what differs is shrunk and grouped by cause.

mod cause;
mod grammar;
mod pair;
mod shrink;

use pair::{Difference, Pair};
use qcow2_testkit::rng::Rng;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What stays different, each below the reason: the beginnings of causes, and numbers that are not compared.
const DIFFERENT: &str = include_str!("../../tests/cli/different_causes.txt");

/// How long to hunt, and from where.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Seed of the first history; the others follow.
    pub first_seed: u64,
    /// No history begins after this time.
    pub time: Duration,
    /// Nor after this many lines.
    pub lines: u64,
    /// Threads.
    pub threads: usize,
}

/// A cause, and the smallest history that was seen to show it.
#[derive(Clone, Debug)]
pub struct Found {
    /// What differs, without names and numbers.
    pub cause: String,
    /// How many histories showed it.
    pub count: u64,
    /// Seed of the first one.
    pub seed: u64,
    /// Its lines, shrunk.
    pub history: Vec<String>,
    /// Both outcomes of the line that differs.
    pub shown: String,
}

/// What a hunt brought home.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Lines that both tools ran.
    pub lines: u64,
    /// Histories.
    pub histories: u64,
    /// Histories that differed for a reason in the list of what stays different.
    pub expected: u64,
    /// The causes that are in no list, the most frequent first.
    pub found: Vec<Found>,
}

impl Report {
    /// Share of the lines that differed for a cause in no list, in percent.
    pub fn rate(&self) -> f64 {
        let count: u64 = self.found.iter().map(|found| found.count).sum();
        100.0 * count as f64 / self.lines.max(1) as f64
    }
}

/// Hunts with our program at `ours`. `root`: an empty folder to work in; `start`: the folder in which each
/// history begins; `tell` is called with each new cause, before it is shrunk. `None`, with a printed skip, if
/// the reference is missing.
pub fn hunt(
    ours: &Path,
    root: &Path,
    start: PathBuf,
    budget: &Budget,
    tell: &(dyn Fn(&Found) + Sync),
) -> Option<Report> {
    let pair = Pair::new(ours, root, start)?;
    let started = Instant::now();
    let (next, lines) = (AtomicU64::new(budget.first_seed), AtomicU64::new(0));
    let report = Mutex::new((Report::default(), BTreeMap::<String, Found>::new()));
    let worker = || {
        while started.elapsed() < budget.time && lines.load(Ordering::Relaxed) < budget.lines {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let history = grammar::history(&mut Rng::new(seed));
            let (run, difference) = pair.run(&history);
            lines.fetch_add(run as u64, Ordering::Relaxed);
            let mut guard = report.lock().unwrap_or_else(PoisonError::into_inner);
            guard.0.histories += 1;
            let Some(difference) = difference else { continue };
            if is_expected(&difference.cause) {
                guard.0.expected += 1;
                continue;
            }
            if let Some(found) = guard.1.get_mut(&difference.cause) {
                found.count += 1;
                continue;
            }
            let found = found(seed, history.clone(), difference);
            guard.1.insert(found.cause.clone(), found.clone());
            drop(guard);
            tell(&found);
            let small = shrink::shrink(&pair, history, &found.cause);
            let mut guard = report.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(found) = guard.1.get_mut(&found.cause) {
                found.history = small;
            }
        }
    };
    thread::scope(|scope| {
        (1..budget.threads).for_each(|_| drop(scope.spawn(worker)));
        worker();
    });
    let (mut report, found) = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.lines = lines.into_inner();
    report.found = found.into_values().collect();
    report.found.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.cause.cmp(&b.cause)));
    Some(report)
}

fn found(seed: u64, history: Vec<String>, difference: Difference) -> Found {
    Found { cause: difference.cause, count: 1, seed, history, shown: difference.shown }
}

/// True if `cause` begins with an entry of the list of what stays different, or has one inside.
fn is_expected(cause: &str) -> bool {
    let entries = DIFFERENT.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    entries.into_iter().any(|entry| match entry.strip_prefix(INSIDE) {
        Some(text) => cause.contains(text),
        None => cause.starts_with(entry),
    })
}

/// What an entry begins with that is looked for anywhere in a cause.
const INSIDE: &str = "inside: ";
