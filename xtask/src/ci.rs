//! The steps of CI.

use crate::finding::Finding;
use crate::source::Source;
use crate::{cargo, deps, examples, figures, find_program, instructions, map, purity, tidy, tree};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// One step: name, description, and function.
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) run: fn(&Path) -> Result<(), String>,
}

/// Every step in the order of `ci`: the quick ones first, the tests last.
pub(crate) const STEPS: &[Step] = &[
    Step { name: "tidy", about: "lengths, banned calls, stray text", run: |r| report(tidy_findings(r)) },
    Step {
        name: "purity",
        about: "inner crates without std, I/O, unsafe and byte encoding",
        run: |r| report(purity_findings(r)),
    },
    Step {
        name: "deps",
        about: "dependencies between crates are in the allowed table",
        run: |r| report(deps::check(r)),
    },
    Step { name: "map", about: "paths and names in the root pages exist", run: |r| report(map::check(r)) },
    Step { name: "figures", about: "code metrics stay within their bounds", run: figures::run },
    Step { name: "deny", about: "licences, sources and duplicates of dependencies (cargo-deny)", run: deny },
    Step { name: "fmt", about: "cargo fmt --check", run: |r| command(r, &["fmt", "--all", "--check"], &[]) },
    Step { name: "clippy", about: "clippy, warnings denied", run: clippy },
    Step { name: "msrv", about: "the build with the minimum Rust version", run: msrv },
    Step { name: "doc", about: "rustdoc, warnings denied", run: doc },
    Step { name: "examples", about: "runs the example of every library crate", run: examples::run },
    Step { name: "doctest", about: "the examples in the documentation", run: doctest },
    Step { name: "shuttle", about: "the engine under explored thread interleavings", run: shuttle },
    Step {
        name: "instructions",
        about: "instructions of hot paths, against a table (valgrind)",
        run: instructions::run,
    },
    Step { name: "test", about: "every test (cargo-nextest where installed)", run: test },
];

/// Runs every step, continues after a failure, and prints a summary.
pub(crate) fn all(root: &Path) -> Result<(), String> {
    let started = Instant::now();
    let mut failed = Vec::new();
    let mut seconds = Vec::new();
    for step in STEPS {
        println!("== {}: {}", step.name, step.about);
        let step_started = Instant::now();
        if let Err(error) = (step.run)(root) {
            eprintln!("{}: {error}", step.name);
            failed.push(step.name);
        }
        seconds.push(format!("{} {:.0} s", step.name, step_started.elapsed().as_secs_f64()));
    }
    println!(
        "== ci: {} of {} steps passed in {:.0} s ({})",
        STEPS.len() - failed.len(),
        STEPS.len(),
        started.elapsed().as_secs_f64(),
        seconds.join(", ")
    );
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", "))) }
}

/// Advisories are not checked: they change daily, and a commit is not the cause.
fn deny(root: &Path) -> Result<(), String> {
    if !runs(Command::new(cargo()).args(["deny", "--version"])) {
        println!("skipped: cargo-deny not found");
        return Ok(());
    }
    command(root, &["deny", "--locked", "check", "licenses", "bans", "sources"], &[])
}

/// Builds with the compiler of `rust-version`, if rustup has it.
fn msrv(root: &Path) -> Result<(), String> {
    let version = env!("CARGO_PKG_RUST_VERSION");
    let old_cargo = || {
        let mut command = Command::new("rustup");
        command.args(["run", version, "cargo"]);
        command
    };
    if !runs(old_cargo().arg("--version")) {
        println!("skipped: Rust {version} not found (rustup toolchain install {version})");
        return Ok(());
    }
    // A separate target folder: two compilers sharing one would rebuild each other's crates.
    let args = ["check", "--workspace", "--locked", "--target-dir", "target/msrv"];
    let status = old_cargo().args(args).current_dir(root).status();
    let status = status.map_err(|e| format!("cannot run rustup: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("cargo check with Rust {version}: {status}")) }
}

/// True if a program exists and succeeds.
fn runs(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

fn clippy(root: &Path) -> Result<(), String> {
    command(root, &["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"], &[])
}

fn doc(root: &Path) -> Result<(), String> {
    command(root, &["doc", "--workspace", "--no-deps", "--locked"], &[("RUSTDOCFLAGS", "-D warnings")])
}

fn doctest(root: &Path) -> Result<(), String> {
    command(root, &["test", "--workspace", "--locked", "--doc", "--quiet"], &[])
}

fn shuttle(root: &Path) -> Result<(), String> {
    let features = ["--features", "unstable-shuttle", "--test", "shuttle"];
    for package in ["qcow2-core", "qcow2-ops"] {
        command(
            root,
            &[&["test", "--package", package, "--locked", "--quiet"], &features[..]].concat(),
            &[],
        )?;
    }
    Ok(())
}

fn test(root: &Path) -> Result<(), String> {
    let result = if runs(Command::new(cargo()).args(["nextest", "--version"])) {
        command(root, &["nextest", "run", "--workspace", "--locked", "--no-fail-fast"], &[])
    } else {
        let args =
            ["test", "--workspace", "--locked", "--no-fail-fast", "--lib", "--bins", "--tests", "--examples"];
        command(root, &args, &[])
    };
    // The test runner hides the output of passing tests, and with it their skips, so list missing tools here.
    for tool in TOOLS.iter().filter(|tool| find_program(tool).is_none()) {
        println!("skipped: {tool} not found; the tests that compare with it did not");
    }
    result
}

/// Third-party programs that tests compare with.
const TOOLS: &[&str] = &["qemu-img", "qemu-io", "mke2fs", "e2fsck", "7z", "python3"];

fn tidy_findings(root: &Path) -> Result<Vec<Finding>, String> {
    Ok(tidy::check(&files(root)?))
}

fn purity_findings(root: &Path) -> Result<Vec<Finding>, String> {
    let mut findings = Vec::new();
    for file in files(root)?.iter().filter(|file| file.path.ends_with(".rs")) {
        purity::check(&Source::new(&file.path, &file.text), &mut findings);
    }
    Ok(findings)
}

fn files(root: &Path) -> Result<Vec<tree::File>, String> {
    tree::text_files(root).map_err(|e| format!("cannot read the workspace: {e}"))
}

/// Prints the findings; any finding is a failure.
pub(crate) fn report(findings: Result<Vec<Finding>, String>) -> Result<(), String> {
    let findings = findings?;
    for finding in &findings {
        println!("{finding}");
    }
    if findings.is_empty() { Ok(()) } else { Err(format!("{} findings", findings.len())) }
}

fn command(root: &Path, args: &[&str], variables: &[(&str, &str)]) -> Result<(), String> {
    let shown = format!("cargo {}", args.join(" "));
    let mut command = Command::new(cargo());
    command.args(args).current_dir(root).envs(variables.iter().copied());
    let status = command.status().map_err(|e| format!("cannot run {shown}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{shown}: {status}")) }
}
