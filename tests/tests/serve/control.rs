//! Disks that are changed while clients use them.

use super::{OURS, Server};
use qcow2_testkit::oracle::{Outcome, Tool};
use qcow2_testkit::pattern;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

const SIZE: u64 = 8 << 20;
const PIECE: usize = 64 << 10;

fn ctl(folder: &Path, line: &str) -> Outcome {
    let line = format!("ctl c {line}");
    Tool::at(OURS).run_in(folder, &line.split(' ').collect::<Vec<_>>())
}

fn answer(folder: &Path, line: &str) -> Value {
    let mut answer: Value = serde_json::from_str(&ctl(folder, line).success().stdout).unwrap();
    let pause = answer.as_object_mut().and_then(|members| members.remove("pause-ns"));
    let changes_layers = line.starts_with("snapshot file") || line.starts_with("commit");
    assert!(pause.is_some() || !changes_layers, "{line}: no pause");
    answer
}

fn create(folder: &Path, name: &str) {
    let size = SIZE.to_string();
    Tool::at(OURS).run_in(folder, &["create", "-q", "-f", "qcow2", name, &size]).success();
}

fn layers(folder: &Path) -> Vec<String> {
    let query = answer(folder, "query");
    let layers = query[""]["layers"].as_array().unwrap();
    layers.iter().map(|layer| layer["file"].as_str().unwrap().to_owned()).collect()
}

fn check(folder: &Path, name: &str) {
    Tool::at(OURS).run_in(folder, &["check", "-q", name]).success();
}

#[test]
fn layers_change_under_a_client_that_goes_on_writing() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    create(folder, "disk.qcow2");
    let server = Server::start(folder, &["--control", "c", "--record", "top", "disk.qcow2"]);
    let client = server.connect();
    let over = AtomicBool::new(false);
    // Every round writes one piece anew and reads another one back.
    let round = |number: u64| {
        let pieces = SIZE / PIECE as u64;
        let at = number * 7 % pieces * PIECE as u64;
        client.write(at, &pattern::bytes(number, at, PIECE));
        assert!(client.read(at, PIECE) == pattern::bytes(number, at, PIECE), "round {number}");
        number + 1
    };
    let rounds = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut number = 0;
            while !over.load(Ordering::Acquire) {
                number = round(number);
            }
            number
        });
        assert_eq!(answer(folder, "snapshot file=s1")["below"], "disk.qcow2");
        assert_eq!(answer(folder, "snapshot file=s2")["top"], "s2");
        assert_eq!(answer(folder, "snapshot file=s3")["below"], "s2");
        assert_eq!(layers(folder), ["s3", "s2", "s1", "disk.qcow2"]);
        assert_eq!(answer(folder, "commit depth=2"), json!({"retired": "s1", "into": "disk.qcow2"}));
        assert_eq!(layers(folder), ["s3", "s2", "disk.qcow2"]);
        assert_eq!(answer(folder, "commit"), json!({"top": "s2", "retired": "s3"}));
        assert_eq!(fs::read_to_string(folder.join("top")).unwrap(), "qcow2 s2\n");
        assert_eq!(answer(folder, "commit"), json!({"top": "disk.qcow2", "retired": "s2"}));
        answer(folder, "snapshot-save name=inside");
        assert_eq!(answer(folder, "snapshot-list")[0]["name"], "inside");
        over.store(true, Ordering::Release);
        writer.join().unwrap()
    });
    let before: Vec<u8> = client.read(0, SIZE as usize);
    assert_eq!(layers(folder), ["disk.qcow2"]);
    assert_eq!(answer(folder, "statistics")[""]["write"]["requests"], rounds);
    assert!(server.end("-TERM").success());
    check(folder, "disk.qcow2");
    Tool::at(OURS).run_in(folder, &["convert", "-O", "raw", "disk.qcow2", "out.raw"]).success();
    assert!(fs::read(folder.join("out.raw")).unwrap() == before);
}

