//! The files of the workspace.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Not sources: inputs of fuzz targets, build output, and git's own data (a folder, or a file in a linked
/// worktree).
const SKIPPED: &[&str] =
    &[".git", "target", "fuzz/target", "fuzz/corpus", "fuzz/seeds/names", "fuzz/artifacts", "fuzz/coverage"];
/// Disk images among the fixtures are not text, even if their bytes happen to be UTF-8.
const IMAGES: &[&str] = &["qcow2", "raw", "img"];

/// The workspace root: the folder above this package.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// A file's path relative to the root, with forward slashes, and its content.
pub(crate) struct File {
    pub(crate) path: String,
    pub(crate) text: String,
}

/// Every UTF-8 file under `root`, ordered by path, without build output and `.git`.
pub(crate) fn text_files(root: &Path) -> io::Result<Vec<File>> {
    let mut files = Vec::new();
    collect(root, root, &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<File>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        let kind = entry.file_type()?;
        if SKIPPED.iter().any(|skip| path == root.join(skip)) {
            continue;
        }
        if kind.is_dir() {
            collect(root, &path, files)?;
        } else if kind.is_file() && !IMAGES.iter().any(|ext| path.extension().is_some_and(|e| e == *ext)) {
            let Ok(text) = String::from_utf8(fs::read(&path)?) else { continue };
            let relative = path.strip_prefix(root).unwrap_or(&path);
            let path = relative.to_string_lossy().replace('\\', "/");
            files.push(File { path, text });
        }
    }
    Ok(())
}
