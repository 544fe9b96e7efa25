//! Trees of nodes, as jobs in `cli/nodes.txt`, with qemu-img and qemu-io and with our program.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_tests::copies::copy_folder;
use qcow2_tests::side_by_side::{SideBySide, made_once};
use qcow2_tests::start::make_start;
use std::path::Path;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");
const NODES: &str = include_str!("cli/nodes.txt");

/// One test per section, so that they run in parallel. The names are the first words of the sections'
/// comments.
macro_rules! tests_by_section {
    ($($test:ident $name:literal)*) => {
        const NAMES: &[&str] = &[$($name),*];

        mod same_from_both {
            $(#[test]
            fn $test() {
                super::check($name);
            })*
        }
    };
}

tests_by_section! {
    throttle "throttle" blkverify "blkverify" copy_before_write "copy-before-write"
    copy_on_read "copy-on-read" sparse "sparse" block_status "block status"
}

/// The jobs of the section called `name`; `QCOW2_LINES=map` selects those with a line that starts with that
/// word.
fn jobs(name: &str) -> Vec<Vec<&'static str>> {
    let (mut jobs, mut wanted): (Vec<Vec<&str>>, bool) = Default::default();
    for line in NODES.lines().filter(|line| !line.is_empty()) {
        if let Some(comment) = line.strip_prefix("# ") {
            wanted = comment.starts_with(name);
            continue;
        }
        match line.strip_prefix("  ") {
            _ if !wanted => {}
            Some(next) => jobs.last_mut().unwrap().push(next),
            None => jobs.push(vec![line]),
        }
    }
    let begin = std::env::var("QCOW2_LINES").unwrap_or_default();
    assert!(!jobs.is_empty(), "a section without jobs");
    jobs.retain(|job| job.iter().any(|line| line.starts_with(&begin)));
    jobs
}

#[test]
fn every_job_belongs_to_a_test() {
    let tested: usize = NAMES.iter().map(|name| jobs(name).len()).sum();
    assert_eq!(tested, jobs("").len());
}

fn check(name: &str) {
    let root = tempfile::tempdir().unwrap();
    let made = made_once(Path::new(env!("CARGO_TARGET_TMPDIR")), include_str!("../src/start.rs"), make_start);
    let Some(made) = made else { return };
    let both = SideBySide::new(Path::new(OURS), root.path(), |_, start| copy_folder(&made.join("."), start))
        .unwrap();
    let (jobs, mut wrong) = (jobs(name), Vec::new());
    for job in &jobs {
        let run = both.run_job(job);
        if !run.differences.is_empty() {
            wrong.push(format!("{}\n{}", run.line, run.differences));
        }
    }
    assert!(wrong.is_empty(), "{} of {} jobs:\n\n{}", wrong.len(), jobs.len(), wrong.join("\n"));
}
