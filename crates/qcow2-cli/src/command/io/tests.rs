//! Commands as typed, on disks in memory.

use super::command::Command;
use super::console::Console;
use super::exerciser::{Exerciser, Flow, OpenedFile, Opener};
use super::parse::{Complaint, parse};
use super::request::OpenRequest;
use super::table::find;
use super::target::Target;
use super::words::split;
use qcow2_core::{GuestDisk, RawDisk};
use qcow2_io::{CacheMode, MemoryStorage, TraceStorage};
use std::cell::{Cell, RefCell};
use std::io::{self, Write};
use std::rc::Rc;
use std::sync::Arc;

/// What a line is understood as.
fn understand(line: &str) -> Result<Command, Complaint> {
    let words = split(line);
    parse(find(words[0]).unwrap(), &words[1..])
}

#[track_caller]
fn refused(line: &str, expected: Complaint) {
    assert_eq!(understand(line).unwrap_err(), expected, "{line}");
}

#[test]
fn requests_in_all_their_forms() {
    for (line, expected) in [
        (
            "read -v -P 7 -s 10 -l 20 1k 512",
            "Read(Read { range: Range { offset: 1024, len: 512 }, manner: Plain, style: Style { quiet: false, csv: false }, \
             dump: true, check: Some(Check { byte: 7, skip: 10, len: 20 }), vm_state: false })",
        ),
        (
            "readv 0 1k 2k -qC",
            "Read(Read { range: Range { offset: 0, len: 3072 }, manner: Vectored, style: Style { quiet: true, csv: true }, \
             dump: false, check: None, vm_state: false })",
        ),
        (
            "write -z -u -n -f 0 3G",
            "Write(Write { range: Range { offset: 0, len: 3221225472 }, manner: Plain, \
             style: Style { quiet: false, csv: false }, content: Zeroes { may_unmap: true, only_fast: true }, durable: true, \
             place: Disk })",
        ),
        (
            "w -c -s file 64k 64k",
            "Write(Write { range: Range { offset: 65536, len: 65536 }, manner: Plain, \
             style: Style { quiet: false, csv: false }, content: File(\"file\"), durable: false, place: Compressed })",
        ),
        (
            "aio_write 5 6",
            "Write(Write { range: Range { offset: 5, len: 6 }, manner: Background, style: Style { quiet: false, csv: false }, \
             content: Byte(205), durable: false, place: Disk })",
        ),
        ("alloc 1k", "Alloc(Range { offset: 1024, len: 512 })"),
        ("truncate -m off 1M", "Truncate { size: 1048576, preallocation: None }"),
        ("sleep 0x10", "Sleep { milliseconds: 16 }"),
        ("reopen -w", "Reopen(Reopen { read_only: Some(false), cache: None, options: [] })"),
        ("aio_read -i nonsense", "Inject(\"injecting invalid read request\")"),
    ] {
        assert_eq!(format!("{:?}", understand(line).unwrap()), expected, "{line}");
    }
}

#[test]
fn refusals() {
    let out = |text: &str| Complaint::Out(text.to_owned());
    refused("read 0 1 2", Complaint::Usage(None));
    refused("read -s 1 0 1k", Complaint::Usage(None));
    refused("read -x 0 1", Complaint::Usage(Some("read: invalid option -- 'x'".to_owned())));
    refused("read -P 0 -s 513 0 512", out("pattern verification range exceeds end of read data"));
    refused("read -P 0 -s 12 -l 501 0 512", out("pattern verification range exceeds end of read data"));
    refused("read -b 0 100", out("100 is not a sector-aligned value for 'count'"));
    refused("write -n 0 1", out("-n requires -z to be specified"));
    refused("write -u 0 1", out("-u requires -z to be specified"));
    refused("write -bz 0 1", out("-b and -z cannot be specified at the same time"));
    refused("write -fc 0 1", out("-f and -b or -c cannot be specified at the same time"));
    refused("write -z -P 1 0 1", out("Only one of -z, -P, and -s can be specified at the same time"));
    refused("write -z 0 2G", out("length cannot exceed 2147483136 without -n, given 2G"));
    refused("aio_write -z 0 1 1", out("-z supports only a single length parameter"));
    refused("truncate -m some 0", Complaint::Named("Invalid preallocation mode 'some'".to_owned()));
    refused("reopen -r -w", Complaint::Named("Only one -r/-w option may be given".to_owned()));
    refused("sleep 1k", out("1k is not a valid number"));
    refused("sigraise 66", out("signal argument '66' is too large to be a valid signal"));
    refused(
        "zone_open 0 1x",
        out("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- 1x"),
    );
}

/// Opens the same memory again and again.
struct Memory {
    storage: Arc<TraceStorage>,
    opened: Cell<u32>,
}

