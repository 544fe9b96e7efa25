//! Memory that the bits of an image's bitmaps share.

use crate::sync::atomic::{AtomicU64, Ordering};
use ::alloc::sync::Arc;

/// Bytes of memory that the bits of all bitmaps of one image may take. Origin: ours; bits of one bitmap are
/// 512 MiB at most ([`MAX_BITMAP_DATA_SIZE`](qcow2_format::limit::MAX_BITMAP_DATA_SIZE)), and there is as
/// much again, half of it, for others.
pub(crate) const MAX_BITS_MEMORY: u64 = qcow2_format::limit::MAX_BITMAP_DATA_SIZE / 2 * 3;

/// What is left of the memory, for everyone who has a clone.
#[derive(Clone, Debug)]
pub(super) struct Room {
    pub(super) left: Arc<AtomicU64>,
}

impl Room {
    /// Room for so many bytes.
    pub(super) fn new(bytes: u64) -> Self {
        Self { left: Arc::new(AtomicU64::new(bytes)) }
    }

    /// Takes `bytes`, where so many are left.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let less = |left: u64| left.checked_sub(bytes);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    /// Gives back what was taken.
    pub(super) fn give(&self, bytes: u64) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Default for Room {
    fn default() -> Self {
        Self::new(MAX_BITS_MEMORY)
    }
}
