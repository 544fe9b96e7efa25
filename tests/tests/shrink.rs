//! The file of a disk that shrinks gets as short as with qemu-img, holds what it held, and passes its check.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::{Qemu, Tool};
use std::fs;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// Makes `a` with the reference's `made` commands, shrinks it with both programs, and compares.
#[track_caller]
fn check(options: &str, size: &str, writes: &[&str], snapshot: bool, smaller: &str) {
    let Some(qemu) = Qemu::find() else { return };
    let root = tempfile::tempdir().unwrap();
    let bin = root.path().join("qemu-img");
    std::os::unix::fs::symlink(OURS, &bin).unwrap();
    let run = |tool: &Tool, args: &[&str]| tool.run_in(root.path(), args).success();
    run(&qemu.img, &["create", "-q", "-f", "qcow2", "-o", options, "a", size]);
    let write = |range: &&str| run(&qemu.io, &["-c", &format!("write -q -P 7 {range}"), "a"]);
    writes.iter().map(write).for_each(drop);
    if snapshot {
        run(&qemu.img, &["snapshot", "-c", "s", "a"]);
    }
    fs::copy(root.path().join("a"), root.path().join("b")).unwrap();
    run(&qemu.img, &["resize", "-q", "--shrink", "a", smaller]);
    run(&Tool::at(&bin), &["resize", "-q", "--shrink", "b", smaller]);
    run(&qemu.img, &["compare", "-q", "a", "b"]);
    run(&qemu.img, &["check", "-q", "b"]);
    let [theirs, ours] = ["a", "b"].map(|name| fs::metadata(root.path().join(name)).unwrap().len());
    assert_eq!(ours, theirs, "{options}, {size} -> {smaller}, {writes:?}");
    // What is cut off is there again when it is needed.
    run(&Tool::at(&bin), &["resize", "-q", "b", size]);
    run(&qemu.io, &["-c", &format!("write -q -P 9 0 {size}"), "b"]);
    run(&qemu.img, &["check", "-q", "b"]);
}

#[test]
fn full_disks() {
    check("cluster_size=64k", "24M", &["0 24M"], false, "4M");
    check("cluster_size=64k,preallocation=metadata", "64M", &[], false, "16M");
    check("cluster_size=64k,extended_l2=on", "24M", &["0 24M"], false, "4M");
    check("cluster_size=64k,compat=0.10", "24M", &["0 24M"], false, "512");
}

#[test]
fn tables_go_that_map_and_count_nothing() {
    // An L2 table maps 2 MiB, a refcount block counts 8 MiB.
    check("cluster_size=4k", "64M", &["0 64M"], false, "3M");
    check("cluster_size=4k,refcount_bits=64", "24M", &["0 24M"], false, "1M");
    check("cluster_size=4k,refcount_bits=1", "24M", &["0 24M"], false, "1M");
    check("cluster_size=512", "4M", &["0 4M"], false, "512");
}

#[test]
fn what_is_in_use_behind_them_stays() {
    check("cluster_size=64k", "64M", &["0 4M", "32M 4M", "8M 2M"], false, "16M");
    check("cluster_size=4k", "24M", &["0 24M"], true, "1M");
}
