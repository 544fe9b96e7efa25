//! Measures which faults the tests detect: applies known one-line faults to a copy of the tree, one after the
//! other.
//!
//! The lists are the `.txt` files in this folder; [`list`] documents their format. The copy and its build
//! output are in `target/mutants`, so the working tree is never touched, and the next run repairs what an
//! aborted run leaves.

mod copy;
mod list;

use copy::Copy;
use list::Fault;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// Time limit for the tests of a fault. Past it they count as hanging, which detects the fault too.
const PATIENCE: Duration = Duration::from_secs(180);

const USAGE: &str = "usage: cargo xtask mutants [--list] [PATTERN...]
  --list    shows the faults, and which have lost their place in the sources
  PATTERN   only the faults whose name or file has one of these in it";

/// Result of a fault.
enum Outcome {
    Caught(String),
    Missed,
    /// It cannot be applied, or the tree does not build with it.
    Stale(String),
}

/// Runs the faults that `args` select. Errors: a fault is not detected or does not apply.
pub(crate) fn run(root: &Path, args: &[String]) -> Result<(), String> {
    let (options, patterns): (Vec<&String>, Vec<&String>) = args.iter().partition(|arg| arg.starts_with('-'));
    let wanted = |fault: &Fault| {
        patterns.is_empty() || patterns.iter().any(|p| fault.name.contains(*p) || fault.file.contains(*p))
    };
    let faults: Vec<Fault> =
        list::load(&root.join("xtask/src/mutants"))?.into_iter().filter(wanted).collect();
    match options.as_slice() {
        [] if faults.is_empty() => Err("no such fault; --list shows them".to_owned()),
        [] => run_all(root, &faults),
        [option] if *option == "--list" => show(root, &faults),
        _ => Err(USAGE.to_owned()),
    }
}

fn show(root: &Path, faults: &[Fault]) -> Result<(), String> {
    for fault in faults {
        let text = std::fs::read_to_string(root.join(&fault.file)).unwrap_or_default();
        let state = if fault.apply(&text).is_ok() { "" } else { "  STALE" };
        println!("{:<46} {}{state}", fault.name, fault.file);
        fault.tests.iter().for_each(|test| println!("{:<46}   {test}", ""));
    }
    println!("{} faults", faults.len());
    Ok(())
}

fn run_all(root: &Path, faults: &[Fault]) -> Result<(), String> {
    let copy = Copy::new(root)?;
    // Tests that fail or do not run without a fault would seem to detect every fault.
    let tests: BTreeSet<&String> = faults.iter().flat_map(|fault| &fault.tests).collect();
    for test in &tests {
        println!("without a fault: {test}");
        test_run(&copy, "without-a-fault", test)
            .and_then(|failed| failed.map_or(Ok(()), Err))
            .map_err(|error| format!("the tests do not pass as they are: {test}: {error}"))?;
    }
    let (mut caught, mut missed, mut stale) = (0, Vec::new(), Vec::new());
    for fault in faults {
        let started = Instant::now();
        let outcome = try_fault(&copy, fault)?;
        let seconds = started.elapsed().as_secs();
        match outcome {
            Outcome::Caught(how) => {
                caught += 1;
                println!("caught  {} ({how}, {seconds} s)", fault.name);
            }
            Outcome::Missed => {
                missed.push(&*fault.name);
                println!("MISSED  {} ({seconds} s)", fault.name);
            }
            Outcome::Stale(why) => {
                stale.push(&*fault.name);
                println!("STALE   {}: {why}", fault.name);
            }
        }
    }
    let tried = caught + missed.len();
    println!(
        "{caught} of {tried} faults were detected: {:.1} %",
        100.0 * caught as f64 / tried.max(1) as f64
    );
    match (missed.as_slice(), stale.as_slice()) {
        ([], []) => Ok(()),
        _ => Err(format!("missed: [{}], stale: [{}]", missed.join(", "), stale.join(", "))),
    }
}

fn try_fault(copy: &Copy, fault: &Fault) -> Result<Outcome, String> {
    let _back = match copy.put_in(fault) {
        Ok(back) => back,
        Err(why) => return Ok(Outcome::Stale(why)),
    };
    for test in &fault.tests {
        match test_run(copy, &fault.name, test) {
            Ok(None) => {}
            Ok(Some(how)) => return Ok(Outcome::Caught(how)),
            Err(why) => return Ok(Outcome::Stale(why)),
        }
    }
    Ok(Outcome::Missed)
}

/// Builds and runs the tests that `test`, arguments of `cargo test`, selects. `None` if they pass, else how
/// they fail. Errors: they cannot be built.
fn test_run(copy: &Copy, name: &str, test: &str) -> Result<Option<String>, String> {
    let args: Vec<&str> = test.split_whitespace().collect();
    let log = copy.log(name)?;
    let built = command(copy, &[&args[..], &["--no-run"]].concat(), &log)?.status();
    match built.map_err(|e| format!("cannot run cargo: {e}"))? {
        status if status.success() => {}
        status => return Err(format!("does not build ({status}), see {}", log.display())),
    }
    let Some(status) = in_time(command(copy, &args, &log)?)? else {
        return Ok(Some(format!("no end after {} s", PATIENCE.as_secs())));
    };
    if !status.success() {
        return Ok(Some("failed".to_owned()));
    }
    let ran = std::fs::read_to_string(&log).unwrap_or_default();
    let ran = ran.lines().any(|line| line.starts_with("test result: ok.") && !line.contains(" 0 passed"));
    if ran { Ok(None) } else { Err("no test has that name".to_owned()) }
}

fn command(copy: &Copy, args: &[&str], log: &Path) -> Result<Command, String> {
    let file = std::fs::File::create(log).map_err(|e| format!("{}: {e}", log.display()))?;
    let twice = file.try_clone().map_err(|e| format!("{}: {e}", log.display()))?;
    let mut command = Command::new(crate::cargo());
    command.arg("test").args(args).current_dir(copy.tree()).env("CARGO_TARGET_DIR", copy.build());
    command.stdin(std::process::Stdio::null()).stdout(file).stderr(twice);
    Ok(command)
}

/// Waits for `command` to end. `None` if it was killed after [`PATIENCE`], with all its child processes.
fn in_time(mut command: Command) -> Result<Option<ExitStatus>, String> {
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let mut child = command.spawn().map_err(|e| format!("cannot run cargo: {e}"))?;
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
            return Ok(Some(status));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    #[cfg(unix)]
    drop(Command::new("kill").args(["-KILL", "--", &format!("-{}", child.id())]).status());
    let _ = child.kill();
    child.wait().map_err(|e| e.to_string())?;
    Ok(None)
}
