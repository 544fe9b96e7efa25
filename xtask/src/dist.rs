//! Builds the command for distribution: a small program, with its debug information in a file beside it.
//!
//! Cargo's own `split-debuginfo = "packed"` leaves the line and range tables in the program, which then is
//! four times as large. `objcopy` moves them out too, and stores the name of the debug file in the program
//! (`.gnu_debuglink`). Backtraces, `gdb` and `perf` look for it beside the program, in `.debug/` there, and
//! below `/usr/lib/debug`.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Builds `target/dist/bin/qcow2` and `target/dist/bin/qcow2.debug`.
pub(crate) fn run(root: &Path) -> Result<(), String> {
    let built = crate::tour::build(root, "dist")?;
    // A separate folder: cargo would take its own output for up to date after it was stripped.
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

/// Splits the program `built` into both files, in `folder`.
fn split(folder: &Path, built: &str) -> Result<(), String> {
    // The link contains a checksum of the debug file, so that file is made first.
    let link = format!("--add-gnu-debuglink={DEBUG}");
    objcopy(folder, &["--only-keep-debug", "--compress-debug-sections=zlib", built, DEBUG])?;
    objcopy(folder, &["--strip-debug", &link, built, PROGRAM])
}

fn objcopy(folder: &Path, args: &[&str]) -> Result<(), String> {
    let name = "objcopy (of binutils)";
    crate::tour::succeed(Command::new("objcopy").args(args).current_dir(folder), name)
}
