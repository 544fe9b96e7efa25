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

/// Cuts out `[at, at + 65536)` of the file called `name`.
fn lose(folder: &Path, name: &str, at: u64) {
    let file = fs::File::options().write(true).open(folder.join(name)).unwrap();
    file.write_all_at(&[0; 65_536], at).unwrap();
}

/// The number at `at` in the file called `name`.
fn number(folder: &Path, name: &str, at: u64) -> u64 {
    let mut bytes = [0; 8];
    fs::File::open(folder.join(name)).unwrap().read_exact_at(&mut bytes, at).unwrap();
    u64::from_be_bytes(bytes)
}

#[test]
fn guest_data_comes_from_the_data_file_that_is_given() {
    let folder = images();
    let folder = folder.path();
    run(folder, "convert -O qcow2 -o data_file=data.raw disk.raw ext.qcow2").success();
    let report = json(&run(folder, "rescue --output=json ext.qcow2 a.raw").expect_code(3));
    assert_eq!(report["lost"][0]["reason"], "data-file-not-given");
    assert_eq!(report["lost-bytes"].as_u64(), Some(4 << 20));
    assert!(fs::read(folder.join("a.raw")).unwrap().iter().all(|&byte| byte == 0));
    fs::rename(folder.join("data.raw"), folder.join("elsewhere")).unwrap();
    run(folder, "rescue --data-file elsewhere ext.qcow2 b.raw").success();
    run(folder, "compare -s disk.raw b.raw").success();
    // Without the header, which says that there is such a file.
    lose(folder, "ext.qcow2", 0);
    let report =
        json(&run(folder, "rescue --output=json --size 4M --data-file elsewhere ext.qcow2 c.raw").success());
    assert_eq!(report["header-found"].as_bool(), Some(false));
    run(folder, "compare -s disk.raw c.raw").success();
    // A file that is too short has no more than it has.
    fs::File::options().write(true).open(folder.join("elsewhere")).unwrap().set_len(3 << 20).unwrap();
    run(folder, "convert -O qcow2 -o data_file=data.raw disk.raw ext2.qcow2").success();
    let report =
        json(&run(folder, "rescue --output=json --data-file elsewhere ext2.qcow2 d.raw").expect_code(3));
    assert_eq!(report["lost-bytes"].as_u64(), Some(1 << 20), "{report}");
    // It is no target, and one that is not there is an error.
    let before = fs::read(folder.join("elsewhere")).unwrap();
    run(folder, "rescue --data-file elsewhere ext2.qcow2 elsewhere").expect_code(1);
    assert!(fs::read(folder.join("elsewhere")).unwrap() == before);
    let refused = run(folder, "rescue --data-file nowhere ext2.qcow2 e.raw").expect_code(1);
    assert!(refused.stderr.contains("nowhere") && !folder.join("e.raw").exists(), "{refused}");
}

#[test]
fn the_disk_of_an_l1_table_that_is_named() {
    let folder = images();
    let folder = folder.path();
    run(folder, "snapshot -c old whole.qcow2").success();
    let io = ["io", "-f", "qcow2", "-c", "write -q -P 7 0 4M", "whole.qcow2"];
    Tool::at(env!("CARGO_BIN_EXE_qcow2-under-test")).run_in(folder, &io).success();
    let table = number(folder, "whole.qcow2", number(folder, "whole.qcow2", 64));
    let line = |target: &str| format!("rescue --output=json --l1-table {table} whole.qcow2 {target}");
    let report = json(&run(folder, &line("a.raw")).success());
    assert_eq!(report["l1-table"].as_u64(), Some(table));
    assert_eq!(report["l1-table-searched"].as_bool(), Some(false));
    run(folder, "compare -s disk.raw a.raw").success();
    // The same without a header.
    lose(folder, "whole.qcow2", 0);
    let line = format!("rescue --size 4M --l1-table {table} whole.qcow2 b.raw");
    run(folder, &line).success();
    run(folder, "compare -s disk.raw b.raw").success();
    for offset in ["1000", "0", "1T", "9223372036854710272", "nonsense", "-1"] {
        let refused = run(folder, &format!("rescue --l1-table {offset} whole.qcow2 c.raw"));
        assert!(!folder.join("c.raw").exists() && refused.code == Some(1), "{offset}: {refused}");
    }
}

