//! Small images made to cost much: every verb answers or refuses, within a limit of memory and time.
//!
//! The table is shapes x verbs. Memory is the address space of a run, so that what is only reserved counts
//! too; the time limit is generous, for slow machines.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may stop, and says what it measured")]

use qcow2_core::format::{AutoclearFeatures, BitmapsExtension, Header, HostOffset, Version};
use qcow2_format::bitmap::Bitmap;
use qcow2_testkit::oracle::Tool;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");
/// Kilobytes of address space: resident memory is a quarter of it at most.
const MEMORY: u32 = 1 << 20;
/// On an idle machine the slowest line takes two seconds.
const PATIENCE: Duration = Duration::from_secs(60);

const COPIED: u64 = 1 << 63;
const READING: &[&str] = &[
    "info IMAGE",
    "info --output=json IMAGE",
    "check IMAGE",
    "map --output=json IMAGE",
    "measure -O qcow2 IMAGE",
    "compare IMAGE other",
    "checksum IMAGE",
    "snapshot -l IMAGE",
    "vet IMAGE",
    "dd bs=1M count=1 if=IMAGE of=out",
    "rescue -O qcow2 IMAGE out",
    "io -r -f qcow2 -c map IMAGE",
    "convert -O qcow2 -o cluster_size=2M IMAGE out",
];
const CHANGING: &[&str] = &[
    "check -r all COPY",
    "amend -f qcow2 -o compat=v2 COPY",
    "rebase -f qcow2 -b '' COPY",
    "snapshot -c new COPY",
    "bitmap --add COPY new",
    "bitmap --remove COPY b0",
    "io -f qcow2 -c 'write 0 1M' COPY",
    "resize -f qcow2 COPY +1M",
];

fn words(word: u64, count: usize) -> Vec<u8> {
    word.to_be_bytes().repeat(count)
}

/// A sparse file with these parts. The header has one cluster of refcount table, in cluster 1.
fn write(path: &Path, bits: u32, len: u64, parts: &[(u64, Vec<u8>)], change: impl FnOnce(&mut Header)) {
    let mut header = Header::new(Version::V3, bits);
    header.refcount_table_offset = HostOffset::new(1 << bits);
    header.refcount_table_clusters = 1;
    header.l1_table_offset = HostOffset::new(3 << bits);
    change(&mut header);
    let file = File::create(path).unwrap();
    file.write_all_at(&header.encode_cluster().unwrap(), 0).unwrap();
    parts.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
    file.set_len(len).unwrap();
}

/// Each line ends by itself, with an exit code, in this memory and time.
fn check(folder: &Path, image: &str, lines: &[&str]) {
    let shell = Tool::find("bash").unwrap();
    for line in lines {
        let line = line.replace("IMAGE", image).replace("COPY", "copy");
        let script = format!(
            "rm -f out copy; cp --sparse=always {image} copy; ulimit -v {MEMORY}; {OURS} {line} >/dev/null"
        );
        let outcome =
            shell.run_within(folder, &["-c", &script], PATIENCE).unwrap_or_else(|late| panic!("{late}"));
        println!("{image}: {line}: {:?} in {:?}", outcome.code, outcome.elapsed);
        let told = !outcome.stderr.contains("memory allocation") && !outcome.stderr.contains("panicked");
        assert!(outcome.code.is_some_and(|code| code <= 63) && told, "{outcome}");
    }
}

/// 256 layers whose L1 tables are 32 MiB of holes, the first 8 GiB that none of them maps.
#[test]
fn wide_tables_in_a_long_chain() {
    let root = tempfile::tempdir().unwrap();
    for layer in 0..256 {
        write(&root.path().join(layer.to_string()), 16, 64 << 20, &[], |header| {
            (header.size, header.l1_size) = (1 << 51, 4 << 20);
            header.backing_file = (layer > 0).then(|| (layer - 1).to_string().into_bytes());
            header.extensions.backing_format = header.backing_file.as_ref().map(|_| b"qcow2".to_vec());
        });
    }
    File::create(root.path().join("other")).unwrap();
    let lines = ["map IMAGE", "measure -O qcow2 -o cluster_size=2M IMAGE", "compare IMAGE other"];
    check(root.path(), "255", &lines);
    check(root.path(), "255", &["dd bs=1M count=1 if=IMAGE of=out", "rebase -f qcow2 -b '' COPY"]);
}

