//! Regenerates the committed fixtures.

use std::path::Path;
use std::process::Command;

/// Runs the script that makes them; needs QEMU's tools.
pub(crate) fn make(root: &Path) -> Result<(), String> {
    let script = root.join("tests/data/make.sh");
    let status = Command::new("bash").arg(&script).status().map_err(|e| format!("cannot run bash: {e}"))?;
    if !status.success() {
        return Err(format!("tests/data/make.sh: {status}; it needs qemu-img and qemu-io"));
    }
    println!("made tests/data anew; look at `git status` and commit what changed");
    Ok(())
}
