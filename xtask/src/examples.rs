//! Runs the example of every library crate.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Crate, example, arguments.
const EXAMPLES: &[(&str, &str, &[&str])] = &[
    ("qcow2-format", "dump_header", &[IMAGE]),
    ("qcow2-core", "own_io", &[]),
    ("qcow2-io", "storage", &[]),
    ("qcow2-codec", "cluster", &[]),
    ("qcow2-crypt", "unlock", &[]),
    ("qcow2-blockdev", "look", &[DESCRIBED]),
    ("qcow2-nbd", "messages", &[]),
    ("qcow2-ops", "check", &[IMAGE]),
    ("qcow2-ops", "convert", &[]),
    ("qcow2-getopt", "options", &["-v", "--out=x", "y"]),
    ("qcow2-report", "info", &[IMAGE]),
    ("qcow2-exerciser", "exercise", &[]),
    ("qcow2-serve", "serve", &[]),
    ("qcow2-terminal", "progress", &[]),
    ("qcow2-vhost-user", "vhost_user_blk", &[]),
    ("qcow2-queue", "event_loop", &[]),
    ("qcow2-testkit", "damage", &[]),
    ("qcow2-image", "cloud_image", &["tests/data/images/zstd-4k.qcow2", MADE]),
    ("qcow2-image", "overlays", &["target", "20"]),
    ("qcow2-image", "snapshot", &[]),
    ("qcow2-image", "incremental", &[]),
    ("qcow2-image", "vmm", &[]),
];

const IMAGE: &str = "tests/data/images/v3-512.qcow2";
/// The same image, by a description.
const DESCRIBED: &str =
    r#"json:{"driver": "qcow2", "file": {"driver": "file", "filename": "tests/data/images/v3-512.qcow2"}}"#;
/// Output file of the examples.
const MADE: &str = "target/example.raw";

/// Runs each example and prints output only on failure. An example that is not listed here is a failure.
pub(crate) fn run(root: &Path) -> Result<(), String> {
    let missing = unlisted(root, EXAMPLES)?;
    if !missing.is_empty() {
        return Err(format!("not listed in xtask/src/examples.rs: {}", missing.join(", ")));
    }
    fs::create_dir_all(root.join("target")).map_err(|e| format!("cannot make target: {e}"))?;
    for (package, example, args) in EXAMPLES {
        let mut command = Command::new(crate::cargo());
        command
            .args(["run", "--quiet", "--locked", "--package", package, "--example", example, "--"])
            .args(*args);
        let output = command.current_dir(root).output().map_err(|e| format!("cannot run {example}: {e}"))?;
        if !output.status.success() || output.stdout.is_empty() {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(format!("example {example} of {package}: {}, {text}", output.status));
        }
    }
    println!("{} examples ran", EXAMPLES.len());
    Ok(())
}

/// Examples on disk that are not in `listed`, and library crates without an example.
fn unlisted(root: &Path, listed: &[(&str, &str, &[&str])]) -> Result<Vec<String>, String> {
    let crates = root.join("crates");
    let entries = fs::read_dir(&crates).map_err(|e| format!("{}: {e}", crates.display()))?;
    let mut missing = Vec::new();
    for entry in entries.flatten() {
        let package = entry.file_name().to_string_lossy().into_owned();
        if package != "qcow2-cli" && !listed.iter().any(|(name, ..)| *name == package) {
            missing.push(format!("{package} (no example)"));
        }
        for file in fs::read_dir(entry.path().join("examples")).into_iter().flatten().flatten() {
            let path = file.path();
            let Some(name) = path.file_stem().map(|s| s.to_string_lossy().into_owned()) else { continue };
            if !listed.iter().any(|(of, example, _)| *of == package && *example == name) {
                missing.push(format!("{package}/{name}"));
            }
        }
    }
    missing.sort();
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unlisted_examples_are_found() {
        let root = crate::tree::root();
        let without: Vec<_> = EXAMPLES.iter().copied().filter(|e| e.0 != "qcow2-io").collect();
        assert_eq!(unlisted(&root, &without).unwrap(), ["qcow2-io (no example)", "qcow2-io/storage"]);
    }
}
