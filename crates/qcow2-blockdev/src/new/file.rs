//! A file that is being made: if it does not become whole, it does not stay.

use std::fs::{self, Metadata, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// A file that was opened to be written anew.
#[derive(Clone, Debug)]
pub struct NewFile {
    path: PathBuf,
    /// Whether it was not there before.
    created: bool,
    /// Which file it was, so that another that took its name is left alone.
    identity: Option<Identity>,
}

type Identity = (u64, u64);

impl NewFile {
    /// Makes sure that `path` can be written and leads to something, leaving the content of an existing file
    /// as it is.
    pub fn prepare(path: &Path) -> io::Result<Self> {
        let made = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let (file, created) = match made {
            Ok(file) => (file, true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                (OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?, false)
            }
            Err(error) => return Err(error),
        };
        let identity = file.metadata().ok().as_ref().and_then(identity);
        Ok(Self { path: path.to_owned(), created, identity })
    }

    /// Whether it was not there before.
    pub(super) fn is_new(&self) -> bool {
        self.created
    }

    /// Takes away what was written: a new file goes; one that was there before is emptied, so that a part of
    /// an image is not taken for a whole one.
    pub fn discard(self) {
        if !self.is_still_there() {
            return;
        }
        if self.created {
            let _ = fs::remove_file(&self.path);
        } else if let Ok(file) = OpenOptions::new().write(true).open(&self.path)
            && file.metadata().is_ok_and(|metadata| metadata.is_file())
        {
            let _ = file.set_len(0);
        }
    }

    fn is_still_there(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|metadata| identity(&metadata) == self.identity)
    }
}

#[cfg(unix)]
fn identity(metadata: &Metadata) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
fn identity(_metadata: &Metadata) -> Option<Identity> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let file = NewFile::prepare(&path).unwrap();
        fs::write(&path, "part").unwrap();
        file.discard();
        assert!(!path.exists());
    }

    #[test]
    fn an_old_file_is_emptied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, "old").unwrap();
        let file = NewFile::prepare(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        file.discard();
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[cfg(unix)]
    #[test]
    fn another_file_of_that_name_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let file = NewFile::prepare(&path).unwrap();
        fs::rename(&path, dir.path().join("y")).unwrap();
        fs::write(&path, "other").unwrap();
        file.discard();
        assert_eq!(fs::read(&path).unwrap(), b"other");
    }
}
