//! What the command does under its own name only: better defaults, several images at once.

#![allow(clippy::unwrap_used, reason = "helpers of a test")]

use qcow2_testkit::oracle::{Outcome, Tool};
use std::path::Path;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

fn run(folder: &Path, line: &str) -> Outcome {
    let args: Vec<&str> = line.split_whitespace().collect();
    Tool::at(OURS).run_in(folder, &args)
}

/// The command under qemu-img's name.
fn drop_in(folder: &Path) -> Tool {
    let link = folder.join("qemu-img");
    if !link.exists() {
        std::os::unix::fs::symlink(OURS, &link).unwrap();
    }
    Tool::at(link)
}

#[track_caller]
fn check_format(folder: &Path, name: &str, format: &str) {
    let info = run(folder, &format!("info {name}")).success().stdout;
    assert!(info.contains(&format!("file format: {format}\n")), "{name}: {info}");
}

#[test]
fn the_format_of_a_new_file_follows_its_extension() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (name, format) in [("a.qcow2", "qcow2"), ("b.QCOW2", "qcow2"), ("c.img", "raw"), ("d", "raw")] {
        let made = run(folder, &format!("create {name} 1M")).success();
        assert!(made.stdout.contains(&format!("fmt={format} ")) && made.stderr.is_empty(), "{made}");
        check_format(folder, name, format);
        let copy = format!("copy-{name}");
        run(folder, &format!("convert -f {format} {name} {copy}")).success();
        check_format(folder, &copy, format);
        let part = format!("part-{name}");
        run(folder, &format!("dd -f {format} bs=64k count=1 if={name} of={part}")).success();
        check_format(folder, &part, format);
    }
    // An explicit format wins.
    run(folder, "create -f raw e.qcow2 1M").success();
    check_format(folder, "e.qcow2", "raw");
    // An existing file keeps its format: raw data must not overwrite its tables.
    run(folder, "create f.qcow2 1M").success();
    run(folder, "convert -n -f raw c.img f.qcow2").success();
    check_format(folder, "f.qcow2", "qcow2");
}

#[test]
fn an_extension_of_an_unsupported_format_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    run(folder, "create a.img 1M").success();
    for line in ["create x.vmdk 1M", "convert -f raw a.img x.vmdk", "dd -f raw if=a.img of=x.vmdk"] {
        let refused = run(folder, line).expect_code(1);
        let wanted =
            "qcow2: x.vmdk: no vmdk images can be made; for another format name it (raw, qcow2, luks)\n";
        assert_eq!((&*refused.stdout, &*refused.stderr), ("", wanted), "{line}");
        assert!(!folder.join("x.vmdk").exists(), "{line}");
    }
    run(folder, "create -f raw x.vmdk 1M").success();
}

#[test]
fn as_qemu_img_the_default_format_is_raw() {
    let folder = tempfile::tempdir().unwrap();
    let tool = drop_in(folder.path());
    for name in ["a.qcow2", "b.vmdk"] {
        tool.run_in(folder.path(), &["create", name, "1M"]).success();
        check_format(folder.path(), name, "raw");
    }
    let refused = tool.run_in(folder.path(), &["info", "a.qcow2", "b.vmdk"]).expect_code(1);
    assert!(refused.stderr.starts_with("qemu-img: Expecting one image file name\n"), "{refused}");
}

#[test]
fn several_images_are_reported_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    run(folder, "create a.qcow2 1M").success();
    run(folder, "create b.img 2M").success();
    let both = run(folder, "info a.qcow2 b.img").success().stdout;
    let one_by_one = ["info a.qcow2", "info b.img"].map(|line| run(folder, line).success().stdout);
    assert_eq!(both, one_by_one.join("\n"));
    let json = run(folder, "info --output=json a.qcow2 b.img").success().stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let sizes: Vec<_> = json.as_array().unwrap().iter().map(|info| info["virtual-size"].as_u64()).collect();
    assert_eq!(sizes, [Some(1 << 20), Some(2 << 20)]);
    let sums = run(folder, "checksum a.qcow2 b.img").success().stdout;
    let one_by_one = ["checksum a.qcow2", "checksum b.img"].map(|line| run(folder, line).success().stdout);
    assert_eq!(sums, one_by_one.concat());
    let json = run(folder, "checksum --output=json a.qcow2 b.img").success().stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json.as_array().unwrap()[1]["filename"], "b.img");
}

