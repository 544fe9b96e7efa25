//! Images of a few MB that claim disks of exabytes: unallocated ranges cost no time, and every verb that
//! would take hours ends at the first signal.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_format::snapshot::Snapshot;
use qcow2_format::{Header, HostOffset, Version};
use qcow2_testkit::oracle::{Outcome, Tool};
use qcow2_tests::side_by_side::words;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");
/// How long a verb runs before it gets a signal, and how long it may take to end after that. On an idle
/// machine it takes a tenth of a second.
const WORKS: Duration = Duration::from_millis(150);
const PATIENCE: Duration = Duration::from_secs(8);

fn run(folder: &Path, line: &str) -> Outcome {
    let started = Instant::now();
    let outcome = Tool::at(OURS).run_in(folder, &words(line));
    assert!(started.elapsed() < PATIENCE, "took {:?}: {outcome}", started.elapsed());
    outcome
}

const CLUSTER: u64 = 2 << 20;
const L1_ENTRIES: u64 = 4 << 20;
const L2_ENTRIES: u64 = CLUSTER / 8;

/// An image of the largest disk: every L1 entry references one L2 table, whose entries are all `entry`. With
/// `snapshot`, that disk is a snapshot's and the active disk is small and empty.
fn write_image(path: &Path, entry: u64, snapshot: bool) {
    let [table, block, l2, small_l1, snapshots, l1] = [1, 2, 3, 4, 5, 6].map(|index| index * CLUSTER);
    let disk = L1_ENTRIES * L2_ENTRIES * CLUSTER;
    let mut bytes = vec![0; (l1 + L1_ENTRIES * 8) as usize];
    let mut put = |at: u64, new: &[u8]| bytes[at as usize..at as usize + new.len()].copy_from_slice(new);
    let mut header = Header::new(Version::V3, 21);
    (header.size, header.l1_size) = if snapshot { (CLUSTER, 1) } else { (disk, L1_ENTRIES as u32) };
    header.l1_table_offset = HostOffset::new(if snapshot { small_l1 } else { l1 });
    header.refcount_order = 6;
    header.refcount_table_offset = HostOffset::new(table);
    header.refcount_table_clusters = 1;
    if snapshot {
        (header.nb_snapshots, header.snapshots_offset) = (1, HostOffset::new(snapshots));
        let snapshot = Snapshot {
            l1_table_offset: HostOffset::new(l1),
            l1_size: L1_ENTRIES as u32,
            id: b"1".to_vec(),
            name: b"old".to_vec(),
            date_seconds: 0,
            date_nanoseconds: 0,
            vm_clock_nanoseconds: 0,
            vm_state_size: 0,
            disk_size: disk,
            icount: None,
            unknown_extra: Vec::new(),
        };
        let mut encoded = Vec::new();
        snapshot.encode(&mut encoded).unwrap();
        put(snapshots, &encoded);
    }
    put(0, &header.encode_cluster().unwrap());
    put(table, &block.to_be_bytes());
    (0..=l1 / CLUSTER + 16).for_each(|cluster| put(block + cluster * 8, &1u64.to_be_bytes()));
    put(block + l2 / CLUSTER * 8, &L1_ENTRIES.to_be_bytes());
    put(l2, &entry.to_be_bytes().repeat(L2_ENTRIES as usize));
    put(l1, &l2.to_be_bytes().repeat(L1_ENTRIES as usize));
    fs::write(path, bytes).unwrap();
}

/// Runs `line` and sends a signal after a while; it must end soon, by itself or by the signal.
fn check_heard(folder: &Path, line: &str) {
    // Targets that are removed when interrupted.
    for target in ["new", "new.raw"] {
        let _ = fs::remove_file(folder.join(target));
    }
    let mut command = Command::new("env");
    command.args(["--default-signal", OURS]).args(words(line)).current_dir(folder);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let told = folder.join("told");
    let mut child = command.stderr(File::create(&told).unwrap()).spawn().unwrap();
    let started = Instant::now();
    let mut sent = false;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if !sent && started.elapsed() > WORKS {
            kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
            sent = true;
        }
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
        }
        thread::sleep(Duration::from_millis(2));
    };
    let heard = status.signal() == Some(Signal::TERM.as_raw()) || status.code().is_some();
    assert!(heard, "{line} after {:?}: {status}", started.elapsed());
    assert!(started.elapsed() < PATIENCE, "{line} took {:?}", started.elapsed());
    assert!(!folder.join("new").exists() || !sent, "{line}: a partial image was left");
}

