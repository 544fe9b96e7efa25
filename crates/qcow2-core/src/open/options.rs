//! Options for opening an image.

use crate::bitmap::MAX_BITS_MEMORY;
use crate::damage::DamageObserver;
use crate::meta::overlap::OverlapChecks;
use crate::port::cipher::Keyring;
use crate::port::codec::ClusterCodec;
#[cfg(feature = "unstable-mutants")]
use crate::rules::OrderingRule;
use ::alloc::sync::Arc;

/// Default size limit of the L2 table cache, in bytes. Origin: QEMU on Linux.
pub const DEFAULT_L2_CACHE: u64 = 32 << 20;
/// Default size limit of the index of merged layers, in bytes. Origin: ours; 500,000 runs, which is what a
/// chain of 1 TiB in runs of 2 MiB needs.
pub const DEFAULT_INDEX_SIZE: u64 = 4 << 20;
/// Default size of the refcount block cache, in bytes.
pub const DEFAULT_REFCOUNT_CACHE: u64 = 4 << 20;

/// The codecs for the compression types that an image can have.
#[derive(Clone, Default)]
#[non_exhaustive]
pub struct Codecs {
    /// Raw deflate, compression type 0.
    pub deflate: Option<Arc<dyn ClusterCodec>>,
    /// Zstandard, compression type 1.
    pub zstd: Option<Arc<dyn ClusterCodec>>,
}

impl Codecs {
    /// Both methods.
    pub fn new(deflate: Arc<dyn ClusterCodec>, zstd: Arc<dyn ClusterCodec>) -> Self {
        Self { deflate: Some(deflate), zstd: Some(zstd) }
    }
}

/// Which files are opened besides the image itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layers {
    /// The data file and the whole backing chain; the source's resolver opens or denies each.
    Follow,
    /// The data file, but no backing file: reading an unallocated cluster fails with `Resolve`.
    NoBacking,
    /// Nothing, for looking at metadata. Data in an external data file cannot be read.
    TopOnly,
}

/// How an image is opened.
#[derive(Clone)]
#[non_exhaustive]
pub struct OpenOptions {
    /// True to open for writing.
    pub writable: bool,
    /// Which other files are opened.
    pub layers: Layers,
    /// True to put a [`LiveDisk`](crate::LiveDisk) below each overlay, so that layers can be exchanged while
    /// the disk is used.
    pub exchangeable: bool,
    /// The available codecs. Without the image's one, its compressed clusters cannot be read.
    pub codecs: Codecs,
    /// Size of the L2 table cache in bytes; `None`: enough for all L2 tables, at most [`DEFAULT_L2_CACHE`].
    pub l2_cache_size: Option<u64>,
    /// Size limit of the index of merged layers in bytes, 0 for none. An image that is opened for reading, or
    /// closed, answers by it for itself and for all such layers below it, with 8 bytes for a run of clusters
    /// that are stored alike; what does not fit is looked up layer by layer. It takes memory as pieces of
    /// the disk are first read, in the image that the reads come to, not in those below. `None`: half of
    /// [`l2_cache_size`](Self::l2_cache_size), which then has the other half, at most
    /// [`DEFAULT_INDEX_SIZE`]; that without such a limit.
    pub index_size: Option<u64>,
    /// Size of the refcount block cache in bytes; `None`: [`DEFAULT_REFCOUNT_CACHE`]. Ignored if opened for
    /// reading.
    pub refcount_cache_size: Option<u64>,
    /// Memory limit for the bits of all bitmaps, in bytes. Default: 1.5 times the bits of the largest
    /// possible bitmap. If the recording bitmaps of an image do not fit, changes fail with `NoSpace` until
    /// some are removed.
    pub bitmap_memory: u64,
    /// True to discard freed host clusters in the storage (QEMU's `pass-discard-request`).
    pub discard_freed: bool,
    /// True if a discarded or zeroed cluster keeps its host cluster, so that the next write goes to the same
    /// host offset (QEMU's `discard-no-unref`). Version 3 only.
    pub discard_no_unref: bool,
    /// The kinds of metadata that guest data must not overwrite.
    pub overlap_checks: OverlapChecks,
    /// True to open images marked corrupt or dirty for writing, without recounting; for repair.
    pub for_repair: bool,
    /// True to open encrypted images without a key: metadata can be read, guest data cannot.
    pub metadata_only: bool,
    /// Unlocks encrypted layers.
    pub keys: Option<Arc<dyn Keyring>>,
    /// Is told of damage in any layer of the chain.
    pub damage_observer: Option<Arc<dyn DamageObserver>>,
    /// Switches one ordering rule off, so that a test can check that the crash simulation notices.
    #[cfg(feature = "unstable-mutants")]
    pub broken_rule: Option<OrderingRule>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            writable: false,
            layers: Layers::Follow,
            exchangeable: false,
            codecs: Codecs::default(),
            l2_cache_size: None,
            index_size: None,
            refcount_cache_size: None,
            bitmap_memory: MAX_BITS_MEMORY,
            discard_freed: false,
            discard_no_unref: false,
            overlap_checks: OverlapChecks::CACHED,
            for_repair: false,
            metadata_only: false,
            keys: None,
            damage_observer: None,
            #[cfg(feature = "unstable-mutants")]
            broken_rule: None,
        }
    }
}

