//! Damages images, and checks and repairs them beside qemu-img; the program is built with the tests.

use std::path::Path;
use std::process::Command;

/// Runs the campaign with `args` (`--images N --seed N`; see its usage). The program is the one for tests,
/// with its assertions and checked arithmetic. Errors: a rule was broken.
pub(crate) fn run(root: &Path, args: &[String]) -> Result<(), String> {
    let cargo = |verb: &str, rest: &[&str], args: &[String]| {
        let mut command = Command::new(crate::cargo());
        command.args([verb, "--quiet", "--package", "qcow2-tests"]).args(rest).args(args);
        let status = command.current_dir(root).status();
        match status.map_err(|e| format!("cannot run cargo: {e}"))? {
            status if status.success() => Ok(()),
            status => Err(format!("damaged images: {status}")),
        }
    };
    cargo("build", &["--bins"], &[])?;
    cargo("run", &["--bin", "damage", "--"], args)
}
