//! What is said of damage that an image in use turns out to have: as by qemu-img and qemu-io, to the letter
//! and when it is found, and the same mark in the header.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::{Qemu, Tool};
use qcow2_tests::side_by_side::words;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// Where an image of 1 MiB with 64 KiB of data and as many zeroes has its tables.
const REFCOUNT_TABLE: u64 = 0x10000;
const REFCOUNT_BLOCK: u64 = 0x20000;
const L1: u64 = 0x30000;
const L2: u64 = 0x40000;

/// Options of the new image, what is written over it and where, and what is then done: a line of qemu-img, or
/// commands of qemu-io.
type Case = (&'static str, (u64, &'static [u8]), &'static [&'static str]);

const INSIDE: &[u8] = &[0x80, 0, 0, 0, 0, 5, 8, 0];
const INSIDE_ZERO: &[u8] = &[0x80, 0, 0, 0, 0, 5, 8, 1];
const SECOND: &[u8] = &[0x80, 0, 0, 0, 0, 1, 0, 0];
const READ: &str = "io:read 0 1k";
const WRITE: &str = "io:write 0 1k";
const WRITE_NEW: &str = "io:write 192k 1k";

const GONE: &[&str] = &[
    "io:write 192k 1k;read 0 1k;read -b 0 512;read 9M 1k",
    "io:write 192k 1k;write 0 1k;write -z 0 64k;write -c 0 64k;discard 9M 64k",
    "io:write 192k 1k;flush;length;map;alloc 0 64k;alloc 0 0;info",
    "io:write 192k 1k;truncate 3M;truncate 100",
    "io:write 192k 1k;aio_read 0 1k;aio_flush;aio_write 0 1k;aio_flush",
];

const CASES: &[Case] = &[
    (
        "",
        (L1, &[0x80, 0, 0, 0, 0, 4, 2, 0]),
        &[
            READ,
            WRITE,
            "io:discard 0 64k",
            "io:write -z 0 64k",
            "convert -O raw a.qcow2 x",
            "measure -O qcow2 a.qcow2",
            "compare a.qcow2 a.qcow2",
            "dd if=a.qcow2 of=y bs=64k",
            "snapshot -c s a.qcow2",
            "amend -o compat=0.10 a.qcow2",
            "rebase -b '' a.qcow2",
            "map a.qcow2",
        ],
    ),
    (
        "",
        (L2, INSIDE),
        &[
            READ,
            WRITE,
            "io:write 0 128k",
            "convert -O raw a.qcow2 x",
            "measure -O qcow2 a.qcow2",
            "snapshot -c s a.qcow2",
            "rebase -b '' a.qcow2",
            "map a.qcow2",
        ],
    ),
    (
        "",
        (L2 + 8, INSIDE_ZERO),
        &[
            "io:read 64k 1k",
            "io:write 64k 1k",
            "convert -O raw a.qcow2 x",
            "snapshot -c s a.qcow2",
            "amend -o compat=0.10 a.qcow2",
        ],
    ),
    ("", (REFCOUNT_TABLE, &[0, 0, 0, 0, 0, 2, 8, 0]), &[WRITE_NEW, "snapshot -c s a.qcow2"]),
    // Data or a new table would be where other metadata is.
    ("", (L2, SECOND), &[WRITE]),
    ("", (L2, &[0x80, 0, 0, 0, 0, 2, 0, 0]), &[WRITE]),
    ("", (L2, &[0x80, 0, 0, 0, 0, 3, 0, 0]), &[WRITE]),
    ("", (L2, &[0x80, 0, 0, 0, 0, 4, 0, 0]), &[WRITE]),
    ("", (L1, SECOND), &[WRITE]),
    ("", (L1, &[0x80, 0, 0, 0, 0, 3, 0, 0]), &[WRITE]),
    ("", (REFCOUNT_BLOCK, &[0, 0, 0, 0]), &[WRITE_NEW]),
    ("", (REFCOUNT_BLOCK, &[0, 0]), &["io:write -c 192k 64k"]),
    // What is marked is gone.
    ("", (REFCOUNT_BLOCK, &[0, 0]), GONE),
    ("", (REFCOUNT_BLOCK + 2, &[0, 0]), &[WRITE_NEW]),
    ("", (REFCOUNT_BLOCK + 4, &[0, 0]), &[WRITE_NEW]),
    ("", (REFCOUNT_BLOCK + 6, &[0, 0]), &[WRITE_NEW]),
    ("", (REFCOUNT_BLOCK + 8, &[0, 0]), &[WRITE_NEW]),
    ("-o compat=0.10", (L2 + 8, &[0, 0, 0, 0, 0, 0, 0, 1]), &["io:read 64k 1k", "io:write 64k 1k"]),
    ("-o compat=0.10", (L2, INSIDE), &[READ, WRITE]),
    ("-o extended_l2=on", (L2 + 8, &[0xff; 8]), &[READ, WRITE]),
    ("-o extended_l2=on", (L2 + 16, INSIDE), &["io:read 64k 1k", "io:write 64k 1k"]),
    ("-o data_file=d.raw", (L2, SECOND), &[READ]),
    ("-o data_file=d.raw", (L2, &[0x40, 0, 0, 0, 0, 1, 0, 0]), &[READ, WRITE]),
];

