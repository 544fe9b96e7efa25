//! A disk behind a filter.

use qcow2_core::{GuestDisk, forward_guest_disk};
use std::sync::Arc;

/// Wraps a disk: its content and its layers are seen, and what kind of disk it is not, so that nobody works
/// on the image around the filter. Dropping it closes the image.
pub struct FilteredDisk {
    inner: Arc<dyn GuestDisk>,
}

impl FilteredDisk {
    /// Wraps `inner`, which nobody else closes.
    pub fn new(inner: Arc<dyn GuestDisk>) -> Self {
        Self { inner }
    }
}

impl GuestDisk for FilteredDisk {
    forward_guest_disk!(inner:
        size read_at write_at write_parts write_zeroes discard flush extent_at backing cluster_size
        zero_granularity resize
    );
}

impl Drop for FilteredDisk {
    fn drop(&mut self) {
        // Whoever wrote through it has flushed what matters; this leaves the image as tidy as can be.
        if let Some(image) = self.inner.as_image() {
            let _ = image.close();
        }
    }
}
