//! `cargo xtask crash`: runs the crash simulation on every core, for as long as asked.
#![allow(clippy::print_stdout, reason = "a tool for the terminal")]

use qcow2_testkit::sim::{Budget, SimOptions, minimize, run_many};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str =
    "usage: cargo xtask crash [--seconds N] [--seed N] [--seeds N] [--threads N] [--violations N]
  --seed N with --seeds 1 runs that seed alone and shows its steps, as few as still go wrong";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            println!("{message}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool, String> {
    let mut budget = Budget {
        first_seed: 1,
        seeds: u64::MAX,
        time: Duration::from_secs(60),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        violations: 1,
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().and_then(|text| text.parse::<u64>().ok());
        let value = value.ok_or_else(|| format!("{name} needs a number"))?;
        match name.as_str() {
            "--seconds" => budget.time = Duration::from_secs(value),
            "--seed" => budget.first_seed = value,
            "--seeds" => budget.seeds = value,
            "--threads" => budget.threads = value as usize,
            "--violations" => budget.violations = value as usize,
            _ => return Err(format!("unknown option {name}")),
        }
    }
    let options = SimOptions::default();
    let started = Instant::now();
    let (report, violations) = run_many(&budget, &options);
    let seconds = started.elapsed().as_secs_f64();
    for violation in &violations {
        println!("VIOLATION {}", minimize(violation, &options));
        println!("again: cargo xtask crash --seeds 1 --seed {}", violation.seed);
    }
    println!(
        "{} crash images of {} cuts in {} runs ({} steps), work went on from {}: {:.0} images/s, {seconds:.1} s",
        report.images,
        report.cuts,
        report.seeds,
        report.steps,
        report.continued,
        report.images as f64 / seconds
    );
    println!("first seed {}, violations {}", budget.first_seed, violations.len());
    Ok(violations.is_empty())
}
