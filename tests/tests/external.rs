//! External snapshots: the image is unchanged, and a new overlay takes all changes.
#![allow(missing_docs, clippy::unwrap_used)]

use qcow2_testkit::oracle::{Qemu, Tool};
use std::fs;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

#[test]
fn the_overlay_takes_all_changes() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let ours = Tool::at(OURS);
    fs::create_dir(folder.join("sub")).unwrap();
    qemu.img.run_in(folder, &["create", "-q", "-f", "qcow2", "a.qcow2", "3000k"]).success();
    qemu.io.run_in(folder, &["-c", "write -P 1 0 1M", "a.qcow2"]).success();
    fs::write(folder.join("r.raw"), vec![2; 1_000_000]).unwrap();
    let before = fs::read(folder.join("a.qcow2")).unwrap();
    ours.run_in(folder, &["snapshot", "--external", "b.qcow2", "a.qcow2"]).success();
    ours.run_in(folder, &["snapshot", "--external", "sub/c.qcow2", "b.qcow2"]).success();
    ours.run_in(folder, &["snapshot", "-f", "raw", "--external", "sub/d.qcow2", "r.raw"]).success();
    for (image, byte) in [("sub/c.qcow2", 1), ("sub/d.qcow2", 2), ("b.qcow2", 1)] {
        let read = format!("read -P {byte} 0 64k");
        let seen = qemu.io.run_in(folder, &["-c", &read, "-c", "write -P 9 0 64k", image]).success();
        assert!(!seen.stdout.contains("failed"), "{seen}");
        qemu.img.run_in(folder, &["check", image]).success();
    }
    assert!(fs::read(folder.join("a.qcow2")).unwrap() == before, "the backing file has changed");
    let info = qemu.img.run_in(folder, &["info", "--output=json", "b.qcow2"]).success().stdout;
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["backing-filename"], "a.qcow2");
    assert_eq!(info["backing-filename-format"], "qcow2");
    assert_eq!(info["virtual-size"], 3000 << 10);
}

#[test]
fn refused_external_snapshots_leave_no_file() {
    let Some(qemu) = Qemu::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let ours = Tool::at(OURS);
    qemu.img.run_in(folder, &["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]).success();
    fs::write(folder.join("r.raw"), vec![2; 10_000]).unwrap();
    fs::write(folder.join("there"), "content").unwrap();
    for args in [
        &["snapshot", "--external", "there", "a.qcow2"][..],
        &["snapshot", "--external", "a.qcow2", "a.qcow2"],
        &["snapshot", "--external", "new", "r.raw"],
        &["snapshot", "--external", "new", "gone.qcow2"],
        &["snapshot", "--external", "nofolder/new", "a.qcow2"],
        &["snapshot", "--external", "new", "-c", "x", "a.qcow2"],
    ] {
        ours.run_in(folder, args).expect_code(1);
        assert!(!folder.join("new").exists(), "{args:?}");
    }
    assert_eq!(fs::read(folder.join("there")).unwrap(), b"content");
}
