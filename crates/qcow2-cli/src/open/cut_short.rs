//! Images whose file ends before what is in it does.

use super::OpenedDisk;
use crate::session::Session;
use qcow2_core::walk::{Walk, read_header};
use qcow2_core::{Image, Result};

/// Says on standard error which layers of a disk that was opened for reading lack their end: what is missing
/// reads as zeroes, and a copy of it looks like a disk. Not under qemu-img's name, which says nothing.
pub(crate) fn warn_of_missing_end(session: &Session, opened: &OpenedDisk) {
    if session.is_drop_in() {
        return;
    }
    let mut layer = Some(&opened.disk);
    for files in &opened.files {
        let Some(disk) = layer else { return };
        // What cannot be read now is told when it is needed.
        if let Some((len, end)) = disk.as_image().and_then(|image| missing_end(image).ok()?) {
            session.warn(&format!(
                "'{}' ends at byte {len}, but clusters in use reach up to {end}: it may have been cut short. What is missing reads as zeroes",
                files.image
            ));
        }
        layer = disk.backing();
    }
}

/// The length of an image's file and the end of what should be in it, where at least one cluster is missing.
fn missing_end(image: &Image) -> Result<Option<(u64, u64)>> {
    let storage = &**image.storage();
    let header = read_header(storage)?;
    let walk = Walk::new(storage, &header)?;
    let (len, end) = (walk.file_len(), walk.used_end()?);
    Ok((end.saturating_sub(len) >= walk.geometry().cluster_size()).then_some((len, end)))
}