#[test]
fn a_missing_image_does_not_hide_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    run(folder, "create a.qcow2 1M").success();
    run(folder, "create b.img 2M").success();
    for verb in ["info", "checksum"] {
        let seen = run(folder, &format!("{verb} a.qcow2 none b.img")).expect_code(1);
        assert_eq!(seen.stdout, run(folder, &format!("{verb} a.qcow2 b.img")).success().stdout);
        assert!(seen.stderr.contains("'none'") && seen.stderr.contains("No such file"), "{seen}");
    }
}

#[test]
fn an_error_is_one_sentence_and_as_qemu_img_the_same_as_there() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for line in [
        "create -q a.qcow2 1M",
        "create -q -u -F qcow2 -b gone b.qcow2 1M",
        "create -q -u -F qcow2 -b b.qcow2 c.qcow2 1M",
        "create -q -u -F qcow2 -b junk d.qcow2 1M",
        "create -q -u -F qcow2 -b d.qcow2 e.qcow2 1M",
    ] {
        run(folder, line).success();
    }
    std::fs::write(folder.join("junk"), "junk").unwrap();
    let gone = "No such file or directory";
    for (line, own, there) in [
        (
            "info x",
            format!("Could not open 'x': {gone}"),
            format!("Could not open 'x': Could not open 'x': {gone}"),
        ),
        (
            "map --image-opts driver=qcow2,file.filename=x",
            format!("Could not open 'x' of 'driver=qcow2,file.filename=x': {gone}"),
            format!("Could not open 'driver=qcow2,file.filename=x': Could not open 'x': {gone}"),
        ),
        (
            "map c.qcow2",
            format!("Could not open 'gone' in the backing chain of 'c.qcow2': {gone}"),
            "Could not open 'c.qcow2': Could not open backing file: Could not open backing file: \
             Could not open 'gone': No such file or directory"
                .to_owned(),
        ),
        (
            "map d.qcow2",
            "Could not open the backing file of 'd.qcow2': Image is not in qcow2 format".to_owned(),
            "Could not open 'd.qcow2': Could not open backing file: Image is not in qcow2 format".to_owned(),
        ),
        (
            "map e.qcow2",
            "Could not open the backing file 2 layers below 'e.qcow2': Image is not in qcow2 format"
                .to_owned(),
            "Could not open 'e.qcow2': Could not open backing file: Could not open backing file: \
             Image is not in qcow2 format"
                .to_owned(),
        ),
        (
            "create -q -f qcow2 -F qcow2 -b x y 1M",
            format!("y: Could not open 'x': {gone}"),
            format!("y: Could not open 'x': {gone}"),
        ),
        (
            "rebase -F qcow2 -b x a.qcow2",
            format!("Could not open 'x': {gone}"),
            format!("Could not open new backing file 'x': Could not open 'x': {gone}"),
        ),
    ] {
        let args: Vec<&str> = line.split_whitespace().collect();
        let first = |told: Outcome| told.stderr.lines().next().unwrap_or_default().to_owned();
        assert_eq!(first(run(folder, line).expect_code(1)), format!("qcow2: {own}"), "{line}");
        let told = drop_in(folder).run_in(folder, &args).expect_code(1);
        assert_eq!(first(told), format!("qemu-img: {there}"), "{line}");
        let Some(qemu) = Tool::find("qemu-img") else { continue };
        assert_eq!(first(qemu.run_in(folder, &args)), format!("qemu-img: {there}"), "{line}");
    }
    assert_eq!(run(folder, "io x").expect_code(1).stderr, format!("qcow2: can't open device x: {gone}\n"));
}
