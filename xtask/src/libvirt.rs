//! Runs libvirt's storage driver with our program as its qemu-img.

use std::path::Path;
use std::process::Command;

/// Builds the command and runs the script, whose header lists its requirements. `args`: nothing, or the path
/// of a qemu-system for domain snapshots.
pub(crate) fn run(root: &Path, args: &[String]) -> Result<(), String> {
    let build = Command::new(crate::cargo())
        .args(["build", "--locked", "-p", "qcow2-cli"])
        .current_dir(root)
        .status();
    if !build.is_ok_and(|status| status.success()) {
        return Err("building the command failed".to_owned());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), Into::into);
    let script = root.join("tests/clients/libvirt.sh");
    let status = Command::new("bash").arg(&script).arg(target.join("debug/qcow2")).args(args).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("tests/clients/libvirt.sh: {status}")),
        Err(error) => Err(format!("cannot run bash: {error}")),
    }
}