/// What a line did: exit code, both outputs without times, and the byte of the header with the mark.
type Seen = (Option<i32>, Vec<String>, String, u8);

fn run(tools: (&Tool, &Tool), folder: &Path, line: &str) -> Seen {
    let done = match line.strip_prefix("io:") {
        Some(commands) => {
            let mut args: Vec<&str> = commands.split(';').flat_map(|command| ["-c", command]).collect();
            args.push("a.qcow2");
            tools.1.run_in(folder, &args)
        }
        None => tools.0.run_in(folder, &words(line)),
    };
    let told = done.stdout.lines().filter(|line| !line.contains(" ops; "));
    let mut mark = [0];
    File::open(folder.join("a.qcow2")).unwrap().read_exact_at(&mut mark, 79).unwrap();
    (done.code, told.map(str::to_owned).collect(), done.stderr, mark[0])
}

#[test]
fn damage_is_told_and_marked_as_by_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    let root = tempfile::tempdir().unwrap();
    let ours = ["qemu-img", "qemu-io"].map(|name| {
        symlink(OURS, root.path().join(name)).unwrap();
        Tool::at(root.path().join(name))
    });
    let folder = root.path().join("folder");
    let mut wrong = Vec::new();
    for (options, (at, bytes), lines) in CASES {
        for line in *lines {
            let [theirs, own] = [(&qemu.img, &qemu.io), (&ours[0], &ours[1])].map(|tools| {
                fs::create_dir(&folder).unwrap();
                let create = format!("create -q -f qcow2 {options} a.qcow2 1M");
                qemu.img.run_in(&folder, &words(&create)).success();
                let fill = ["-c", "write -q 0 64k", "-c", "write -q -z 64k 64k", "a.qcow2"];
                qemu.io.run_in(&folder, &fill).success();
                let image = File::options().write(true).open(folder.join("a.qcow2")).unwrap();
                image.write_all_at(bytes, *at).unwrap();
                let seen = run(tools, &folder, line);
                fs::remove_dir_all(&folder).unwrap();
                seen
            });
            if theirs != own {
                wrong.push(format!("{options} {at:#x} {bytes:02x?} {line}\n  {theirs:?}\n  {own:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} lines:\n{}", wrong.len(), wrong.join("\n"));
}

/// The L1 table of a snapshot that cannot be where the snapshot table says.
#[test]
fn a_snapshot_without_its_l1_table_is_refused_as_by_qemu() {
    let Some(qemu) = Qemu::find() else { return };
    let root = tempfile::tempdir().unwrap();
    symlink(OURS, root.path().join("qemu-img")).unwrap();
    let ours = Tool::at(root.path().join("qemu-img"));
    let folder = root.path().join("folder");
    // The lowest bytes of the offset, and the length in entries.
    for (field, bytes) in [(6, &[2][..]), (8, &[0x7f, 0, 0, 0])] {
        for line in [
            "convert -l one -O raw a.qcow2 x",
            "snapshot -a one a.qcow2",
            "snapshot -d one a.qcow2",
            "amend -o compat=v2 a.qcow2",
        ] {
            let [theirs, own] = [&qemu.img, &ours].map(|tool| {
                fs::create_dir(&folder).unwrap();
                qemu.img.run_in(&folder, &words("create -q -f qcow2 a.qcow2 1M")).success();
                qemu.io.run_in(&folder, &["-c", "write -q -z 64k 64k", "a.qcow2"]).success();
                qemu.img.run_in(&folder, &words("snapshot -c one a.qcow2")).success();
                let image = File::options().read(true).write(true).open(folder.join("a.qcow2")).unwrap();
                let mut table = [0; 8];
                image.read_exact_at(&mut table, 64).unwrap();
                image.write_all_at(bytes, u64::from_be_bytes(table) + field).unwrap();
                let seen = run((tool, tool), &folder, line);
                fs::remove_dir_all(&folder).unwrap();
                seen
            });
            assert_eq!(own, theirs, "{field} {line}");
        }
    }
}
