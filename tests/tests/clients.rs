//! Programs that run `qemu-img` and parse its output work with ours in its place.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::{Tool, skip};
use qcow2_tests::side_by_side::words;
use std::path::Path;
use std::process::Command;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

/// OpenStack's `oslo.utils`: it parses the same fields, whichever program made the image and reports on it.
#[test]
fn oslo_utils_parses_our_info_output() {
    let Some(qemu_img) = Tool::find("qemu-img") else { return };
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = tests.join("../target/readers/bin/python3");
    let Some(python) = (if own.is_file() { Some(Tool::at(own)) } else { Tool::find("python3") }) else {
        return;
    };
    let root = tempfile::tempdir().unwrap();
    let imported = python.run_in(root.path(), &["-c", "import oslo_utils.imageutils"]);
    if imported.code != Some(0) {
        return skip("oslo.utils not found");
    }
    let bin = root.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(OURS, bin.join("qemu-img")).unwrap();
    let ours = Tool::at(bin.join("qemu-img"));
    let lines = [
        "create -q -f raw base.raw 3M",
        "create -q -f qcow2 plain.qcow2 1G",
        "create -q -f qcow2 -b base.raw -F raw overlay.qcow2",
        "create -q -f qcow2 -o cluster_size=4k,compat=0.10 -b overlay.qcow2 -F qcow2 old.qcow2",
        "convert -O qcow2 -c overlay.qcow2 packed.qcow2",
        "create -q -f qcow2 -o data_file=outside.raw,data_file_raw=on external.qcow2 5M",
        "create -q -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 --object secret,id=s,data=w \
         locked.qcow2 5M",
        "create -q -f luks -o key-secret=s,iter-time=10 --object secret,id=s,data=w locked.luks 5M",
    ];
    for line in lines {
        ours.run_in(root.path(), &words(line)).success();
    }
    qemu_img.run_in(root.path(), &words("snapshot -c first plain.qcow2")).success();
    let path = std::env::var("PATH").unwrap_or_default();
    let images = [
        "base.raw",
        "plain.qcow2",
        "overlay.qcow2",
        "old.qcow2",
        "packed.qcow2",
        "external.qcow2",
        "locked.qcow2",
        "locked.luks",
    ];
    let told = |path: String| {
        let mut command = Command::new(python.path());
        command.arg(tests.join("clients/oslo.py")).env("PATH", path).current_dir(root.path());
        let output = command.args(images).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let (with_ours, with_theirs) = (told(format!("{}:{path}", bin.display())), told(path.clone()));
    assert_eq!(with_ours.lines().count(), images.len() * 2, "{with_ours}");
    for (name, told) in [
        ("locked.qcow2", "'encrypt': {"),
        ("external.qcow2", "'data-file': 'outside.raw'"),
        ("plain.qcow2", "first"),
    ] {
        let json = with_ours.lines().find(|line| line.starts_with(&format!("{name} json")));
        assert!(json.is_some_and(|line| line.contains(told)), "{name}: {with_ours}");
    }
    assert_eq!(with_ours, with_theirs);
}
