//! The copy of the tree that faults are applied to.

use super::list::Fault;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A copy of the current tree, and a folder for its build output.
pub(super) struct Copy {
    folder: PathBuf,
}

/// A fault in the copy; dropping this restores the file.
pub(super) struct Back {
    path: PathBuf,
    text: String,
}

impl Drop for Back {
    fn drop(&mut self) {
        // Restoring gives the file a newer time than the fault, so cargo rebuilds. If it fails, the next run
        // copies the file again.
        let _ = fs::write(&self.path, &self.text);
    }
}

impl Copy {
    /// Updates the copy: only files that differ are copied, so that little is rebuilt.
    pub(super) fn new(root: &Path) -> Result<Self, String> {
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let copy = Self { folder: target.join("mutants") };
        let files = files(root)?;
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |e: io::Error| format!("{path}: {e}")
        };
        for file in &files {
            let (from, to) = (root.join(file), copy.tree().join(file));
            let bytes = fs::read(&from).map_err(failed(&from))?;
            if fs::read(&to).is_ok_and(|there| there == bytes) {
                continue;
            }
            if let Some(folder) = to.parent() {
                fs::create_dir_all(folder).map_err(failed(folder))?;
            }
            // Copies the permissions too (some files are scripts). The modification time is now.
            fs::copy(&from, &to).map_err(failed(&from))?;
        }
        remove_others(&copy.tree(), Path::new(""), &files).map_err(failed(&copy.tree()))?;
        Ok(copy)
    }

    /// Root of the copy.
    pub(super) fn tree(&self) -> PathBuf {
        self.folder.join("tree")
    }

    /// Target folder of its builds.
    pub(super) fn build(&self) -> PathBuf {
        self.folder.join("build")
    }

    /// Log file for cargo's output about the fault `name`.
    pub(super) fn log(&self, name: &str) -> Result<PathBuf, String> {
        let logs = self.folder.join("logs");
        fs::create_dir_all(&logs).map_err(|e| format!("{}: {e}", logs.display()))?;
        Ok(logs.join(format!("{name}.txt")))
    }

    /// Applies `fault`. Errors: why it cannot be applied.
    pub(super) fn put_in(&self, fault: &Fault) -> Result<Back, String> {
        let path = self.tree().join(&fault.file);
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let wrong = fault.apply(&text)?;
        let back = Back { path, text };
        fs::write(&back.path, wrong).map_err(|e| format!("{}: {e}", back.path.display()))?;
        Ok(back)
    }
}

/// Files that git tracks, and new ones that are not ignored.
fn files(root: &Path) -> Result<BTreeSet<PathBuf>, String> {
    let args = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let output = Command::new("git").args(args).current_dir(root).output();
    let output = output.map_err(|e| format!("cannot run git: {e}"))?;
    if !output.status.success() {
        return Err(format!("git ls-files: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let names = String::from_utf8_lossy(&output.stdout);
    let paths = names.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from);
    Ok(paths.filter(|path| root.join(path).is_file()).collect())
}

/// Removes files of the copy that no longer exist in the tree.
fn remove_others(tree: &Path, below: &Path, files: &BTreeSet<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(tree.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            remove_others(tree, &path, files)?;
        } else if !files.contains(&path) {
            fs::remove_file(tree.join(&path))?;
        }
    }
    Ok(())
}