/// One L2 table for each of 1024 L1 entries: of zeroes, of zero clusters, of one cluster of data, of itself.
#[test]
fn one_table_for_all() {
    let root = tempfile::tempdir().unwrap();
    File::create(root.path().join("other")).unwrap();
    let shared = |name: &str, entry: u64| {
        let parts = [(3 << 16, words(COPIED | 64 << 16, 1024)), (64 << 16, words(entry, 8192))];
        write(&root.path().join(name), 16, 70 << 16, &parts, |h| (h.size, h.l1_size) = (1024 << 29, 1024));
    };
    shared("zeroes", 0);
    shared("zero-clusters", 1);
    shared("misaligned", COPIED | 0x1200);
    for image in ["zeroes", "zero-clusters", "misaligned"] {
        check(root.path(), image, READING);
        check(root.path(), image, CHANGING);
    }
    // What is read again and again is data: only what does not read it.
    shared("data", COPIED | 66 << 16);
    shared("itself", COPIED | 64 << 16);
    for image in ["data", "itself"] {
        check(root.path(), image, &["info IMAGE", "check IMAGE", "measure -O qcow2 IMAGE", "vet IMAGE"]);
        check(root.path(), image, CHANGING);
    }
}

/// Every size field at its largest, the tables in holes.
#[test]
fn largest_fields() {
    let root = tempfile::tempdir().unwrap();
    File::create(root.path().join("other")).unwrap();
    let path = |name: &str| root.path().join(name);
    write(&path("l1-512"), 9, 64 << 20, &[], |h| {
        (h.size, h.l1_size, h.l1_table_offset) = (1 << 37, 4 << 20, HostOffset::new(1 << 20));
    });
    write(&path("l1-2m"), 21, 64 << 20, &[], |h| (h.size, h.l1_size) = (1 << 61, 4 << 20));
    let block = [(4 << 16, words(3 << 16, 1 << 16))];
    write(&path("refcounts"), 16, 256 << 16, &block, |h| {
        (h.refcount_table_clusters, h.refcount_table_offset) = (128, HostOffset::new(4 << 16));
        (h.size, h.l1_size, h.l1_table_offset) = (1 << 30, 2, HostOffset::new(2 << 16));
    });
    for image in ["l1-512", "l1-2m", "refcounts"] {
        check(root.path(), image, READING);
        check(root.path(), image, CHANGING);
    }
}

/// A table of 2 MiB for each of 65,536 L1 entries, all of them in holes: a file of half a MiB on disk.
#[test]
fn large_tables_in_holes() {
    let root = tempfile::tempdir().unwrap();
    File::create(root.path().join("other")).unwrap();
    let tables = 1 << 16;
    let l1 = (8..8 + tables).flat_map(|table| (COPIED | table << 21).to_be_bytes()).collect();
    write(&root.path().join("holes"), 21, (8 + tables) << 21, &[(3 << 21, l1)], |h| {
        (h.size, h.l1_size) = (tables << 39, tables as u32);
    });
    check(root.path(), "holes", READING);
    // An overlay that is open for writing is not told by its holes, and a rebase reads each table.
    let lines: Vec<&str> = CHANGING.iter().copied().filter(|line| !line.starts_with("rebase")).collect();
    check(root.path(), "holes", &lines);
}

/// Thousands of bitmaps that have one table.
#[test]
fn one_table_for_all_bitmaps() {
    let root = tempfile::tempdir().unwrap();
    File::create(root.path().join("other")).unwrap();
    let mut directory = Vec::new();
    for number in 0..5000 {
        let mut bitmap = Bitmap::new(format!("b{number}"), 9);
        (bitmap.table_offset, bitmap.table_entries) = (HostOffset::new(4 << 16), 8192);
        bitmap.encode(&mut directory).unwrap();
    }
    let extension = BitmapsExtension {
        count: 5000,
        reserved: 0,
        directory_size: directory.len() as u64,
        directory_offset: HostOffset::new(8 << 16),
    };
    let parts = [(4 << 16, words(6 << 16, 8192)), (8 << 16, directory)];
    write(&root.path().join("bitmaps"), 16, 48 << 16, &parts, |h| {
        h.extensions.bitmaps = Some(extension);
        h.features.autoclear = AutoclearFeatures::BITMAPS;
        (h.size, h.l1_size, h.l1_table_offset) = (1 << 41, 4096, HostOffset::new(40 << 16));
    });
    check(root.path(), "bitmaps", READING);
    check(root.path(), "bitmaps", CHANGING);
}
