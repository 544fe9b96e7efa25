//! The files of images that are not whole yet.

use super::file::NewFile;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The files that are written and would be taken for whole images. Whoever ends the work early, a signal
/// too, calls [`discard`](Self::discard). A clone is the same list.
#[derive(Clone, Debug, Default)]
pub struct Unfinished(Arc<Mutex<Vec<NewFile>>>);

impl Unfinished {
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
