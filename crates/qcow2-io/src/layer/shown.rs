//! A disk with another one above it that every request passes.

use qcow2_core::{DiskExtent, GuestDisk, GuestRange, Result, forward_guest_disk};
use std::sync::Arc;

/// Wraps a disk whose bytes are those of an image's disk, at the same offsets: it reads and writes as the one
/// that it wraps does, and has the extents, the layers and the clusters of the image.
pub struct ShownDisk {
    disk: Arc<dyn GuestDisk>,
    image: Arc<dyn GuestDisk>,
}

impl ShownDisk {
    /// Wraps `disk`, whose bytes are those of `image`.
    pub fn new(disk: Arc<dyn GuestDisk>, image: Arc<dyn GuestDisk>) -> Self {
        Self { disk, image }
    }
}

impl GuestDisk for ShownDisk {
    forward_guest_disk!(disk:
        size read_at write_at write_parts write_zeroes discard flush as_any resize
    );
    forward_guest_disk!(image: backing cluster_size zero_granularity);

    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        // What stands between them may refuse to answer.
        let len = self.disk.extent_at(range)?.len;
        let inside = self.image.size().saturating_sub(range.start().value()).min(len);
        match GuestRange::new(range.start(), inside).filter(|_| inside > 0) {
            Some(range) => self.image.extent_at(range),
            None => self.disk.extent_at(range),
        }
    }

    fn filtered(&self) -> Option<&Arc<dyn GuestDisk>> {
        Some(&self.image)
    }
}
