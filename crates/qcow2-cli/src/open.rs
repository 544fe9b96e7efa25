//! Names and disks as the verbs have them: with warnings on standard error.

use crate::args::ImageArgs;
use crate::failure::Failure;
use crate::findings::tell_of_change;
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{ImageName, OpenOptions, OpenedDisk, open_telling};
use qcow2_core::{GuestDisk, ImageFormat};

/// Understands the name `typed`, and says on standard error what is deprecated in it.
pub(crate) fn read_name(session: &Session, typed: &str, args: &ImageArgs) -> Result<ImageName, Failure> {
    let name = ImageName::parse(typed, &args.naming())?;
    name.warnings.iter().for_each(|warning| session.warn_lines(&persona::warning(warning)));
    Ok(name)
}

/// Opens the image that `name` leads to for changes; says so on standard error where it was taken for raw by
/// its looks.
pub(crate) fn open_to_change(
    session: &Session,
    name: &ImageName,
    how: &OpenOptions,
) -> Result<OpenedDisk, Failure> {
    let opened = open_target(session, name, how)?;
    complain_of_guess(session, name, &opened.format);
    Ok(opened)
}

/// The same without a word of how it was taken.
pub(crate) fn open_target(
    session: &Session,
    name: &ImageName,
    how: &OpenOptions,
) -> Result<OpenedDisk, Failure> {
    Ok(open_telling(name, &how.clone().writable(), &|warning, source| {
        tell_of_change(session, warning, source);
    })?)
}

/// Says on standard error where a disk that is to be written was taken for raw by its looks.
pub(crate) fn complain_of_guess(session: &Session, name: &ImageName, format: &ImageFormat) {
    if let Some(warning) = name.guess_warning(format) {
        persona::warning(&warning).iter().for_each(|line| session.complain(line));
    }
}

/// Says on standard error which layers of a disk that was opened for reading lack their end. Not under
/// qemu-img's name, which says nothing.
pub(crate) fn warn_of_missing_end(session: &Session, opened: &OpenedDisk) {
    if !session.is_drop_in() {
        opened.missing_ends().iter().for_each(|warning| session.warn_lines(&persona::warning(warning)));
    }
}

/// Makes all durable, as far as the cache mode wants it, and leaves a changed image clean. Errors: the
/// system's text.
pub(crate) fn close(disk: &dyn GuestDisk) -> Result<(), String> {
    let done = disk.flush().and_then(|()| disk.as_image().map_or(Ok(()), |image| image.close()));
    done.map_err(|error| persona::cause(&error))
}