#[test]
fn what_was_flushed_before_a_kill_is_in_the_recorded_top() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    create(folder, "disk.qcow2");
    let arguments = ["--control", "c", "--record", "top", "disk.qcow2"];
    let mut expected = Vec::new();
    for (number, change) in
        ["snapshot file=s1", "snapshot file=s2", "commit", "commit depth=0"].into_iter().enumerate()
    {
        let server = Server::start(folder, &arguments);
        let client = server.connect();
        for (offset, bytes) in &expected {
            assert!(client.read(*offset, PIECE) == *bytes, "before '{change}': byte {offset}");
        }
        answer(folder, change);
        let (offset, bytes) = (number as u64 * 1_000_000, pattern::bytes(number as u64, 0, PIECE));
        client.write(offset, &bytes);
        client.flush();
        expected.push((offset, bytes));
        server.end("-KILL");
        // A killed server leaves its sockets.
        fs::remove_file(folder.join("c")).unwrap();
    }
    assert_eq!(fs::read_to_string(folder.join("top")).unwrap(), "qcow2 disk.qcow2\n");
    check(folder, "disk.qcow2");
}

/// A whole copy, then what has changed, over it and over a server's export, while a client writes.
#[test]
fn a_backup_is_the_disk_at_one_moment() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    create(folder, "disk.qcow2");
    let server = Server::start(folder, &["--control", "c", "disk.qcow2"]);
    let client = server.connect();
    let pieces = SIZE / PIECE as u64;
    let write = |number: u64, piece: u64| {
        let at = piece % pieces * PIECE as u64;
        client.write(at, &pattern::bytes(number, at, PIECE));
    };
    (0..pieces).step_by(3).for_each(|piece| write(1, piece));
    answer(folder, "bitmap-add bitmap=b");
    // Writes in the order of the disk: in any copy a piece of this round means that all before it are there.
    std::thread::scope(|scope| {
        scope.spawn(|| (0..pieces).for_each(|piece| write(2, piece)));
        assert_eq!(answer(folder, "backup file=full")["copied"], SIZE);
    });
    let content = |file: &str, format: &str| {
        Tool::at(OURS).run_in(folder, &["convert", "-f", format, "-O", "raw", file, "content"]).success();
        fs::read(folder.join("content")).unwrap()
    };
    let full = content("full", "qcow2");
    let is_new = |piece: &u64| {
        let at = piece * PIECE as u64;
        full[at as usize..][..PIECE] == pattern::bytes(2, at, PIECE)
    };
    let new = (0..pieces).take_while(is_new).count() as u64;
    for piece in new..pieces {
        let at = piece * PIECE as u64;
        let old = if piece % 3 == 0 { pattern::bytes(1, at, PIECE) } else { vec![0; PIECE] };
        assert!(full[at as usize..][..PIECE] == old, "piece {piece} of a copy with {new} new ones");
    }
    let copied = answer(folder, "backup file=full bitmap=b clear=on");
    assert_eq!(copied["copied"], SIZE);
    write(3, 5);
    write(3, 77);
    fs::create_dir(folder.join("other")).unwrap();
    Tool::at(OURS).run_in(folder, &["convert", "-O", "raw", "full", "other/raw"]).success();
    let other = Server::start(&folder.join("other"), &["-f", "raw", "raw"]);
    let line = format!("backup file={} bitmap=b", other.uri());
    assert_eq!(answer(folder, &line)["copied"], 2 * PIECE);
    assert!(other.end("-TERM").success());
    assert_eq!(answer(folder, "backup file=full bitmap=b clear=off")["copied"], 2 * PIECE);
    assert_eq!(answer(folder, "backup file=raw format=raw")["copied"], SIZE);
    let now = client.read(0, SIZE as usize);
    for (file, format) in [("full", "qcow2"), ("raw", "raw"), ("other/raw", "raw")] {
        assert!(content(file, format) == now, "{file}");
    }
    for (line, text) in [
        ("backup file=full", "full: the file exists already"),
        ("backup file=new bitmap=b", "new: what a bitmap marks goes into an earlier backup"),
        ("backup file=full bitmap=none", "reading the bitmap"),
        ("backup file=disk.qcow2 bitmap=b", "disk.qcow2"),
        ("backup file=new format=bogus", "'bogus' is no format of new images"),
        ("backup file=no/new", "no/new"),
        ("backup file=nbd+unix:///?socket=none", "none"),
    ] {
        let refused = ctl(folder, line).expect_code(1);
        assert!(refused.stderr.contains(text), "{line}: {refused}");
    }
    assert!(!folder.join("new").exists());
    assert!(server.end("-TERM").success());
    ["disk.qcow2", "full"].into_iter().for_each(|file| check(folder, file));
}

