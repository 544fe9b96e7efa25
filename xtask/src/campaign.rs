//! Long runs for as long as asked: the programs for them are built with the cross-crate tests.

use std::path::Path;
use std::process::Command;

/// Runs `program` (`crash`, `hunt`) with `args` (`--seconds N --seed N`; see its usage). Errors: it found
/// something, or does not build.
pub(crate) fn run(root: &Path, program: &str, args: &[String]) -> Result<(), String> {
    let cargo = |what: &[&str], args: &[String]| {
        let mut command = Command::new(crate::cargo());
        command.args(what).args(args).current_dir(root);
        match command.status().map_err(|e| format!("cannot run cargo: {e}"))? {
            status if status.success() => Ok(()),
            status => Err(format!("{program}: {status}")),
        }
    };
    let package = ["--quiet", "--release", "--package", "qcow2-tests"];
    // `hunt` runs the command, which is another program of the package.
    cargo(&[&["build"], &package[..], &["--bins"]].concat(), &[])?;
    cargo(&[&["run"], &package[..], &["--bin", program, "--"]].concat(), args)
}
