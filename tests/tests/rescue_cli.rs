//! The verb `rescue`: exit codes, output, what it refuses, and that nothing half-written stays.
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::{Outcome, Tool};
use qcow2_testkit::pattern;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

fn run(folder: &Path, line: &str) -> Outcome {
    Tool::at(env!("CARGO_BIN_EXE_qcow2-under-test")).run_in(folder, &line.split(' ').collect::<Vec<_>>())
}

/// `whole.qcow2` of 4 MiB, all of it data, and `lost.qcow2`, the same without its first cluster.
fn images() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("disk.raw"), pattern::bytes(1, 0, 4 << 20)).unwrap();
    run(folder.path(), "convert -O qcow2 disk.raw whole.qcow2").success();
    fs::copy(folder.path().join("whole.qcow2"), folder.path().join("lost.qcow2")).unwrap();
    let file = fs::File::options().write(true).open(folder.path().join("lost.qcow2")).unwrap();
    file.write_all_at(&[0; 65_536], 0).unwrap();
    folder
}

fn json(outcome: &Outcome) -> serde_json::Value {
    serde_json::from_str(&outcome.stdout).unwrap()
}

#[test]
fn a_whole_image_and_one_without_header_read_the_same() {
    let folder = images();
    let folder = folder.path();
    let whole = run(folder, "rescue --output=json whole.qcow2 a.raw").success();
    assert_eq!(
        (json(&whole)["complete"].as_bool(), json(&whole)["lost-bytes"].as_u64()),
        (Some(true), Some(0))
    );
    run(folder, "compare -s disk.raw a.raw").success();
    let lost = run(folder, "rescue --output=json --size 4M lost.qcow2 b.qcow2").success();
    assert_eq!(json(&lost)["header-found"].as_bool(), Some(false));
    assert_eq!(json(&lost)["cluster-size"].as_u64(), Some(65_536));
    run(folder, "compare disk.raw b.qcow2").success();
    assert!(run(folder, "info b.qcow2").success().stdout.contains("file format: qcow2"));
    // Without a size the disk is as long as its tables reach, which is not all that is known of it.
    let text = run(folder, "rescue -p lost.qcow2 c.raw").expect_code(3).stdout;
    assert!(text.contains("(100.00/100%)") && text.contains("the real size is not known"), "{text}");
    assert_eq!(fs::metadata(folder.join("c.raw")).unwrap().len(), 512 << 20);
}

#[test]
fn what_is_lost_is_listed() {
    let folder = images();
    let folder = folder.path();
    let file = fs::File::options().write(true).open(folder.join("whole.qcow2")).unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(len - (1 << 20)).unwrap();
    let cut = run(folder, "rescue --output json whole.qcow2 a.raw").expect_code(3);
    let report = json(&cut);
    assert_eq!(report["lost-bytes"].as_u64(), Some(1 << 20), "{report}");
    let expected = serde_json::json!({"reason": "cluster-past-end", "start": 3 << 20, "length": 1 << 20});
    assert_eq!(report["lost"], serde_json::json!([expected]));
    let (disk, copy) = (fs::read(folder.join("disk.raw")).unwrap(), fs::read(folder.join("a.raw")).unwrap());
    assert!(copy[..3 << 20] == disk[..3 << 20] && copy[3 << 20..].iter().all(|&byte| byte == 0));
    assert_eq!(copy.len(), disk.len());
}

#[test]
fn no_name_in_the_image_is_followed() {
    let folder = images();
    let folder = folder.path();
    run(folder, "create -q -f qcow2 -b whole.qcow2 -F qcow2 top.qcow2").success();
    let report = json(&run(folder, "rescue --output=json top.qcow2 a.raw").expect_code(3));
    assert_eq!(report["lost"][0]["reason"], "backing-file-not-given");
    run(folder, "rescue -b whole.qcow2 -F qcow2 top.qcow2 b.raw").success();
    run(folder, "compare disk.raw b.raw").success();
}

#[test]
fn the_image_itself_is_no_target() {
    let folder = images();
    let folder = folder.path();
    fs::hard_link(folder.join("lost.qcow2"), folder.join("other.raw")).unwrap();
    let before = fs::read(folder.join("lost.qcow2")).unwrap();
    for target in ["lost.qcow2", "other.raw"] {
        let refused = run(folder, &format!("rescue lost.qcow2 {target}")).expect_code(1);
        assert!(refused.stderr.contains("cannot be written to"), "{refused}");
    }
    assert!(fs::read(folder.join("lost.qcow2")).unwrap() == before);
}

#[test]
fn nothing_stays_of_a_target_that_fails() {
    let folder = images();
    let folder = folder.path();
    fs::write(folder.join("noise"), pattern::bytes(2, 0, 300_000)).unwrap();
    let refused = run(folder, "rescue noise a.raw").expect_code(1);
    assert!(refused.stderr.contains("cluster size"), "{refused}");
    run(folder, "rescue --cluster-size 1000 lost.qcow2 a.raw").expect_code(1);
    run(folder, "rescue lost.qcow2").expect_code(1);
    assert!(!folder.join("a.raw").exists());
}

#[test]
fn qemu_img_has_no_such_verb() {
    let folder = images();
    let link = folder.path().join("qemu-img");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_qcow2-under-test"), &link).unwrap();
    let refused = Tool::at(&link).run_in(folder.path(), &["rescue", "lost.qcow2", "a.raw"]).expect_code(1);
    assert!(refused.stderr.contains("Command not found: rescue"), "{refused}");
    let help = Tool::at(&link).run_in(folder.path(), &["--help"]).success().stdout;
    assert!(!help.contains("rescue"));
}
