//! A failing storage: the error is reported and counted, and the disk can still be used.

#![allow(clippy::unwrap_used, reason = "helpers of a test")]

mod common;

use common::{OneDisk, Transcript, words};
use qcow2_exerciser::{Exerciser, OpenRequest, Ports};
use qcow2_io::MemoryStorage;
use qcow2_testkit::fault::{Call, Fault, FaultPlan, FaultStorage};
use std::sync::Arc;

const SIZE: u64 = 1 << 20;

fn plan(call: Call, fault: Fault) -> Option<FaultPlan> {
    Some(FaultPlan { calls: vec![call], nth: 0, sticky: true, fault })
}

/// Runs `line` on a raw disk whose calls of one kind fail; then, without faults, a write and a read.
#[track_caller]
fn check(call: Call, fault: Fault, line: &str, expected: &str, counts: bool) {
    let storage = Arc::new(FaultStorage::new(Arc::new(MemoryStorage::with_len(SIZE))));
    let disk = OneDisk::raw(storage.clone());
    let text = Transcript::default();
    let mut exerciser = Exerciser::new(Ports { opener: &disk, console: &text, words: &words });
    assert!(exerciser.open(OpenRequest::default()));
    storage.set_plan(plan(call, fault));
    exerciser.execute(line);
    exerciser.execute("aio_flush");
    assert!(storage.fired() > 0, "{line}: nothing failed");
    assert_eq!((&*text.take(), exerciser.has_failed()), (expected, counts), "{line}");
    storage.set_plan(None);
    exerciser.execute("write -q -P 9 512 1k");
    exerciser.execute("read -q -P 9 512 1k");
    exerciser.finish();
    assert_eq!(text.take(), "", "after {line}");
}

#[test]
fn failed_requests_report_the_error() {
    check(Call::Read, Fault::Io, "read 0 512", "read failed: <Io>", true);
    check(Call::Read, Fault::Io, "readv -P 0 -v 0 512", "readv failed: <Io>", true);
    check(Call::Write, Fault::Io, "write 0 512", "write failed: <Io>", true);
    check(Call::Write, Fault::NoSpace, "writev 0 512", "writev failed: <NoSpace>", true);
    check(Call::WriteZeroes, Fault::Io, "write -z 0 64k", "write failed: <Io>", true);
    check(Call::Discard, Fault::Io, "discard 0 64k", "discard failed: <Io>", true);
    check(Call::SetLen, Fault::NoSpace, "truncate 2M", "! tool: Could not resize: <NoSpace>", true);
    check(
        Call::Allocate,
        Fault::NoSpace,
        "truncate -m falloc 2M",
        "! tool: Could not resize: <NoSpace>",
        true,
    );
}

#[test]
fn failed_flush_fails_a_writethrough_write() {
    check(Call::Flush, Fault::Io, "flush", "! flush failed: <Io>", true);
    check(Call::Flush, Fault::Io, "write -q 0 512", "write failed: <Io>", true);
    check(Call::Flush, Fault::Io, "write -q -z 0 512", "write failed: <Io>", true);
    check(Call::Flush, Fault::Io, "aio_write -q 0 512", "aio_write failed: <Io>", false);
}

#[test]
fn background_failures_are_reported_and_do_not_count() {
    check(Call::Read, Fault::Io, "aio_read 0 512", "readv failed: <Io>", false);
    check(Call::Write, Fault::Io, "aio_write 0 512", "aio_write failed: <Io>", false);
}

/// Runs lines on an image. From line `from` on, every call of the kind fails.
fn on_image(lines: &[&str], from: usize, call: Call) -> (String, bool) {
    let storage = Arc::new(FaultStorage::new(Arc::new(MemoryStorage::new())));
    let disk = OneDisk::qcow2(storage.clone(), SIZE, 65536, None);
    let text = Transcript::default();
    let mut exerciser = Exerciser::new(Ports { opener: &disk, console: &text, words: &words });
    for (number, line) in lines.iter().enumerate() {
        if number == from {
            storage.set_plan(plan(call, Fault::Io));
        }
        exerciser.execute(line);
    }
    exerciser.finish();
    (text.take(), exerciser.has_failed())
}

#[test]
fn failed_open_and_close_are_reported() {
    let (text, failed) = on_image(&["open disk", "length"], 0, Call::Read);
    assert_eq!(text, "! tool: can't open device disk: <Io>\n! no file open, try 'help open'");
    assert!(failed);
    let lines = ["open -t writeback disk", "write -q 0 64k", "close", "length"];
    let (text, failed) = on_image(&lines, 2, Call::Write);
    let [l2, refcounts] = ["L2 table", "refcount block"]
        .map(|cache| format!("! tool: Failed to flush the {cache} cache: <Io>"));
    assert_eq!(text, format!("{l2}\n{refcounts}\n! no file open, try 'help open'"));
    assert!(failed, "length without a disk");
    assert!(!on_image(&lines[..3], 2, Call::Write).1, "a failed close fails no command");
}

#[test]
fn failed_reopen_leaves_no_disk_open() {
    let (text, failed) = on_image(&["open disk", "reopen -r", "length"], 1, Call::Read);
    assert_eq!(text, "! tool: <Io>\n! tool: can't open device disk: <Io>\n! no file open, try 'help open'");
    assert!(failed);
}
