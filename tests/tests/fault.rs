//! Every storage call of a workload fails in turn, in every way: nothing panics, hangs or loses flushed data.
#![allow(clippy::print_stdout, reason = "the story of a violation must be seen")]

use qcow2_testkit::sim::{FaultReport, fault_seed};
use std::sync::mpsc;
use std::time::Duration;

/// Much longer than any seed takes: a hang becomes a failure.
const PATIENCE: Duration = Duration::from_secs(60);

fn check(seed: u64) -> FaultReport {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(fault_seed(seed)));
    let result = receiver.recv_timeout(PATIENCE);
    match result.unwrap_or_else(|_| panic!("seed {seed}: no end after {PATIENCE:?}")) {
        Ok(report) => report,
        Err(violation) => panic!("{violation}"),
    }
}

#[test]
fn every_failing_storage_call_is_survived() {
    let (mut runs, mut poisoned) = (0, 0);
    for seed in 0..16 {
        let report = check(seed);
        runs += report.runs;
        poisoned += report.poisoned;
    }
    println!("{runs} runs with a failing call, {poisoned} images poisoned");
    assert!(runs > 1000 && poisoned > 100, "{runs} {poisoned}");
}
