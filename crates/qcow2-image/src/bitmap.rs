//! Persistent bitmaps: record which parts of the disk are written.

use crate::disk::Disk;
use crate::error::Result;
use qcow2_core::bitmap::Bits;
use qcow2_core::format::text::bytes_of;
use qcow2_ops::bitmap::{BitmapAction, change_bitmap};
use std::fmt;
use std::ops::Range;

/// Persistent dirty bitmaps, for incremental backups: an enabled bitmap marks every write. Bitmaps are stored
/// when the disk is closed. After a crash they are marked inconsistent and cannot be used, so they never miss
/// a write.
impl Disk {
    /// The names of the image's bitmaps. Errors: `Unsupported` for a disk that is not qcow2, `Corrupt`, `Io`.
    pub fn bitmaps(&self) -> Result<Vec<String>> {
        let step = "listing bitmaps";
        let bitmaps = self.image(step)?.bitmaps().map_err(|e| self.failed(step, e))?;
        Ok(bitmaps.iter().map(|bitmap| bitmap.name_text()).collect())
    }

    /// A copy of the current bits of bitmap `name`. Errors: `NotFound`; `Corrupt`, also for an inconsistent
    /// bitmap; `NoSpace` above 512 MiB of bits.
    pub fn bitmap(&self, name: &str) -> Result<Bitmap> {
        let step = || format!("reading bitmap '{}'", name.escape_debug());
        let bits = self.image(&step())?.bitmap_bits(&bytes_of(name));
        bits.map(Bitmap).map_err(|e| self.failed(step(), e))
    }

    /// Adds a bitmap that records writes from now on. Errors: `Exists`; `Unsupported` in a version 2 image;
    /// `InvalidOption` for a name that is empty or too long; `ReadOnly`.
    pub fn add_bitmap(&self, name: &str) -> Result<()> {
        self.change_bitmap(name, &BitmapAction::Add { granularity: None })
    }

    /// Clears all bits. Errors: as [`bitmap`](Self::bitmap), `ReadOnly`.
    pub fn clear_bitmap(&self, name: &str) -> Result<()> {
        self.change_bitmap(name, &BitmapAction::Clear)
    }

    /// Removes a bitmap. Errors: `NotFound`, `ReadOnly`.
    pub fn remove_bitmap(&self, name: &str) -> Result<()> {
        self.change_bitmap(name, &BitmapAction::Remove)
    }

    /// Applies any other change: add with another granularity, enable, disable, or merge another bitmap of
    /// this image. Errors: as for the methods above.
    pub fn change_bitmap(&self, name: &str, action: &BitmapAction) -> Result<()> {
        let step = || format!("changing bitmap '{}'", name.escape_debug());
        self.changed(change_bitmap(self.image(&step())?, name, action, None), step)
    }
}

/// A copy of a bitmap's bits.
#[derive(Clone)]
pub struct Bitmap(Bits);

impl Bitmap {
    /// Guest bytes per bit: a power of two.
    pub fn granularity(&self) -> u64 {
        self.0.granularity()
    }

    /// True if the granule that contains byte `offset` is marked.
    pub fn is_marked(&self, offset: u64) -> bool {
        self.0.is_marked(offset)
    }

    /// The marked byte ranges of the disk, in ascending order.
    pub fn marked_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.marked_runs().map(|(start, len)| start..start + len)
    }
}

impl fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bitmap").field("granularity", &self.granularity()).finish_non_exhaustive()
    }
}
