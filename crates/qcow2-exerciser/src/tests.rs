//! Commands as typed, on disks in memory.

use crate::{Console, Exerciser, Flow, OpenRequest, OpenedDisk, Opener, Ports, Refusal};
use qcow2_core::RawDisk;
use qcow2_io::{CacheMode, MemoryStorage, TraceStorage};
use std::cell::{Cell, RefCell};
use std::sync::Arc;

/// Opens the same memory every time.
struct Memory {
    storage: Arc<TraceStorage>,
    opened: Cell<u32>,
}

impl Opener for Memory {
    fn open(&self, request: &OpenRequest) -> Result<OpenedDisk, Refusal> {
        if request.path.as_deref() != Some("disk") {
            return Err(Refusal { reason: "no such disk".to_owned(), hints: vec!["look again".to_owned()] });
        }
        self.opened.set(self.opened.get() + 1);
        let writable = !request.read_only;
        let disk = RawDisk::new(self.storage.clone(), writable).unwrap();
        let mut disk = OpenedDisk::new(Arc::new(disk), writable);
        disk.durable_writes = request.cache.is_writethrough();
        disk.discards = request.discards;
        Ok(disk)
    }

    fn read_file(&self, name: &str, limit: u64) -> std::io::Result<Vec<u8>> {
        match name {
            "abc" => Ok(b"abc"[..limit.min(3) as usize].to_vec()),
            "empty" => Ok(Vec::new()),
            _ => Err(std::io::Error::from_raw_os_error(2)),
        }
    }
}

/// Both streams in one, in order; lines of standard error start with `! `.
#[derive(Default)]
struct Heard(RefCell<String>);

impl Console for Heard {
    fn out(&self, text: &str) {
        self.0.borrow_mut().push_str(text);
    }

    fn complain(&self, line: &str) {
        self.out(&format!("! {line}\n"));
    }

    fn complain_named(&self, text: &str) {
        self.complain(&format!("tool: {text}"));
    }
}

struct Run {
    heard: String,
    failed: bool,
    counts: qcow2_io::StorageCounts,
    opened: u32,
    flows: Vec<Flow>,
}

/// Runs commands on a 1 MiB disk in memory, opened with `request`. Times and rates are removed from the text.
fn run(request: OpenRequest, commands: &[&str]) -> Run {
    let storage = Arc::new(TraceStorage::new(Arc::new(MemoryStorage::with_len(1 << 20))));
    let opener = Memory { storage: storage.clone(), opened: Cell::new(0) };
    let heard = Heard::default();
    let words = |error: &(dyn std::error::Error + 'static)| error.to_string();
    let mut exerciser = Exerciser::new(Ports { opener: &opener, console: &heard, words: &words });
    if request.path.is_some() {
        assert!(exerciser.open(request));
    }
    let mut flows = Vec::new();
    for line in commands {
        flows.push(exerciser.execute(line));
        if flows.last() == Some(&Flow::Quit) {
            break;
        }
    }
    exerciser.finish();
    let failed = exerciser.has_failed();
    let lines: Vec<String> = heard.0.borrow().lines().map(without_times).collect();
    Run { heard: lines.join("\n"), failed, counts: storage.counts(), opened: opener.opened.get(), flows }
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
fn pattern_is_verified_in_every_piece_of_a_long_request() {
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
fn commands_after_a_failed_one_still_run() {
    check(
        &["foo", "read 0", "read 2M 1", "write -x 0 1", "length", "", "quit", "length"],
        &[
            "! command \"foo\" not found",
            "! bad argument count 1 to read, expected at least 2 arguments",
            "read failed: Input/output error",
            "! write: invalid option -- 'x'",
            "write [-bcCfnqruz] [-P pattern | -s source_file] off len -- \
             write a pattern, a file's content or zeroes",
            "1 MiB",
        ],
        true,
    );
}

#[test]
fn read_only_disk_refuses_every_writing_command() {
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
fn only_writethrough_flushes_after_every_write() {
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
fn ignored_discards_are_reported_and_change_nothing() {
    for (discards, count) in [(true, 1), (false, 0)] {
        let run = run(OpenRequest { discards, ..writable() }, &["discard 0 64k"]);
        assert_eq!(run.heard, "discard 65536/65536 bytes at offset 0\n64 KiB, 1 ops");
        assert_eq!(run.counts.discards, count);
    }
}

#[test]
fn background_requests_are_reported_in_order_when_waited_for() {
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
            // Refused at once, so told first, as by qemu-io.
            "readv failed: Input/output error",
            "Pattern verification failed at offset 0, 4096 bytes",
            "read 4096/4096 bytes at offset 0",
            "4 KiB, 1 ops",
            "! no file open, try 'help open'",
        ],
        true,
    );
    // Their failures don't count.
    assert!(!run(writable(), &["aio_read 2M 1"]).failed);
}

#[test]
fn open_close_and_reopen() {
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
        "format name: raw",
        "cluster size: 0 bytes",
        "vm state offset: 0 bytes",
        "! tool: Block node is read-only",
        "! tool: Cannot change the option 'foo'",
        "! tool: Cannot set both -c and the cache options",
        "! no file open, try 'help open'",
    ];
    assert_eq!(run.heard, expected.join("\n"));
    assert_eq!(run.opened, 3);
}

#[test]
fn write_s_repeats_the_content_of_a_file() {
    check(
        &[
            "write -q -s abc 5 7",
            "read -v 4 9",
            "write -q -s empty 0 1",
            "write -q -s missing 0 1",
            "write -q -s abc 0 40000000",
            "write -q -s abc 0 2",
        ],
        &[
            "00000004:  00 61 62 63 61 62 63 61 00  .abcabca.",
            "read 9/9 bytes at offset 4",
            "9 bytes, 1 ops",
            "! empty: file is empty",
            "! missing: No such file or directory",
            "write failed: Input/output error",
        ],
        true,
    );
}

#[test]
fn sigraise_and_abort_are_left_to_the_caller() {
    let run = run(writable(), &["sigraise 0", "sigraise 10", "abort", "sigraise 66", "quit", "length"]);
    assert_eq!(run.flows, [Flow::Continue, Flow::Raise(10), Flow::Abort, Flow::Continue, Flow::Quit]);
    assert_eq!(run.heard, "signal argument '66' is too large to be a valid signal");
}

#[test]
fn partial_last_sector_is_shown_as_a_whole_one() {
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
