//! A place for files that nobody is to see.

use std::io;
use std::path::PathBuf;

/// A folder of our own among the system's temporary ones. It goes, with what is in it, when this is dropped.
#[derive(Debug)]
pub struct TemporaryFolder {
    folder: tempfile::TempDir,
}

impl TemporaryFolder {
    /// Makes the folder, in `TMPDIR` or where the system has temporary files. Errors: the system's.
    pub fn new() -> io::Result<Self> {
        Ok(Self { folder: tempfile::Builder::new().prefix("qcow2-").tempdir()? })
    }

    /// Path of the file called `name` in it, which need not exist.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}
