//! A file under construction: dropping it deletes it, unless it is kept.

use crate::error::{Error, ErrorKind, Result};
use qcow2_core::{ImageFormat, ResolvedSource, SourceId, Storage};
use qcow2_io::{Create, Locking, OpenErrorKind, OpenFile};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A new or emptied file, locked against all other writers.
pub(crate) struct NewFile {
    path: PathBuf,
    source: ResolvedSource,
    is_new: bool,
    kept: bool,
}

impl NewFile {
    /// Creates a regular file at `path`, or empties an existing one if `overwrite` is set. `in_use`: files
    /// that must not be overwritten. Locks are not enough for that: raw disks are not locked, and some
    /// systems have no locks.
    pub(crate) fn open(path: &Path, overwrite: bool, in_use: &[Option<SourceId>]) -> Result<Self> {
        let failed = |cause| Error::from_cause(path, "creating the file", cause);
        let open = |create| {
            let mut how = OpenFile::writable().with_create(create).with_locking(Locking::NoOtherWriters);
            how.allow_devices = false;
            how.open_file(path)
        };
        let (file, is_new) = match open(Create::New) {
            Err(error) if overwrite && error.kind() == OpenErrorKind::Exists => {
                (open(Create::IfMissing), false)
            }
            made => (made, true),
        };
        let file = file.map_err(failed)?;
        let id = file.id();
        if id.is_some() && in_use.contains(&id) {
            return Err(Error::new(
                ErrorKind::InUse,
                path,
                "the new image would overwrite a file that it needs",
            ));
        }
        if is_new {
            // QEMU does the same. Only XFS supports it, and it is only a hint.
            let _ = file.set_extent_size_hint(EXTENT_SIZE);
        } else {
            file.set_len(0).map_err(|e| Error::from_cause(path, "emptying the file", e))?;
        }
        let source = ResolvedSource::new(Arc::new(file), ImageFormat::Raw, path.display().to_string());
        Ok(Self { path: path.to_owned(), source: source.with_id(id), is_new, kept: false })
    }

    pub(crate) fn source(&self) -> &ResolvedSource {
        &self.source
    }

    /// Keeps the file.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // Errors are ignored: the one that caused the drop is reported.
        match (self.kept, self.is_new) {
            (true, _) => {}
            (false, true) => drop(fs::remove_file(&self.path)),
            (false, false) => drop(self.source.storage.set_len(0)),
        }
    }
}

/// Hint for the file system: allocate the file in units of this many bytes.
const EXTENT_SIZE: u32 = 1 << 20;
