//! Our help has its own wording but the same options: it names every spelling that qemu-img's help names, and
//! `-o help` lists the same names and types.
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
