//! Which file is the top of a disk, kept in a small file, for the next start.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A name is no longer than this on any system.
const MAX: u64 = 64 << 10;

/// A file with one line: format and name of the top.
#[derive(Clone, Debug)]
pub struct Record {
    path: PathBuf,
}

impl Record {
    /// The record in the file at `path`, which need not exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The recorded format and name; `None` if nothing is recorded yet. Errors: the system's; `InvalidData`
    /// if it is no such line.
    pub fn read(&self) -> io::Result<Option<(String, String)>> {
        let bytes = match fs::metadata(&self.path) {
            Ok(data) if data.len() > MAX => return Err(io::ErrorKind::InvalidData.into()),
            Ok(_) => fs::read(&self.path)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let text = String::from_utf8(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        match text.strip_suffix('\n').and_then(|line| line.split_once(' ')) {
            Some((format, name)) if !format.is_empty() && !name.is_empty() && !name.contains('\n') => {
                Ok(Some((format.to_owned(), name.to_owned())))
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Records that the top is `name`, of `format`: a new file takes the place of the old one, and both steps
    /// are durable. After a crash the record has the old name or the new one.
    pub fn write(&self, format: &str, name: &str) -> io::Result<()> {
        if name.contains('\n') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a name with a line break"));
        }
        let mut beside = self.path.clone().into_os_string();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        let mut file = File::create(&beside)?;
        file.write_all(format!("{format} {name}\n").as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, &self.path)?;
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_one_name() {
        let folder = tempfile::tempdir().unwrap();
        let record = Record::new(folder.path().join("top"));
        assert_eq!(record.read().unwrap(), None);
        record.write("qcow2", "a b.qcow2").unwrap();
        assert_eq!(record.read().unwrap(), Some(("qcow2".to_owned(), "a b.qcow2".to_owned())));
        record.write("raw", "c").unwrap();
        assert_eq!(record.read().unwrap(), Some(("raw".to_owned(), "c".to_owned())));
        assert!(record.write("raw", "a\nb").is_err());
        for bad in [&b""[..], b"\n", b"a", b"a\n", b" a\n", b"a \n", b"a b\nc d\n", b"\xff b\n"] {
            fs::write(folder.path().join("top"), bad).unwrap();
            assert_eq!(record.read().unwrap_err().kind(), io::ErrorKind::InvalidData, "{bad:?}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