impl Opener for Memory {
    fn open(&self, request: &OpenRequest) -> Result<OpenedFile, Vec<String>> {
        if request.path.as_deref() != Some("disk") {
            return Err(vec!["no such disk".to_owned(), "look again".to_owned()]);
        }
        self.opened.set(self.opened.get() + 1);
        let writable = !request.read_only;
        let disk: Arc<dyn GuestDisk> =
            Arc::new(RawDisk::new(self.storage.clone(), writable).map_err(|error| vec![error.to_string()])?);
        let target =
            Target { disk, durable_writes: request.cache.is_writethrough(), discards: request.discards };
        Ok(OpenedFile {
            target,
            writable,
            info: Box::new(|| Ok("a disk\n".to_owned())),
            warnings: Vec::new(),
            debugger: None,
        })
    }
}

/// Both outputs in one, in order; complaints after `! `.
#[derive(Clone, Default)]
struct Heard(Rc<RefCell<String>>);

struct Ear {
    heard: Heard,
    prefix: &'static str,
}

impl Write for Ear {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.heard.0.borrow_mut().push_str(&format!("{}{}", self.prefix, String::from_utf8_lossy(bytes)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Run {
    heard: String,
    failed: bool,
    counts: qcow2_io::StorageCounts,
    opened: u32,
}

/// Runs commands on a disk of 1 MiB in memory, opened as `request` says; times and rates are left out of the
/// text.
fn run(request: OpenRequest, commands: &[&str]) -> Run {
    let storage = Arc::new(TraceStorage::new(Arc::new(MemoryStorage::with_len(1 << 20))));
    let opener = Memory { storage: storage.clone(), opened: Cell::new(0) };
    let heard = Heard::default();
    // Whole lines come here, however they were written.
    let ear = |prefix| Box::new(io::LineWriter::new(Ear { heard: heard.clone(), prefix }));
    let mut exerciser = Exerciser::new(Console::new("tool", ear(""), ear("! ")), &opener);
    if request.path.is_some() {
        assert!(exerciser.open_first(request));
    }
    let _ = commands.iter().all(|line| exerciser.execute(line) == Flow::Continue);
    exerciser.finish();
    let failed = exerciser.has_failed();
    drop(exerciser);
    let lines: Vec<String> = heard.0.borrow().lines().map(without_times).collect();
    Run { heard: lines.join("\n"), failed, counts: storage.counts(), opened: opener.opened.get() }
}

fn without_times(line: &str) -> String {
    match line.split_once(" ops; ") {
        Some((start, _)) => format!("{start} ops"),
        None => line.to_owned(),
    }
}

fn writable() -> OpenRequest {
    OpenRequest { path: Some("disk".to_owned()), ..OpenRequest::default() }
}

#[track_caller]
fn check(commands: &[&str], expected: &[&str], failed: bool) {
    let run = run(writable(), commands);
    assert_eq!(run.heard, expected.join("\n"));
    assert_eq!(run.failed, failed);
}

#[test]
fn writes_are_read_back() {
    check(
        &["write -P 7 10 20", "read -P 7 10 20", "read -v 8 4", "readv -P 8 10 1 1", "read -q -P 7 10 20"],
        &[
            "wrote 20/20 bytes at offset 10",
            "20 bytes, 1 ops",
            "read 20/20 bytes at offset 10",
            "20 bytes, 1 ops",
            "00000008:  00 00 07 07  ....",
            "read 4/4 bytes at offset 8",
            "4 bytes, 1 ops",
            "Pattern verification failed at offset 10, 2 bytes",
            "read 2/2 bytes at offset 10",
            "2 bytes, 1 ops",
        ],
        true,
    );
}

#[test]
fn a_long_request_is_checked_in_every_piece() {
    let long = "truncate 200M";
    let expected = [
        "Pattern verification failed at offset 100000000, 200 bytes",
        "read 104857700/104857700 bytes at offset 0",
        "100 MiB, 1 ops",
    ];
    check(
        &[
            long,
            "write -q -P 1 0 104857700",
            "write -q -P 2 100000050 1",
            "read -P 1 -s 100000000 -l 200 0 104857700",
        ],
        &expected,
        true,
    );
    check(
        &[
            long,
            "write -q -P 1 0 104857700",
            "write -q -P 2 100000200 1",
            "read -q -P 1 -s 100000000 -l 200 0 104857700",
        ],
        &[],
        false,
    );
}

#[test]
fn failures_do_not_stop_the_rest() {
    check(
        &["foo", "read 0", "read 2M 1", "write -x 0 1", "length", "", "quit", "length"],
        &[
            "! command \"foo\" not found",
            "! bad argument count 1 to read, expected at least 2 arguments",
            "read failed: Input/output error",
            "! write: invalid option -- 'x'",
            "write [-bcCfnqruz] [-P pattern | -s source_file] off len -- write a pattern, a file's content or zeroes",
            "1 MiB",
        ],
        true,
    );
}

#[test]
fn a_disk_opened_for_reading_is_not_written() {
    let request = OpenRequest { read_only: true, ..writable() };
    let run =
        run(request, &["write", "write x", "write 1 2 3", "discard 0 1", "truncate 0", "flush", "length"]);
    let lines: Vec<&str> = run.heard.lines().collect();
    assert_eq!(lines[0], "! bad argument count 0 to write, expected at least 2 arguments");
    assert_eq!(lines[1], "! bad argument count 1 to write, expected at least 2 arguments");
    assert_eq!(lines[2..5], ["! tool: Block node is read-only"; 3]);
    assert_eq!(lines[5..], ["1 MiB"]);
    assert_eq!((run.counts.writes, run.counts.set_lens), (0, 0));
}

#[test]
fn every_write_is_durable_unless_the_cache_mode_says_otherwise() {
    let commands = [
        "write -q 0 512",
        "writev -q 0 512",
        "write -q -z 0 512",
        "discard -q 0 512",
        "aio_write -q 0 512",
        "aio_flush",
    ];
    let flushes = |cache| run(OpenRequest { cache, ..writable() }, &commands).counts.flushes;
    assert_eq!(flushes(CacheMode::Writethrough), 4);
    assert_eq!(flushes(CacheMode::Writeback), 0);
    let forced =
        run(OpenRequest { cache: CacheMode::Writeback, ..writable() }, &["write -q -f 0 512", "flush"]);
    assert_eq!(forced.counts.flushes, 2);
}

#[test]
fn discards_are_left_out_where_they_are_ignored() {
    for (discards, count) in [(true, 1), (false, 0)] {
        let run = run(OpenRequest { discards, ..writable() }, &["discard 0 64k"]);
        assert_eq!(run.heard, "discard 65536/65536 bytes at offset 0\n64 KiB, 1 ops");
        assert_eq!(run.counts.discards, count);
    }
}

#[test]
fn background_requests_are_told_when_they_are_waited_for() {
    check(
        &[
            "aio_write -P 3 0 4k",
            "length",
            "aio_flush",
            "aio_read -P 4 0 4k",
            "aio_read 2M 1",
            "close",
            "length",
        ],
        &[
            "1 MiB",
            "wrote 4096/4096 bytes at offset 0",
            "4 KiB, 1 ops",
            "Pattern verification failed at offset 0, 4096 bytes",
            "read 4096/4096 bytes at offset 0",
            "4 KiB, 1 ops",
            "readv failed: Input/output error",
            "! no file open, try 'help open'",
        ],
        true,
    );
    // That they fail does not count.
    assert!(!run(writable(), &["aio_read 2M 1"]).failed);
}

#[test]
fn disks_are_opened_closed_and_opened_again() {
    let run = run(
        OpenRequest::default(),
        &[
            "length",
            "open other",
            "open disk",
            "open disk",
            "info",
            "reopen -r",
            "write 0 1",
            "reopen -o foo=1",
            "reopen -c none -o cache.direct=on",
            "reopen -w",
            "write -q 0 1",
            "close",
            "map",
        ],
    );
    let expected = [
        "! no file open, try 'help open'",
        "! tool: can't open device other: no such disk",
        "! look again",
        "! tool: file open already, try 'help close'",
        "a disk",
        "! tool: Block node is read-only",
        "! tool: Cannot change the option 'foo'",
        "! tool: Cannot set both -c and the cache options",
        "! no file open, try 'help open'",
    ];
    assert_eq!(run.heard, expected.join("\n"));
    assert_eq!(run.opened, 3);
}

#[test]
fn a_file_is_written_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("abc");
    std::fs::write(&path, "abc").unwrap();
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let write = |path: &std::path::Path, range: &str| format!("write -q -s {} {range}", path.display());
    let missing = dir.path().join("missing");
    check(
        &[
            &write(&path, "5 7"),
            "read -v 4 9",
            &write(&empty, "0 1"),
            &write(&missing, "0 1"),
            &write(&path, "0 40000000"),
        ],
        &[
            "00000004:  00 61 62 63 61 62 63 61 00  .abcabca.",
            "read 9/9 bytes at offset 4",
            "9 bytes, 1 ops",
            &format!("! {}: file is empty", empty.display()),
            &format!("! {}: No such file or directory", missing.display()),
            "write failed: Input/output error",
        ],
        true,
    );
}

#[test]
fn a_disk_that_ends_inside_a_sector_is_seen_as_whole_sectors() {
    check(
        &[
            "truncate 1000",
            "length",
            "read -P 0 0 1024",
            "read -q 0 1025",
            "write -q -P 5 1000 24",
            "read -P 5 1000 24",
        ],
        &[
            "1 KiB",
            "read 1024/1024 bytes at offset 0",
            "1 KiB, 1 ops",
            "read failed: Input/output error",
            "read 24/24 bytes at offset 1000",
            "24 bytes, 1 ops",
        ],
        true,
    );
}
