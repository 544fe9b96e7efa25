//! Long runs for as long as asked: the programs for them are built with the cross-crate tests.

use std::path::Path;
use std::process::Command;

/// Runs `program` (`crash`, `damage`, `hunt`) with `args` (`--seconds N --seed N`; see its usage). Errors: it
/// found something, or does not build.
pub(crate) fn run(root: &Path, program: &str, args: &[String]) -> Result<(), String> {
    let cargo = |what: &[&str], args: &[String]| {
        let mut command = Command::new(crate::cargo());
        command.args(what).args(args).current_dir(root);
        match command.status().map_err(|e| format!("cannot run cargo: {e}"))? {
            status if status.success() => Ok(()),
            status => Err(format!("{program}: {status}")),
        }
    };
    // Damaged images are a matter for the assertions and the checked arithmetic of the profile of tests.
    let profile: &[&str] = if program == "damage" { &[] } else { &["--release"] };
    let package = [&["--quiet", "--package", "qcow2-tests"], profile].concat();
    // `damage` and `hunt` run the command, which is another program of the package.
    cargo(&[&["build"], &*package, &["--bins"]].concat(), &[])?;
    cargo(&[&["run"], &*package, &["--bin", program, "--"]].concat(), args)
}
