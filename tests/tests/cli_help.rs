//! Our help has its own wording but the same options: it names every spelling that qemu-img's help names, and
//! `-o help` lists the same names and types. A mistyped verb or option gets a hint, under our own name.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

use qcow2_testkit::oracle::Tool;
use std::collections::BTreeSet;
use std::path::Path;

const OURS: &str = env!("CARGO_BIN_EXE_qcow2-under-test");

fn both() -> Option<(tempfile::TempDir, Tool, Tool)> {
    let reference = Tool::find("qemu-img")?;
    let root = tempfile::tempdir().unwrap();
    let link = root.path().join("qemu-img");
    std::os::unix::fs::symlink(OURS, &link).unwrap();
    Some((root, reference, Tool::at(link)))
}

/// The option spellings at the start of lines.
fn spellings(help: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in help.lines().map(str::trim).filter(|line| line.starts_with('-')) {
        let names = line.split("  ").next().unwrap_or_default();
        for word in
            names.split([' ', ',', '=', '|', '[']).filter(|word| word.starts_with('-') && word.len() > 1)
        {
            found.insert(word.trim_end_matches([')', ']', '.', ';']).to_owned());
        }
    }
    found
}

#[test]
fn every_verb_has_the_options_of_qemu_img() {
    let Some((root, reference, ours)) = both() else { return };
    let run = |tool: &Tool, args: &[&str]| tool.run_in(root.path(), args);
    let mut missing = Vec::new();
    for verb in
        ["check", "commit", "compare", "convert", "create", "info", "map", "resize", "snapshot", "bench"]
    {
        let theirs = spellings(&run(&reference, &[verb, "--help"]).success().stdout);
        let own = spellings(&run(&ours, &[verb, "--help"]).success().stdout);
        assert!(theirs.len() > 3, "{verb}: {theirs:?}");
        // Spellings that qemu-img's help names but qemu-img does not accept are covered by the table test.
        let unknown = |name: &&String| {
            let said = run(&reference, &[verb, name.as_str()]).stderr;
            said.contains("unrecognized option") || said.contains("invalid option")
        };
        let lost: Vec<&String> = theirs.difference(&own).filter(|name| !unknown(name)).collect();
        if !lost.is_empty() {
            missing.push(format!("{verb}: {lost:?}"));
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn creation_options_have_the_same_names_and_types() {
    let Some((root, reference, ours)) = both() else { return };
    for (format, target) in [("qcow2", None), ("raw", None), ("qcow2", Some("x")), ("raw", Some("x"))] {
        let mut args = vec!["create", "-f", format, "-o", "help"];
        args.extend(target);
        let names = |tool: &Tool| -> Vec<String> {
            let said = tool.run_in(root.path(), &args).success().stdout;
            let lines = said.lines().filter_map(|line| line.strip_prefix("  "));
            lines.filter_map(|line| Some(line.split_once(" - ")?.0.trim().to_owned())).collect()
        };
        assert_eq!(names(&ours), names(&reference), "{args:?}");
        assert!(!Path::new(root.path()).join("x").exists());
    }
}

/// Under the names of others, what they would say and no more.
#[test]
fn slips_of_the_finger_get_a_hint_under_our_own_name() {
    let root = tempfile::tempdir().unwrap();
    let named = |name: &str| {
        let link = root.path().join(name);
        std::os::unix::fs::symlink(OURS, &link).unwrap();
        Tool::at(link)
    };
    let [ours, qemu_img, qemu_io] = ["qcow2", "qemu-img", "qemu-io"].map(named);
    for (line, hint) in [
        ("convret a b", Some("convert")),
        ("chek x", Some("check")),
        ("checksun x", Some("checksum")),
        ("delete x", None),
        ("info --outptu=json x", Some("--output")),
        ("convert --targte-is-zero x y", Some("--target-is-zero")),
        ("create --jsno x", None),
        ("--verison", Some("--version")),
        ("--describr", Some("--describe")),
        ("info --nothing-like-it x", None),
        ("info --for=x y", None),
        ("info -Q x", None),
    ] {
        let args: Vec<&str> = line.split(' ').collect();
        let hint = hint.map(|meant| format!("did you mean '{meant}'?\n")).unwrap_or_default();
        let said = |tool: &Tool| tool.run_in(root.path(), &args).expect_code(1);
        let (own, theirs) = (said(&ours), said(&qemu_img));
        let renamed = theirs.stderr.replace("qemu-img", "qcow2");
        // `--describe` and `checksum` are not known there; what is said of them is the same.
        assert_eq!(own.stderr, format!("{renamed}{hint}"), "{line}");
        assert!(!theirs.stderr.contains("did you mean"), "{line}: {theirs}");
    }
    let said = qemu_io.run_in(root.path(), &["--raed-only", "x"]).expect_code(1);
    assert!(!said.stderr.contains("did you mean"), "{said}");
    let said = ours.run_in(root.path(), &["io", "--raed-only", "x"]).expect_code(1);
    assert!(said.stderr.ends_with("did you mean '--read-only'?\n"), "{said}");
}