#[test]
fn every_verb_ends_at_the_first_signal() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    fs::write(folder.join("small.raw"), vec![7; 1 << 20]).unwrap();
    // Unallocated, and zero clusters.
    for entry in [0, 1] {
        write_image(&folder.join("big"), entry, false);
        write_image(&folder.join("snap"), entry, true);
        let overlay = "create -q -f qcow2 -o cluster_size=2M -b big -F qcow2 over";
        run(folder, overlay).success();
        for line in [
            "info big",
            "map big",
            "map --output=json big",
            "check big",
            "measure -O qcow2 -o cluster_size=2M big",
            "checksum big",
            "compare -s big over",
            "compare small.raw big",
            "convert -O qcow2 -o cluster_size=2M big new",
            "convert -c -O qcow2 -o cluster_size=2M big new",
            "convert -O qcow2 -o cluster_size=2M big -",
            "convert -O raw big -",
            "dd -O qcow2 if=big of=new bs=1M",
            "rebase -f qcow2 -b small.raw -F raw big",
            "rebase -b '' over",
            "commit over",
            "io -r -f qcow2 -c map big",
            "resize -q --shrink big 1M",
            "info snap",
            "snapshot -l snap",
            "check snap",
            "check -r all snap",
            "measure -l old -O qcow2 -o cluster_size=2M snap",
            "convert -l old -O qcow2 -o cluster_size=2M snap new",
            "convert -l old -O raw snap -",
            "amend -o refcount_bits=32 snap",
            "snapshot -a old snap",
            "snapshot -d old snap",
        ] {
            check_heard(folder, line);
        }
    }
}

/// A snapshot's disk is at most as large as the largest L1 table maps.
#[test]
fn snapshots_of_impossible_disk_sizes_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    for cluster_size in ["512", "2M"] {
        let create = format!("create -q -f qcow2 -o cluster_size={cluster_size} image 1M");
        run(folder, &create).success();
        run(folder, "io -f qcow2 -c 'write -q 0 64k' image").success();
        run(folder, "snapshot -c old image").success();
        let mut bytes = fs::read(folder.join("image")).unwrap();
        let at = Header::parse(&bytes).unwrap().snapshots_offset.value() as usize + 48;
        for size in [1u64 << 37, 1 << 60, 1 << 62, u64::MAX - 511] {
            bytes[at..at + 8].copy_from_slice(&size.to_be_bytes());
            fs::write(folder.join("image"), &bytes).unwrap();
            // The largest disks are 128 GiB and 2 EiB.
            let possible = size <= if cluster_size == "512" { 1 << 37 } else { 1 << 61 };
            for line in [
                "measure -l old -O qcow2 -o cluster_size=2M image",
                "convert -l old -O qcow2 -o cluster_size=2M image new",
                "snapshot -a old image",
            ] {
                let outcome = run(folder, line).expect_code(i32::from(!possible));
                let why = format!("napshot's disk of {size} bytes is too large");
                assert!(possible || outcome.stderr.contains(&why), "{outcome}");
                assert!(possible || outcome.stderr.lines().count() == 1, "{outcome}");
            }
            run(folder, "check image").success();
        }
    }
}

/// The data of an exabyte disk goes through a pipe, in memory proportional to the allocated data.
#[test]
fn a_huge_sparse_disk_is_streamed_in_little_memory() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path();
    run(folder, "create -q -f qcow2 -o cluster_size=2M image 1900P").success();
    run(folder, "io -f qcow2 -c 'write -q -P 7 1000P 1M' -c 'write -q -P 8 5M 1k' image").success();
    let script = format!("ulimit -v 2000000; exec {OURS} convert -O qcow2 -o cluster_size=2M image - > copy");
    Tool::find("bash").expect("bash").run_in(folder, &["-c", &script]).success();
    run(folder, "check -q copy").success();
    run(folder, "compare -q image copy").success();
    let null = r#"convert -O qcow2 -o cluster_size=2M json:{"driver":"null-co","size":"1E"} -"#;
    let outcome = Tool::at(OURS).run_in(folder, &null.split(' ').collect::<Vec<_>>()).expect_code(1);
    assert!(outcome.stderr.contains("used clusters cannot be streamed"), "{outcome}");
}
