//! The backing file of an image that is about to be made: what is asked of it, and that the new image does
//! not replace it.

use crate::args::{ImageArgs, Objects};
use crate::crypt::Keys;
use crate::failure::Failure;
use crate::imagename::ImageName;
use crate::open::{OpenAs, OpenedDisk, open_files, open_image};
use qcow2_core::Reference;
use qcow2_io::{FileResolver, HeldFile, Policy};
use std::path::Path;

/// The files below a new image, which are not written to until it is made.
pub(crate) struct KeptBacking {
    /// `None`: there is none yet, or the name leads to no file.
    _first: Option<HeldFile>,
    /// `None`: it is not to be opened, or cannot be.
    _chain: Option<OpenedDisk>,
}

impl KeptBacking {
    /// Keeps the file that the image `new` is to call `name`, without opening it.
    pub(crate) fn unopened(new: &str, name: &str, format: Option<&str>) -> Self {
        let node = ImageName::parse(&located(new, name, format), &ImageArgs::default());
        let path = node.as_ref().ok().and_then(ImageName::path);
        let called = format!("the backing file '{name}'");
        // Nothing is written yet, so it is kept if it is there.
        let held = path.map(|path| open_files().hold_path(Path::new(path), &called));
        Self { _first: held.and_then(Result::ok).flatten(), _chain: None }
    }

    /// Keeps the files of its chain too.
    pub(crate) fn with(self, chain: OpenedDisk) -> Self {
        Self { _chain: Some(chain), ..self }
    }
}

/// Opens what the image `new` is to call `name`, with its chain.
pub(crate) fn open_backing(
    new: &str,
    name: &str,
    format: Option<&str>,
    objects: &Objects,
) -> Result<OpenedDisk, Failure> {
    // Only the size is asked for, which another program may well be using.
    let args = ImageArgs {
        format: format.map(str::to_owned),
        force_share: true,
        objects: objects.clone(),
        ..ImageArgs::default()
    };
    let name = ImageName { keys: Keys::sealed(), ..ImageName::parse(&located(new, name, format), &args)? };
    open_image(&name, &args, OpenAs::READ)
}

/// Names are relative to the new image, as they will be for whoever opens it.
fn located(new: &str, name: &str, format: Option<&str>) -> String {
    match name.split_once(':') {
        Some((protocol, _)) if !protocol.contains('/') => name.to_owned(),
        _ => FileResolver::new(new, Policy::Allow)
            .locate(Reference::Backing { name, format })
            .map_or_else(|_| name.to_owned(), |path| path.to_string_lossy().into_owned()),
    }
}
