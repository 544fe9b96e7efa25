//! Command lines: how each is parsed, and the error text of each that is refused. What is refused, and on
//! which stream, is as in qemu-io 10.0.2; `tests/tests/cli_io/lines.txt` compares the same lines with it.

use super::table::COMMANDS;
use super::*;
use std::collections::BTreeSet;

/// Parses a line. Errors: the complaint about the number of words, or of the command's parser.
fn understand(line: &str) -> Result<Command, String> {
    let words = split(line);
    let spec = find(words[0]).unwrap();
    spec.check_count(words[0], words.len() - 1)?;
    parse(spec, &words[1..]).map_err(|complaint| match complaint {
        Complaint::Out(text) => format!("out: {text}"),
        Complaint::Named(text) => format!("named: {text}"),
        Complaint::Usage(Some(text)) => format!("usage: {text}"),
        Complaint::Usage(None) => "usage".to_owned(),
    })
}

/// A command in one line, showing only what differs from the defaults.
fn short(command: &Command) -> String {
    match command {
        Command::Read(read) => {
            let Read { range, manner, style, dump, check, vm_state } = read;
            let mut text = format!("read {manner:?} {}+{}", range.offset, range.len);
            text += if style.quiet { " quiet" } else { "" };
            text += if style.csv { " csv" } else { "" };
            text += if *dump { " dump" } else { "" };
            text += if *vm_state { " state" } else { "" };
            if let Some(Check { byte, skip, len }) = check {
                text += &format!(" all {byte} in {skip}+{len}");
            }
            text
        }
        Command::Write(write) => {
            let Write { range, manner, style, content, durable, place } = write;
            let mut text = format!("write {manner:?} {}+{} {content:?}", range.offset, range.len);
            text += if style.quiet { " quiet" } else { "" };
            text += if style.csv { " csv" } else { "" };
            text += if *durable { " durable" } else { "" };
            text += match place {
                Place::Disk => "",
                Place::Compressed => " compressed",
                Place::VmState => " state",
            };
            text
        }
        other => format!("{other:?}"),
    }
}

