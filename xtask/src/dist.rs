//! The command as it is handed out: a small program, and its debug information in a file beside it.
//!
//! Cargo's own `split-debuginfo = "packed"` leaves the tables of lines and ranges in the program, which stays
//! four times as large. `objcopy` takes them too, and leaves the name of the file they are in
//! (`.gnu_debuglink`). Backtraces, `gdb` and `perf` look for it beside the program, in `.debug/` there, and
//! below `/usr/lib/debug`.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Builds `target/dist/bin/qcow2` and `target/dist/bin/qcow2.debug`.
pub(crate) fn run(root: &Path) -> Result<(), String> {
    let built = crate::tour::build(root, "dist")?;
    // A folder apart: cargo would take its own file for whole after the debug information has gone.
    let folder = built.with_file_name("bin");
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    split(&folder, "../qcow2")?;
    for name in [PROGRAM, DEBUG] {
        let path = folder.join(name);
        let len = fs::metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?.len();
        println!("{len:>12}  {}", path.display());
    }
    Ok(())
}

const PROGRAM: &str = "qcow2";
const DEBUG: &str = "qcow2.debug";

/// Makes both of the program `built`, in `folder`.
fn split(folder: &Path, built: &str) -> Result<(), String> {
    // The link has a checksum of the debug file, which is made first for that.
    let link = format!("--add-gnu-debuglink={DEBUG}");
    objcopy(folder, &["--only-keep-debug", "--compress-debug-sections=zlib", built, DEBUG])?;
    objcopy(folder, &["--strip-debug", &link, built, PROGRAM])
}

fn objcopy(folder: &Path, args: &[&str]) -> Result<(), String> {
    let name = "objcopy (of binutils)";
    crate::tour::succeed(Command::new("objcopy").args(args).current_dir(folder), name)
}
