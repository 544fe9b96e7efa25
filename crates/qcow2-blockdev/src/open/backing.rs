//! The backing file of an image that is about to be made: what is asked of it, and that the new image does
//! not replace it.

use super::layers::{OpenedDisk, open};
use super::named::locate_backing;
use super::options::OpenOptions;
use crate::driver::is_known_driver;
use crate::failure::OpenFailure;
use crate::name::{ImageName, Naming};
use qcow2_io::{HeldFile, OpenFiles, path_of};
use qcow2_ops::{CallerError, Chain, NewBacking};

/// The files below a new image, which are not written to until it is made.
pub struct KeptBacking {
    /// The new image, and what it calls the file below it.
    names: (String, String),
    /// `None`: there is none yet, or the name leads to no file.
    _first: Option<HeldFile>,
    /// `None`: it is not to be opened, or cannot be.
    _chain: Option<OpenedDisk>,
}

impl KeptBacking {
    /// Keeps the file that the image `new` is to call `name`, without opening it: none of those among `files`
    /// may write to it.
    pub fn unopened(files: &OpenFiles, new: &str, name: &str) -> Self {
        let named = ImageName::parse(&locate_backing(new, name), &Naming::default());
        let path = named.as_ref().ok().and_then(ImageName::path);
        let called = format!("the backing file '{name}'");
        // Nothing is written yet, so it is kept if it is there.
        let held = path.map(|path| files.hold_path(&path_of(path), &called));
        let names = (new.to_owned(), name.to_owned());
        Self { names, _first: held.and_then(Result::ok).flatten(), _chain: None }
    }

    /// Keeps the files of its chain too.
    pub fn with(self, chain: OpenedDisk) -> Self {
        Self { _chain: Some(chain), ..self }
    }

    /// Keeps the files of its chain too, if it can be opened.
    pub fn with_what_opens(self, naming: &Naming, how: &OpenOptions) -> Self {
        match open_backing(&self.names.0, &self.names.1, naming, how) {
            Ok(chain) => self.with(chain),
            Err(_) => self,
        }
    }
}

/// The file that an overlay is to stand on, for [`rebase`](qcow2_ops::rebase()). Errors it returns are
/// [`OpenFailure`]s.
pub struct BackingFile<'a> {
    /// The path of the overlay: names of files are relative to its directory.
    pub overlay: &'a str,
    /// The name, as the overlay is to record it.
    pub name: &'a str,
    /// How the name is meant.
    pub naming: Naming,
    /// How the file is opened.
    pub how: OpenOptions,
}

impl NewBacking for BackingFile<'_> {
    fn is_format(&self, format: &str) -> bool {
        is_known_driver(format)
    }

    fn open(&self) -> Result<Chain, CallerError> {
        let name = ImageName::parse(&locate_backing(self.overlay, self.name), &self.naming)?;
        Ok(Chain::from(&open(&name, &self.how)?))
    }
}

/// Opens what the image `new` is to call `name`, with its chain. Only the size is asked for, which another
/// program may well be using: locks are ignored, and no password is needed.
pub fn open_backing(
    new: &str,
    name: &str,
    naming: &Naming,
    how: &OpenOptions,
) -> Result<OpenedDisk, OpenFailure> {
    let name = ImageName::parse(&locate_backing(new, name), naming)?.sealed();
    open(&name, &how.clone().with_force_share(true))
}
