//! `cargo xtask hunt`: looks for command lines on which our program differs from qemu-img and qemu-io.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a tool for the terminal")]

use qcow2_testkit::oracle::Tool;
use qcow2_tests::hunt::{Budget, Found, hunt};
use qcow2_tests::start::make_start;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

const USAGE: &str = "usage: cargo xtask hunt [--seconds N] [--lines N] [--seed N] [--threads N] [--causes N]
  --seed N with --lines 1 runs the history of that seed alone";

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
        time: Duration::from_secs(60),
        lines: u64::MAX,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
    };
    let mut causes = usize::MAX;
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().and_then(|text| text.parse::<u64>().ok());
        let value = value.ok_or_else(|| format!("{name} needs a number"))?;
        match name.as_str() {
            "--seconds" => budget.time = Duration::from_secs(value),
            "--lines" => budget.lines = value,
            "--seed" => budget.first_seed = value,
            "--threads" => budget.threads = value as usize,
            "--causes" => causes = value as usize,
            _ => return Err(format!("unknown option {name}")),
        }
    }
    let root = std::env::temp_dir().join(format!("qcow2-hunt-{}", std::process::id()));
    let report = in_folder(&root, &budget);
    let _ = std::fs::remove_dir_all(&root);
    let report = report?;
    for found in report.found.iter().take(causes) {
        println!("{} x {}", found.count, found.cause);
        println!("  seed {}: {}", found.seed, found.history.join("\n    then: "));
        println!("    {}\n", found.shown.trim_end().replace('\n', "\n    "));
    }
    println!(
        "{} lines in {} histories from seed {}: {} causes in no list, {:.2} % of the lines; {} histories differ as listed",
        report.lines,
        report.histories,
        budget.first_seed,
        report.found.len(),
        report.rate(),
        report.expected
    );
    Ok(report.found.is_empty())
}

fn in_folder(root: &Path, budget: &Budget) -> Result<qcow2_tests::hunt::Report, String> {
    let start = root.join("start");
    std::fs::create_dir_all(&start).map_err(|e| format!("{}: {e}", start.display()))?;
    make_start(&Tool::find("qemu-img").ok_or("qemu-img is needed")?, &start);
    // A long hunt shows at once what it has; the report at the end has each cause with its smallest history.
    let tell = |found: &Found| eprintln!("seed {}: {}", found.seed, found.cause);
    hunt(&ours()?, root, start, budget, &tell).ok_or_else(|| "qemu-img and qemu-io are needed".to_owned())
}

/// Our program, built beside this one.
fn ours() -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    Ok(own.with_file_name("qcow2-under-test"))
}