/// Accepted lines and the parsed command.
const ACCEPTED: &[(&str, &str)] = &[
    ("abort", "Abort"),
    ("aio_flush", "AioFlush"),
    ("aio_read 5 6", "read Background 5+6"),
    ("aio_read -P 7 -C -v 0 1k 1k", "read Background 0+2048 csv dump all 7 in 0+2048"),
    ("aio_read -i nonsense", r#"Inject("injecting invalid read request")"#),
    ("aio_read -i -P 300 0 1", r#"Inject("injecting invalid read request")"#),
    ("aio_read -i -x 0 1", r#"Inject("injecting invalid read request")"#),
    ("aio_write 5 6", "write Background 5+6 Byte(205)"),
    ("aio_write -z 0 3G", "write Background 0+3221225472 Zeroes { may_unmap: false, only_fast: false }"),
    (
        "aio_write -fqzu 0 1k",
        "write Background 0+1024 Zeroes { may_unmap: true, only_fast: false } quiet durable",
    ),
    ("aio_write -i 0", r#"Inject("injecting invalid write request")"#),
    ("alloc 1k", "Alloc(Range { offset: 1024, len: 512 })"),
    ("a 1k 3G", "Alloc(Range { offset: 1024, len: 3221225472 })"),
    ("break l2_load A", r#"Break(Set { event: "l2_load", tag: "A" })"#),
    ("close", "Close"),
    (
        "discard -Cq 0 64k",
        "Discard { range: Range { offset: 0, len: 65536 }, style: Style { quiet: true, csv: true } }",
    ),
    ("d 1 0", "Discard { range: Range { offset: 1, len: 0 }, style: Style { quiet: false, csv: false } }"),
    ("flush", "Flush"),
    ("help", "Help { command: None }"),
    ("? nonsense", r#"Help { command: Some("nonsense") }"#),
    ("info", "Info"),
    ("length", "Length"),
    ("map", "Map"),
    (
        "open -rsCnkU -t none -d unmap -i native -o a=b -o c=d x",
        r#"Open(Open { path: Some("x"), read_only: true, snapshot: true, copy_on_read: true, no"#,
    ),
    ("o -o driver=null-co", r#"Open(Open { path: None, read_only: false, "#),
    ("quit", "Quit"),
    ("q now or never", "Quit"),
    ("read 1k 512", "read Plain 1024+512"),
    ("read -v -P 7 -s 10 -l 20 1k 512", "read Plain 1024+512 dump all 7 in 10+20"),
    ("r 0 512 -P 0x10 -s 512", "read Plain 0+512 all 16 in 512+0"),
    ("read -P 1 -P 010 0 512", "read Plain 0+512 all 8 in 0+512"),
    ("read -bqCp 512 1k", "read Plain 512+1024 quiet csv state"),
    ("read 0 2147483136", "read Plain 0+2147483136"),
    ("read -- 0x10 1.5k", "read Plain 16+1536"),
    ("readv 0 1k 2k -qC", "read Vectored 0+3072 quiet csv"),
    ("readv -P 0 -rv 0 0 0", "read Vectored 0+0 dump all 0 in 0+0"),
    ("remove_break A", r#"Break(Remove { tag: "A" })"#),
    ("reopen", "Reopen(Reopen { read_only: None, cache: None, options: [] })"),
    ("reopen -w", "Reopen(Reopen { read_only: Some(false), cache: None, options: [] })"),
    (
        "reopen -r -c none -o a=b -o c",
        r#"Reopen(Reopen { read_only: Some(true), cache: Some("none"), options: ["a=b", "c"] })"#,
    ),
    ("resume A", r#"Break(Resume { tag: "A" })"#),
    ("sigraise 0", "Raise { signal: 0 }"),
    ("sigraise 65", "Raise { signal: 65 }"),
    ("sleep 0x10", "Sleep { milliseconds: 16 }"),
    ("truncate -m off 1M", "Truncate { size: 1048576, preallocation: None }"),
    ("t 1M -m full", r#"Truncate { size: 1048576, preallocation: Some("full") }"#),
    ("wait_break A", r#"Break(Wait { tag: "A" })"#),
    ("write 0 1k", "write Plain 0+1024 Byte(205)"),
    ("w -c -s file 64k 64k", r#"write Plain 65536+65536 File("file") compressed"#),
    (
        "write -z -u -n -f 0 3G",
        "write Plain 0+3221225472 Zeroes { may_unmap: true, only_fast: true } durable",
    ),
    ("write -bP 255 512 512", "write Plain 512+512 Byte(255) state"),
    ("write -pqrC 0 0", "write Plain 0+0 Byte(205) quiet csv"),
    ("writev -fqC -P 3 7 10 20", "write Vectored 7+30 Byte(3) quiet csv durable"),
    ("zone_append 0 512 512", r#"Impossible("zone append failed: Operation not supported")"#),
    ("zone_close 0 1", r#"Impossible("zone close failed: Operation not supported")"#),
    ("zone_finish 0 1", r#"Impossible("zone finish failed: Operation not supported")"#),
    ("zone_open 0 1", r#"Impossible("zone open failed: Operation not supported")"#),
    ("zone_report 0 1", r#"Impossible("zone report failed: Operation not supported")"#),
    ("zone_reset 0 1", r#"Impossible("zone reset failed: Operation not supported")"#),
];

/// Refused lines and the error text.
const REFUSED: &[(&str, &str)] = &[
    ("abort 1", "bad argument count 1 to abort, expected 0 arguments"),
    ("aio_flush 1", "bad argument count 1 to aio_flush, expected 0 arguments"),
    ("aio_read 0", "bad argument count 1 to aio_read, expected at least 2 arguments"),
    ("aio_read -q 0", "usage"),
    ("aio_read -P q 0 1", "out: q is not a valid pattern byte"),
    ("aio_read -P 300 -i 0 1", "out: 300 is not a valid pattern byte"),
    ("aio_read -x -i 0 1", "usage: aio_read: invalid option -- 'x'"),
    ("aio_write -z 0 1 1", "out: -z supports only a single length parameter"),
    ("aio_write -u 0 64k", "out: -u requires -z to be specified"),
    ("aio_write -n 0 64k", "usage: aio_write: invalid option -- 'n'"),
    ("alloc", "bad argument count 0 to alloc, expected between 1 and 2 arguments"),
    ("a 1 2 3", "bad argument count 3 to a, expected between 1 and 2 arguments"),
    ("alloc 0 1x", "out: Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- 1x"),
    ("alloc -1", "out: Parsing error: argument too large -- -1"),
    ("alloc 8E", "out: Parsing error: argument too large -- 8E"),
    ("break x", "bad argument count 1 to break, expected 2 arguments"),
    ("close 1", "bad argument count 1 to close, expected 0 arguments"),
    ("discard 0", "bad argument count 1 to discard, expected at least 2 arguments"),
    ("discard -q 0", "usage"),
    ("discard 0 3G", "out: length cannot exceed 2147483136, given 3G"),
    ("discard -v 0 1", "usage: discard: invalid option -- 'v'"),
    ("flush 1", "bad argument count 1 to flush, expected 0 arguments"),
    ("help a b", "bad argument count 2 to help, expected between 0 and 1 arguments"),
    ("info 1", "bad argument count 1 to info, expected 0 arguments"),
    ("length 1", "bad argument count 1 to length, expected 0 arguments"),
    ("map 1", "bad argument count 1 to map, expected 0 arguments"),
    ("open", "bad argument count 0 to open, expected at least 1 arguments"),
    ("open a b", "usage"),
    ("open -x a", "usage: open: invalid option -- 'x'"),
    ("open -t", "usage: open: option requires an argument -- 't'"),
    ("read", "bad argument count 0 to read, expected at least 2 arguments"),
    ("read 0 1 2", "usage"),
    ("read -s 1 0 1k", "usage"),
    ("read -l 1 0 1k", "usage"),
    ("read -a 0 512", "usage: read: invalid option -- 'a'"),
    ("read -x 0 1", "usage: read: invalid option -- 'x'"),
    ("read -1 5", "usage: read: invalid option -- '1'"),
    ("read 0 512 -P", "usage: read: option requires an argument -- 'P'"),
    ("read -P 0 -s 513 0 512", "out: pattern verification range exceeds end of read data"),
    ("read -P 0 -s 12 -l 501 0 512", "out: pattern verification range exceeds end of read data"),
    ("read -Pq 0 1", "out: q is not a valid pattern byte"),
    ("read -P 1 -P 300 0 1", "out: 300 is not a valid pattern byte"),
    ("read -b 0 100", "out: 100 is not a sector-aligned value for 'count'"),
    ("read -b 100 512", "out: 100 is not a sector-aligned value for 'offset'"),
    ("read -br 0 512", "out: I/O buffer registration is not supported when reading from vmstate"),
    ("read 0 2G", "out: length cannot exceed 2147483136, given 2G"),
    ("readv -q 0", "usage"),
    ("readv -b 0 1", "usage: readv: invalid option -- 'b'"),
    ("readv 0 2G 1", "out: Argument '2G' exceeds maximum size 2147483136"),
    ("readv 0 1G 1G", "out: The total number of bytes exceed the maximum size 2147483136"),
    ("remove_break", "bad argument count 0 to remove_break, expected 1 arguments"),
    ("reopen -r -w", "named: Only one -r/-w option may be given"),
    ("reopen -w -w", "named: Only one -r/-w option may be given"),
    ("reopen 1", "usage"),
    ("reopen -x", "usage: reopen: invalid option -- 'x'"),
    ("resume", "bad argument count 0 to resume, expected 1 arguments"),
    ("sigraise", "bad argument count 0 to sigraise, expected 1 arguments"),
    ("sigraise x", "out: Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- x"),
    ("sigraise 66", "out: signal argument '66' is too large to be a valid signal"),
    ("sleep", "bad argument count 0 to sleep, expected 1 arguments"),
    ("sleep 1k", "out: 1k is not a valid number"),
    ("truncate", "bad argument count 0 to truncate, expected between 1 and 3 arguments"),
    ("truncate -m", "usage: truncate: option requires an argument -- 'm'"),
    ("truncate -m full", "out: Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- -m"),
    ("truncate --", "out: Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- --"),
    ("truncate -m some x", "named: Invalid preallocation mode 'some'"),
    ("truncate 1x", "out: Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- 1x"),
    ("wait_break", "bad argument count 0 to wait_break, expected 1 arguments"),
    ("write -x 0 1", "usage: write: invalid option -- 'x'"),
    ("write 0 1 2", "usage"),
    ("write -n 0 1", "out: -n requires -z to be specified"),
    ("write -u 0 1", "out: -u requires -z to be specified"),
    ("write -un 0 1", "out: -n requires -z to be specified"),
    ("write -bz 0 1", "out: -b and -z cannot be specified at the same time"),
    ("write -fc 0 1", "out: -f and -b or -c cannot be specified at the same time"),
    ("write -fb 0 1", "out: -f and -b or -c cannot be specified at the same time"),
    ("write -z -P 1 0 1", "out: Only one of -z, -P, and -s can be specified at the same time"),
    ("write -s file -P 1 0 1", "out: Only one of -z, -P, and -s can be specified at the same time"),
    ("write -c 0 100", "out: 100 is not a sector-aligned value for 'count'"),
    ("write -z 0 2G", "out: length cannot exceed 2147483136 without -n, given 2G"),
    ("write 0 2G", "out: length cannot exceed 2147483136 without -n, given 2G"),
    ("write -zr 0 1", "out: cannot combine zero write with registered I/O buffer"),
    ("aio_write -zr x 1", "out: cannot combine zero write with registered I/O buffer"),
    ("writev -q 0", "usage"),
    ("writev -z 0 1k", "usage: writev: invalid option -- 'z'"),
    ("writev 0 1x", "out: Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- 1x"),
    ("zone_append 0 1", "bad argument count 2 to zone_append, expected between 3 and 4 arguments"),
    ("zone_close 0", "bad argument count 1 to zone_close, expected 2 arguments"),
    ("zone_finish 0", "bad argument count 1 to zone_finish, expected 2 arguments"),
    ("zone_open 0 1x", "out: Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- 1x"),
    ("zone_report 0", "bad argument count 1 to zone_report, expected 2 arguments"),
    ("zone_reset 0", "bad argument count 1 to zone_reset, expected 2 arguments"),
];

#[test]
fn accepted_lines_parse_to_the_expected_command() {
    for (line, expected) in ACCEPTED {
        let seen = understand(line).map(|command| short(&command));
        assert!(seen.as_ref().is_ok_and(|seen| seen.starts_with(expected)), "{line}: {seen:?}");
    }
}

#[test]
fn refused_lines_give_qemu_ios_text() {
    for (line, expected) in REFUSED {
        assert_eq!(understand(line).unwrap_err(), *expected, "{line}");
    }
}

#[test]
fn tables_above_cover_every_command() {
    let named = |lines: &[(&str, &str)]| -> BTreeSet<&str> {
        lines.iter().filter_map(|(line, _)| find(line.split(' ').next()?)).map(|spec| spec.name).collect()
    };
    let all: BTreeSet<&str> = COMMANDS.iter().map(|spec| spec.name).collect();
    assert_eq!(named(ACCEPTED), all);
    // `quit` accepts any arguments, so it is never refused.
    assert_eq!(all.difference(&named(REFUSED)).collect::<Vec<_>>(), [&"quit"]);
}
