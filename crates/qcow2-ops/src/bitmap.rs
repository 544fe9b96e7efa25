//! Persistent bitmaps: create, change, merge, and copy between images.

use crate::error::{Error, ErrorKind, Result};
use qcow2_core::format::text::bytes_of;
use qcow2_core::{ErrorKind as CoreErrorKind, Image};

/// An operation on one bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapAction {
    /// Creates the bitmap, enabled and with all bits clear. `granularity`: guest bytes per bit, a power of
    /// two from 512 to 2^31; `None`: the cluster size, clamped to 4 KiB..=64 KiB.
    Add {
        /// Guest bytes per bit.
        granularity: Option<u64>,
    },
    /// Deletes the bitmap.
    Remove,
    /// Clears all bits.
    Clear,
    /// Starts recording writes.
    Enable,
    /// Stops recording writes.
    Disable,
    /// Sets all bits that are set in the source bitmap.
    Merge {
        /// Name of the source bitmap, in the other image if one is given.
        source: String,
    },
}

/// Applies `action` to bitmap `name` of `image`. `other`: the image with the source bitmap of a merge;
/// `None`: `image` itself. Disk: reads bitmaps; changes are stored when the image is closed.
///
/// Errors: `NotFound`; `InvalidOption` for invalid values and names in use; `Unsupported` if the image cannot
/// have bitmaps; `Metadata` otherwise, for example for an inconsistent bitmap. The engine's error is the
/// source and names the bitmap.
pub fn change_bitmap(image: &Image, name: &str, action: &BitmapAction, other: Option<&Image>) -> Result<()> {
    let name = &*bytes_of(name);
    let done = match action {
        BitmapAction::Add { granularity } => image
            .add_bitmap(name, granularity_bits(granularity.unwrap_or_else(|| default_granularity(image)))?),
        BitmapAction::Remove => image.remove_bitmap(name),
        BitmapAction::Clear => image.clear_bitmap(name),
        BitmapAction::Enable => image.enable_bitmap(name, true),
        BitmapAction::Disable => image.enable_bitmap(name, false),
        BitmapAction::Merge { source } => {
            let bits = other.unwrap_or(image).bitmap_bits(&bytes_of(source));
            bits.and_then(|bits| image.merge_bitmap(name, &bits))
        }
    };
    done.map_err(failed)
}

/// Copies all bitmaps of `from` to `to`, a disk of the same size, with granularity, bits and enabled state.
/// Inconsistent bitmaps are an error before anything is changed; with `skip_broken` they are left out and
/// their names returned. Disk: reads bitmaps; the copies are stored when `to` is closed. Errors: as
/// [`change_bitmap`].
pub fn copy_bitmaps(from: &Image, to: &Image, skip_broken: bool) -> Result<Vec<String>> {
    let bitmaps = from.bitmaps().map_err(failed)?;
    let (broken, usable): (Vec<_>, Vec<_>) = bitmaps.into_iter().partition(|bitmap| bitmap.in_use);
    if let Some(bitmap) = broken.first().filter(|_| !skip_broken) {
        return Err(Error::new(
            ErrorKind::Metadata,
            format!("bitmap '{}' is inconsistent", bitmap.name_text()),
        ));
    }
    let there = to.bitmaps().map_err(failed)?;
    let taken = usable.iter().rev().find(|bitmap| there.iter().any(|other| other.name == bitmap.name));
    if let Some(bitmap) = taken {
        let exists = format!("bitmap already exists: {}", bitmap.name_text());
        return Err(not_created(&bitmap.name_text(), qcow2_core::Error::new(CoreErrorKind::Exists, exists)));
    }
    for bitmap in usable {
        let bits = from.bitmap_bits(&bitmap.name).map_err(failed)?;
        let copied = to.add_bitmap(&bitmap.name, bitmap.granularity_bits).and_then(|()| {
            to.merge_bitmap(&bitmap.name, &bits)?;
            to.enable_bitmap(&bitmap.name, bitmap.auto)
        });
        copied.map_err(|error| not_created(&bitmap.name_text(), error))?;
    }
    Ok(broken.iter().map(|bitmap| bitmap.name_text()).collect())
}

fn not_created(name: &str, error: qcow2_core::Error) -> Error {
    Error::new(kind(&error), format!("Failed to create bitmap {name}")).with_source(error)
}

/// log2 of a granularity. Errors: `InvalidOption`.
fn granularity_bits(granularity: u64) -> Result<u8> {
    let allowed = granularity.is_power_of_two() && (512..=1 << 31).contains(&granularity);
    let message = || format!("granularity is {granularity}, allowed are powers of two from 512 to 2^31");
    allowed
        .then(|| granularity.trailing_zeros() as u8)
        .ok_or_else(|| Error::new(ErrorKind::InvalidOption, message()))
}

fn default_granularity(image: &Image) -> u64 {
    image.geometry().cluster_size().clamp(4 << 10, 64 << 10)
}

fn kind(error: &qcow2_core::Error) -> ErrorKind {
    match error.kind() {
        CoreErrorKind::NotFound => ErrorKind::NotFound,
        CoreErrorKind::InvalidOption | CoreErrorKind::Exists => ErrorKind::InvalidOption,
        CoreErrorKind::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::Metadata,
    }
}

fn failed(error: qcow2_core::Error) -> Error {
    Error::new(kind(&error), "changing a bitmap").with_source(error)
}
