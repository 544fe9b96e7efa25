//! Persistent bitmaps: what was written since somebody looked.

use crate::disk::Disk;
use crate::error::Result;
use qcow2_core::bitmap::Bits;
use qcow2_ops::bitmap::{BitmapAction, change_bitmap};
use std::fmt;
use std::ops::Range;

/// Persistent dirty bitmaps, for incremental backups: an enabled bitmap marks what is written. They are
/// stored when the disk is closed. After a crash they are marked inconsistent and cannot be used; they are
/// never wrong.
impl Disk {
    /// The names of the image's bitmaps. Errors: `Unsupported` where it is no qcow2 image, `Corrupt`, `Io`.
    pub fn bitmaps(&self) -> Result<Vec<String>> {
        let step = "listing bitmaps";
        let bitmaps = self.image(step)?.bitmaps().map_err(|e| self.failed(step, e))?;
        Ok(bitmaps.iter().map(|bitmap| bitmap.name_text()).collect())
    }

    /// A copy of the bitmap `name` as it is now. Errors: `NotFound`; `Corrupt` for a bitmap that was in use
    /// when the image was last closed, too; `NoSpace` above 512 MiB of marks.
    pub fn bitmap(&self, name: &str) -> Result<Bitmap> {
        let step = || format!("reading bitmap '{}'", name.escape_debug());
        let bits = self.image(&step())?.bitmap_bits(name.as_bytes());
        bits.map(Bitmap).map_err(|e| self.failed(step(), e))
    }

    /// Adds a bitmap that marks what is written from now on. Errors: `Exists`; `Unsupported` in a version 2
    /// image; `InvalidOption` for a name that is empty or too long; `ReadOnly`.
    pub fn add_bitmap(&self, name: &str) -> Result<()> {
        self.change_bitmap(name, &BitmapAction::Add { granularity: None })
    }

    /// Takes all marks out of a bitmap. Errors: as [`bitmap`](Self::bitmap), `ReadOnly`.
    pub fn clear_bitmap(&self, name: &str) -> Result<()> {
        self.change_bitmap(name, &BitmapAction::Clear)
    }

    /// Removes a bitmap. Errors: `NotFound`, `ReadOnly`.
    pub fn remove_bitmap(&self, name: &str) -> Result<()> {
        self.change_bitmap(name, &BitmapAction::Remove)
    }

    /// Any other change of a bitmap: adding it with another granularity, disabling, enabling, merging another
    /// bitmap of this image. Errors: as for the methods above.
    pub fn change_bitmap(&self, name: &str, action: &BitmapAction) -> Result<()> {
        let step = || format!("changing bitmap '{}'", name.escape_debug());
        self.changed(change_bitmap(self.image(&step())?, name, action, None), step)
    }
}

/// A copy of a bitmap's marks.
#[derive(Clone)]
pub struct Bitmap(Bits);

impl Bitmap {
    /// Bytes that a mark stands for: a power of two.
    pub fn granularity(&self) -> u64 {
        self.0.granularity()
    }

    /// Whether the granule of byte `offset` is marked.
    pub fn is_marked(&self, offset: u64) -> bool {
        self.0.is_marked(offset)
    }

    /// The marked parts of the disk, in order.
    pub fn marked_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.marked_runs().map(|(start, len)| start..start + len)
    }
}

impl fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bitmap").field("granularity", &self.granularity()).finish_non_exhaustive()
    }
}
