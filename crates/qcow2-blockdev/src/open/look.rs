//! What opening an image for changes is about to do, told before it is done.

use crate::warning::Warning;
use qcow2_core::bitmap::{check_bitmaps, read_bitmaps};
use qcow2_core::format::Header;
use qcow2_core::format::bitmap::Bitmap;
use qcow2_core::walk::read_header;
use qcow2_core::{ErrorKind, ImageFormat, ResolvedSource, Storage};
use std::sync::Arc;

/// Hears warnings about an image whose file is open and which is not opened itself yet; with them comes that
/// file.
pub type Tell<'a> = &'a dyn Fn(&Warning, &ResolvedSource);

/// What opening the image in `source` for changes is about to put right, the refcounts of one that was not
/// closed cleanly, and which bitmaps its first change loses. Disk: reads the tables of bitmaps.
pub fn warnings_of_change(source: &ResolvedSource) -> Vec<Warning> {
    let mut warnings = Vec::new();
    if source.format != ImageFormat::Qcow2 {
        return warnings;
    }
    // What goes wrong is told by the one who opens the image.
    let Ok(header) = read_header(&*source.storage) else { return warnings };
    warnings.extend(bitmaps_to_lose(&*source.storage, &header));
    if header.is_dirty() && !header.is_corrupt() {
        warnings.push(Warning::NotClosedCleanly);
    }
    warnings
}

/// The warning for an image of which the first change loses the bitmaps, because they are damaged. Disk:
/// reads their tables.
pub fn bitmaps_to_lose(storage: &dyn Storage, header: &Header) -> Option<Warning> {
    let records = |bitmaps: Vec<Bitmap>| bitmaps.iter().any(|bitmap| bitmap.auto && !bitmap.in_use);
    if !read_bitmaps(storage, header).map_or(true, records) {
        return None;
    }
    // Those that are merely too large refuse the change, and a failing device is told when it is used.
    let damage = check_bitmaps(storage, header).err().filter(|error| error.kind() == ErrorKind::Corrupt)?;
    Some(Warning::BitmapsToLose(Arc::new(damage)))
}
