//! A small cache of expanded clusters, so that small reads of one compressed cluster expand it once.
//!
//! Invariant: the cache is cleared before the host clusters of a stream can be reused.

use crate::sync::{Mutex, Rank, lock};
use ::alloc::sync::Arc;
use ::alloc::vec::Vec;
use qcow2_format::l2::CompressedCluster;

const SHARDS: usize = 8;
const PER_SHARD: usize = 4;

type Kept = (CompressedCluster, Arc<Vec<u8>>);

/// At most 32 expanded clusters, by host offset and length of the stream.
#[derive(Debug)]
pub(crate) struct ExpandedClusters {
    shards: [Mutex<Vec<Kept>>; SHARDS],
}

impl Default for ExpandedClusters {
    fn default() -> Self {
        Self { shards: core::array::from_fn(|_| Mutex::new(Rank::Expanded, Vec::new())) }
    }
}

impl ExpandedClusters {
    fn shard(&self, stream: CompressedCluster) -> &Mutex<Vec<Kept>> {
        let hash = stream.host.value().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61;
        &self.shards[hash as usize % SHARDS]
    }

    /// The expanded bytes of `stream`, if cached.
    pub(crate) fn find(&self, stream: CompressedCluster) -> Option<Arc<Vec<u8>>> {
        let kept = lock(self.shard(stream));
        kept.iter().find(|(s, _)| *s == stream).map(|(_, bytes)| Arc::clone(bytes))
    }

    /// Caches `bytes`, the expanded `stream`.
    pub(crate) fn keep(&self, stream: CompressedCluster, bytes: Vec<u8>) {
        let mut kept = lock(self.shard(stream));
        kept.retain(|(s, _)| *s != stream);
        if kept.len() == PER_SHARD {
            kept.remove(0);
        }
        kept.push((stream, Arc::new(bytes)));
        debug_assert!(kept.len() <= PER_SHARD, "the cache of expanded clusters exceeds its limit");
    }

    /// Empties the cache. Called before host clusters are freed.
    pub(crate) fn clear(&self) {
        for shard in &self.shards {
            lock(shard).clear();
        }
    }
}

/// A pool of byte buffers.
#[derive(Debug)]
pub(crate) struct Scratch {
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { buffers: Mutex::new(Rank::Scratch, Vec::new()) }
    }
}

impl Scratch {
    /// A buffer of at least `len` bytes, with arbitrary content.
    pub(crate) fn take(&self, len: usize) -> Vec<u8> {
        let mut buffer = lock(&self.buffers).pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        buffer
    }

    /// A buffer of exactly `len` bytes, with arbitrary content.
    pub(crate) fn take_exact(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.take(len);
        buffer.truncate(len);
        buffer
    }

    /// Returns a buffer to the pool.
    pub(crate) fn give(&self, buffer: Vec<u8>) {
        let mut buffers = lock(&self.buffers);
        if buffers.len() < 64 {
            buffers.push(buffer);
        }
    }
}
