//! The files of images that are not whole yet.

use super::file::NewFile;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The files that are written and would be taken for whole images. Whoever ends the work early, a signal
/// too, calls [`discard`](Self::discard). A clone is the same list.
#[derive(Clone, Debug, Default)]
pub struct Unfinished(Arc<Mutex<Vec<NewFile>>>);

impl Unfinished {
    /// [`NewFile::prepare`], with a file that it made on the list from the moment it is there: whoever ends
    /// the work just then waits for the list, and takes the file away.
    pub(super) fn prepare(&self, path: &Path) -> io::Result<NewFile> {
        let mut files = self.files();
        let file = NewFile::prepare(path)?;
        if file.is_new() {
            files.push(file.clone());
        }
        Ok(file)
    }

    /// Adds a file, until it is finished or discarded.
    pub fn add(&self, file: NewFile) {
        self.files().push(file);
    }

    /// The files are whole: they stay.
    pub fn finish(&self) {
        self.files().clear();
    }

    /// Takes away what is not whole.
    pub fn discard(&self) {
        self.files().drain(..).for_each(NewFile::discard);
    }

    fn files(&self) -> MutexGuard<'_, Vec<NewFile>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