impl OpenOptions {
    /// For reading; the same as `Default`.
    pub fn read_only() -> Self {
        Self::default()
    }

    /// For reading and writing. The source's storage must be writable too.
    pub fn writable() -> Self {
        Self { writable: true, ..Self::default() }
    }

    /// These options with these codecs.
    #[must_use]
    pub fn with_codecs(self, codecs: Codecs) -> Self {
        Self { codecs, ..self }
    }

    /// These options with the keys of encrypted layers.
    #[must_use]
    pub fn with_keys(self, keys: Arc<dyn Keyring>) -> Self {
        Self { keys: Some(keys), ..self }
    }

    /// These options with these layers opened besides the image.
    #[must_use]
    pub fn with_layers(self, layers: Layers) -> Self {
        Self { layers, ..self }
    }

    /// These options with layers below overlays that can be exchanged, or not.
    #[must_use]
    pub fn with_exchangeable(self, exchangeable: bool) -> Self {
        Self { exchangeable, ..self }
    }

    /// These options with another limit for L2 tables in memory.
    #[must_use]
    pub fn with_l2_cache_size(self, l2_cache_size: Option<u64>) -> Self {
        Self { l2_cache_size, ..self }
    }

    /// These options with another limit for the index of merged layers.
    #[must_use]
    pub fn with_index_size(self, index_size: Option<u64>) -> Self {
        Self { index_size, ..self }
    }

    /// These options with another limit for refcount blocks in memory.
    #[must_use]
    pub fn with_refcount_cache_size(self, refcount_cache_size: Option<u64>) -> Self {
        Self { refcount_cache_size, ..self }
    }

    /// These options with another limit for the bits of all bitmaps.
    #[must_use]
    pub fn with_bitmap_memory(self, bitmap_memory: u64) -> Self {
        Self { bitmap_memory, ..self }
    }

    /// These options with freed clusters given back to the storage, or kept.
    #[must_use]
    pub fn with_discard_freed(self, discard_freed: bool) -> Self {
        Self { discard_freed, ..self }
    }

    /// These options with host clusters kept when they are discarded, or freed.
    #[must_use]
    pub fn with_discard_no_unref(self, discard_no_unref: bool) -> Self {
        Self { discard_no_unref, ..self }
    }

    /// These options with other checks of what guest data may be written over.
    #[must_use]
    pub fn with_overlap_checks(self, overlap_checks: OverlapChecks) -> Self {
        Self { overlap_checks, ..self }
    }

    /// These options for repair, or not.
    #[must_use]
    pub fn with_for_repair(self, for_repair: bool) -> Self {
        Self { for_repair, ..self }
    }

    /// These options for looking at metadata without a key, or not.
    #[must_use]
    pub fn with_metadata_only(self, metadata_only: bool) -> Self {
        Self { metadata_only, ..self }
    }
}
