//! Runs every fuzz target for its share of the time, one after the other, and prints what they did as a
//! table.
//!
//! A target is a row of [`TARGETS`] and a file in `fuzz/fuzz_targets/`; a test compares the two.

mod run;

use run::{Outcome, Runner};
use std::path::Path;
use std::process::Command;

/// One target.
struct Target {
    name: &'static str,
    /// Its committed inputs, a folder in `fuzz/seeds/`.
    seeds: &'static str,
    /// Its part of the time, relative to the others.
    share: u64,
    /// The longest input in bytes.
    max_len: u64,
}

/// Every target, the quick ones first. Targets that take whole images need room for them; the others are
/// decided by their first bytes.
const TARGETS: &[Target] = &[
    Target { name: "parse_header", seeds: "parse_header", share: 2, max_len: 4096 },
    Target { name: "parse_tables", seeds: "parse_tables", share: 2, max_len: 2048 },
    Target { name: "expand", seeds: "expand", share: 2, max_len: 4096 },
    Target { name: "open_read", seeds: "images", share: 2, max_len: 64 << 10 },
    Target { name: "open_write", seeds: "images", share: 2, max_len: 64 << 10 },
    Target { name: "open_change", seeds: "images", share: 2, max_len: 64 << 10 },
    Target { name: "check_then_read", seeds: "images", share: 2, max_len: 64 << 10 },
    Target { name: "luks_header", seeds: "luks_header", share: 2, max_len: 1024 },
    Target { name: "names", seeds: "names", share: 2, max_len: 512 },
    Target { name: "nbd_replies", seeds: "nbd_replies", share: 2, max_len: 1024 },
    Target { name: "nbd_requests", seeds: "nbd_requests", share: 4, max_len: 4096 },
    Target { name: "work", seeds: "decisions", share: 6, max_len: 512 },
    Target { name: "damaged_work", seeds: "decisions", share: 6, max_len: 512 },
    Target { name: "damaged_check", seeds: "decisions", share: 4, max_len: 512 },
    Target { name: "rescue", seeds: "images", share: 4, max_len: 64 << 10 },
    Target { name: "vet", seeds: "images", share: 2, max_len: 64 << 10 },
    Target { name: "repair", seeds: "decisions", share: 6, max_len: 512 },
];

/// The campaign beside qemu-img: a program of `qcow2-tests` that starts processes for every image, so without
/// libFuzzer, and its share.
const DIFFER: (&str, u64) = ("differ", 2);

/// Seconds of a run that names none: enough to see that every target works.
const SECONDS: u64 = 120;

const USAGE: &str = "usage: cargo xtask fuzz [--seconds N] [--target NAME] [--list]";

/// Runs the targets as `args` say. Errors: a missing tool, or a finding.
pub(crate) fn run(root: &Path, args: &[String]) -> Result<(), String> {
    let (mut seconds, mut only) = (SECONDS, None);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match (arg.as_str(), args.next()) {
            ("--list", None) => return list(),
            ("--seconds", Some(number)) => seconds = number.parse().map_err(|_| USAGE)?,
            ("--target", Some(name)) => only = Some(name.as_str()),
            _ => return Err(USAGE.to_owned()),
        }
    }
    let chosen = |name: &str| only.is_none_or(|only| only == name);
    let targets: Vec<&Target> = TARGETS.iter().filter(|target| chosen(target.name)).collect();
    let differ = chosen(DIFFER.0);
    if targets.is_empty() && !differ {
        return Err(format!("no such target; {USAGE}"));
    }
    let shares = targets.iter().map(|target| target.share).sum::<u64>() + if differ { DIFFER.1 } else { 0 };
    let part = |share: u64| (seconds * share / shares).max(1);
    let mut outcomes: Vec<(&str, Outcome)> = Vec::new();
    if !targets.is_empty() {
        let runner = Runner::prepare(root)?;
        outcomes.extend(targets.iter().map(|target| (target.name, runner.run(target, part(target.share)))));
    }
    if differ {
        outcomes.push((DIFFER.0, run::differ(root, part(DIFFER.1))?));
    }
    print(&outcomes);
    let findings = outcomes.iter().filter(|(_, outcome)| outcome.finding.is_some()).count();
    if findings == 0 { Ok(()) } else { Err(format!("{findings} targets with a finding")) }
}

fn list() -> Result<(), String> {
    TARGETS.iter().map(|target| target.name).chain([DIFFER.0]).for_each(|name| println!("{name}"));
    Ok(())
}

fn print(outcomes: &[(&str, Outcome)]) {
    println!("| target | seconds | executions | edges | of | features | new inputs | peak MiB | finding |");
    println!("|---|--:|--:|--:|--:|--:|--:|--:|---|");
    let (mut seconds, mut executions, mut findings) = (0, 0, 0);
    for (name, outcome) in outcomes {
        let Outcome { seconds: took, executions: done, edges, of, features, added, peak_mib, finding } =
            outcome;
        let found = finding.as_deref().unwrap_or("none");
        println!(
            "| {name} | {took} | {done} | {edges} | {of} | {features} | {added} | {peak_mib} | {found} |"
        );
        (seconds, executions) = (seconds + took, executions + done);
        findings += u64::from(finding.is_some());
    }
    println!("| all | {seconds} | {executions} | | | | | | {findings} |");
    println!("edges, features: libFuzzer's `cov` and `ft`; of: the edges that are counted in the program.");
}

/// True if a program exists and succeeds.
fn runs(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_target_has_a_program_and_seeds() {
        let folder = crate::tree::root().join("fuzz");
        let names =
            |entry: std::fs::DirEntry| entry.path().file_stem().unwrap().to_string_lossy().into_owned();
        let files = std::fs::read_dir(folder.join("fuzz_targets")).unwrap();
        let files: BTreeSet<String> = files.map(|entry| names(entry.unwrap())).collect();
        let listed: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
        assert_eq!(files, listed);
        let manifest = std::fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        for Target { name, seeds, .. } in TARGETS {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
            assert!(folder.join("seeds").join(seeds).is_dir(), "{seeds}");
        }
    }
}