/// Clients keep the size that they were told; those that connect later are told the new one, and may use it.
#[test]
fn later_clients_know_the_new_size() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    create(folder, "disk.qcow2");
    let server = Server::start(folder, &["--control", "c", "disk.qcow2"]);
    let early = server.connect();
    answer(folder, "resize size=16M");
    let late = server.connect();
    assert!(early.size < late.size && late.size == 16 << 20);
    late.write(late.size - 512, &[3; 512]);
    assert_eq!(late.read(late.size - 512, 512), [3; 512]);
    early.write(0, &[4; 512]);
    assert_eq!(late.read(0, 512), [4; 512]);
}

#[test]
fn bitmaps_sizes_and_what_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    create(folder, "disk.qcow2");
    let server = Server::start(folder, &["--control", "c", "disk.qcow2"]);
    answer(folder, "bitmap-add bitmap=b granularity=64k");
    answer(folder, "bitmap-add bitmap=d");
    server.connect().write(0, &[1; 512]);
    answer(folder, "bitmap-merge bitmap=d source=b");
    answer(folder, "bitmap-disable bitmap=d");
    let bitmaps = answer(folder, "bitmap-list");
    assert_eq!((&bitmaps[0]["granularity"], &bitmaps[1]["recording"]), (&json!(65_536), &json!(false)));
    assert_eq!(answer(folder, "resize size=16M"), json!({"size": 16 << 20}));
    fs::write(folder.join("old"), b"old").unwrap();
    for (line, text) in [
        ("snapshot file=old", "old: the file exists already"),
        ("commit", "the server needs a record of it"),
        ("commit depth=1", "the chain has 1 layers: there is none below layer 1"),
        ("bitmap-clear bitmap=none", "dirty bitmap 'none' not found"),
        ("snapshot-delete name=none", "no such snapshot"),
        ("resize size=1M", "would be lost"),
        ("resize size=7.5.1", "size: '7.5.1' is no number"),
        ("query file=a", "the command 'query' has no member 'file'"),
        ("snapshot file=new disk=x", "no disk is served as 'x'"),
        ("query query", "'query' is no member of a command"),
    ] {
        let refused = ctl(folder, line).expect_code(1);
        assert!(refused.stderr.contains(text), "{line}: {refused}");
    }
    assert_eq!(fs::read(folder.join("old")).unwrap(), b"old");
    assert!(!folder.join("new").exists());
    let text = ctl(folder, "metrics").success().stdout;
    assert!(text.contains("qcow2_requests_total{disk=\"\",kind=\"write\"} 1\n"), "{text}");
    assert!(ctl(folder, "top 1").success().stdout.contains("write"));
    assert!(server.end("-TERM").success());
    let info = Tool::at(OURS).run_in(folder, &["info", "disk.qcow2"]).success().stdout;
    assert!(info.contains("virtual size: 16 MiB") && info.contains("name: b"), "{info}");
    ctl(folder, "query").expect_code(1);
}
