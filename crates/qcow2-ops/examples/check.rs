//! Checks an image with all processors: `cargo run --release -p qcow2-ops --example check -- disk.qcow2
//! [THREADS]`.
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::print_stdout,
    reason = "a program opens files, starts threads and reads the clock"
)]

use qcow2_io::OpenFile;
use qcow2_ops::{CheckOptions, Executor, Silent, check};
use std::error::Error;
use std::path::Path;
use std::time::Instant;

struct Threads(usize);

impl Executor for Threads {
    fn workers(&self) -> usize {
        self.0
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            for worker in 0..self.0 {
                scope.spawn(move || job(worker));
            }
        });
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: check IMAGE [THREADS]")?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = Threads(args.next().map_or(Ok(cores), |n| n.parse())?);

    let started = Instant::now();
    let storage = OpenFile::read_only().open(Path::new(&path))?;
    let report = check(&*storage, &CheckOptions::default(), &threads, &Silent)?;
    for found in &report.findings {
        println!("{} ({}x, {:?})", found.finding, found.times, found.finding.class());
    }
    println!(
        "{} corruptions, {} leaks, {} check errors; {} of {} clusters allocated; {:?} with {} threads",
        report.corruptions,
        report.leaks,
        report.check_errors,
        report.allocated_clusters,
        report.total_clusters,
        started.elapsed(),
        threads.workers(),
    );
    Ok(())
}
