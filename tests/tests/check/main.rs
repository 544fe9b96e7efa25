//! Checks of damaged images against `qemu-img check`: the same exit code, counts, statistics and lines.

mod damage;
mod random;
mod windows;
mod words;

use qcow2_io::OpenFile;
use qcow2_ops::{CheckOptions, CheckReport, Inline, Silent, check};
use std::path::Path;

/// Our report on the image at `path`.
fn report(path: &Path) -> CheckReport {
    let storage = OpenFile::read_only().open(path).expect("the image opens");
    check(&*storage, &CheckOptions::default(), &Inline, &Silent).expect("a report")
}

/// The exit code for a report.
fn exit_code(report: &CheckReport) -> i32 {
    match (report.check_errors, report.corruptions, report.leaks) {
        (1.., _, _) => 1,
        (0, 1.., _) => 2,
        (0, 0, 1..) => 3,
        (0, 0, 0) => 0,
    }
}
