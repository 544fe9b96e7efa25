//! The memory limit that the bitmaps of an image share.

use crate::sync::atomic::{AtomicU64, Ordering};
use ::alloc::sync::Arc;

/// Default memory limit for the bits of all bitmaps of one image, in bytes. Origin: ours; one bitmap has at
/// most 512 MiB of bits ([`MAX_BITMAP_DATA_SIZE`](qcow2_format::limit::MAX_BITMAP_DATA_SIZE)), and half as
/// much is left for others.
pub(crate) const MAX_BITS_MEMORY: u64 = qcow2_format::limit::MAX_BITMAP_DATA_SIZE / 2 * 3;

/// The number of bytes still available. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Room {
    pub(super) left: Arc<AtomicU64>,
}

impl Room {
    /// A limit of `bytes`.
    pub(super) fn new(bytes: u64) -> Self {
        Self { left: Arc::new(AtomicU64::new(bytes)) }
    }

    /// Takes `bytes`. Returns false if not that many are left.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let less = |left: u64| left.checked_sub(bytes);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    /// Returns `bytes` that were taken.
    pub(super) fn give(&self, bytes: u64) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Default for Room {
    fn default() -> Self {
        Self::new(MAX_BITS_MEMORY)
    }
}
