//! Runs the crash simulation for as long as asked; its program is built with the cross-crate tests.

use std::path::Path;
use std::process::Command;

/// Runs the simulation with `args` (`--seconds N --seed N`; see its usage). Errors: it found a violation.
pub(crate) fn run(root: &Path, args: &[String]) -> Result<(), String> {
    let mut command = Command::new(crate::cargo());
    command.args(["run", "--quiet", "--release", "--package", "qcow2-tests", "--bin", "crash", "--"]);
    let status = command.args(args).current_dir(root).status();
    match status.map_err(|e| format!("cannot run cargo: {e}"))? {
        status if status.success() => Ok(()),
        status => Err(format!("crash simulation: {status}")),
    }
}