#[test]
fn encrypted_images_are_read_with_their_keys() {
    let folder = images();
    let folder = folder.path();
    let make = "convert -O qcow2 --object secret,id=s,data=pw -o encrypt.format=luks,encrypt.key-secret=s,\
                encrypt.iter-time=10 disk.raw luks.qcow2";
    run(folder, make).success();
    let rescue = |password: &str, more: &str, image: &str, target: &str| {
        let object = format!("--object secret,id=s,data={password}");
        let name = format!("driver=qcow2,encrypt.key-secret=s,file.filename={image}");
        run(folder, &format!("rescue {object} {more}--output=json --image-opts {name} {target}"))
    };
    let report = json(&rescue("pw", "", "luks.qcow2", "a.raw").success());
    assert_eq!((report["complete"].as_bool(), report["lost-bytes"].as_u64()), (Some(true), Some(0)));
    run(folder, "compare -s disk.raw a.raw").success();
    let damaged = fs::read(folder.join("luks.qcow2")).unwrap();
    fs::write(folder.join("cut.qcow2"), &damaged[..damaged.len() - (1 << 20)]).unwrap();
    let report = json(&rescue("pw", "", "cut.qcow2", "b.raw").expect_code(3));
    assert_eq!(report["lost-bytes"].as_u64(), Some(1 << 20), "{report}");
    // Several threads encrypt: which clusters stand last in the file differs from run to run.
    let mut expected = fs::read(folder.join("disk.raw")).unwrap();
    for lost in report["lost"].as_array().unwrap() {
        assert_eq!(lost["reason"], "cluster-past-end", "{report}");
        let start = usize::try_from(lost["start"].as_u64().unwrap()).unwrap();
        let length = usize::try_from(lost["length"].as_u64().unwrap()).unwrap();
        expected[start..start + length].fill(0);
    }
    assert!(fs::read(folder.join("b.raw")).unwrap() == expected, "{report}");
    // Nothing is made of ciphertext, and what is there stays.
    fs::write(folder.join("old.raw"), b"old").unwrap();
    for target in ["c.raw", "old.raw"] {
        let refused = rescue("wrong", "", "luks.qcow2", target).expect_code(1);
        assert!(refused.stderr.contains("invalid password"), "{refused}");
        let refused = run(folder, &format!("rescue luks.qcow2 {target}")).expect_code(1);
        assert!(refused.stderr.contains("no option names the secret"), "{refused}");
    }
    assert!(!folder.join("c.raw").exists());
    assert_eq!(fs::read(folder.join("old.raw")).unwrap(), b"old");
}

#[test]
fn a_target_that_exists_is_replaced_as_a_whole() {
    let folder = images();
    let folder = folder.path();
    for target in ["a.raw", "a.qcow2"] {
        fs::write(folder.join(target), pattern::bytes(3, 0, 9 << 20)).unwrap();
        run(folder, &format!("rescue whole.qcow2 {target}")).success();
        run(folder, &format!("compare disk.raw {target}")).success();
    }
    assert_eq!(fs::metadata(folder.join("a.raw")).unwrap().len(), 4 << 20);
    // What cannot be rescued, or not as it was asked for, leaves what is there.
    fs::write(folder.join("noise"), pattern::bytes(2, 0, 300_000)).unwrap();
    fs::write(folder.join("old.raw"), b"old").unwrap();
    for line in [
        "rescue noise old.raw",
        "rescue nowhere old.raw",
        "rescue --cluster-size 1000 lost.qcow2 old.raw",
        "rescue -b nowhere whole.qcow2 old.raw",
        "rescue -O nonsense whole.qcow2 old.raw",
    ] {
        run(folder, line).expect_code(1);
        assert_eq!(fs::read(folder.join("old.raw")).unwrap(), b"old", "{line}");
    }
    fs::create_dir(folder.join("folder.raw")).unwrap();
    run(folder, "rescue whole.qcow2 folder.raw").expect_code(1);
    run(folder, "rescue whole.qcow2 no/such/folder.raw").expect_code(1);
    // A backing file is no target either.
    run(folder, "create -q -f qcow2 -b whole.qcow2 -F qcow2 top.qcow2").success();
    let before = fs::read(folder.join("whole.qcow2")).unwrap();
    run(folder, "rescue -b whole.qcow2 -F qcow2 top.qcow2 whole.qcow2").expect_code(1);
    assert!(fs::read(folder.join("whole.qcow2")).unwrap() == before);
}

#[test]
fn the_report_as_json() {
    let folder = images();
    let folder = folder.path();
    let expected = |l1: Option<u64>, header: bool, tables: u64| {
        serde_json::json!({
            "filename": if header { "whole.qcow2" } else { "lost.qcow2" },
            "complete": true,
            "header-found": header,
            "cluster-size": 65_536,
            "extended-l2": false,
            "virtual-size": 4 << 20,
            "size-known": true,
            "refcounts-found": true,
            "l1-table": l1,
            "l1-table-searched": !header,
            "other-l1-tables": [],
            "l2-tables": tables,
            "unplaced-l2-tables": 0,
            "unplaced-bytes": 0,
            "lost-bytes": 0,
            "lost-omitted": 0,
            "lost": [],
            "placed-omitted": 0,
            "placed": [],
        })
    };
    let l1 = Some(number(folder, "whole.qcow2", 40));
    let whole = run(folder, "rescue --output=json whole.qcow2 a.raw").success();
    assert_eq!((json(&whole), &*whole.stderr), (expected(l1, true, 1), ""));
    let lost = run(folder, "rescue --output=json -p --size 4M lost.qcow2 a.raw").success();
    assert_eq!(json(&lost), expected(l1, false, 1), "progress is not among it");
    assert!(lost.stderr.is_empty(), "{lost}");
    let refused = run(folder, "rescue --output=xml whole.qcow2 b.raw").expect_code(1);
    assert!(refused.stdout.is_empty() && !folder.join("b.raw").exists(), "{refused}");
}
