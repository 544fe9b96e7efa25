//! From a header to a usable image: which images are opened, and how.
//!
//! Invariants I6 and I7: unknown incompatible bits stop the open; unknown autoclear bits are cleared before
//! the first write; opening for reading writes nothing.

use crate::bitmap::{Bitmaps, MAX_BITS_MEMORY};
use crate::chain;
use crate::crypt::Crypt;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::inflight::{Claims, Operations};
use crate::meta::Meta;
use crate::meta::alloc::Refcounts;
use crate::meta::cache::PageCache;
use crate::meta::guard::{Guard, MetadataMap};
use crate::meta::header::HeaderState;
use crate::meta::known::known_metadata;
use crate::meta::l1::L1Table;
use crate::meta::overlap::OverlapChecks;
use crate::meta::page::SECTOR_SIZE;
use crate::port::cipher::Keyring;
use crate::port::codec::ClusterCodec;
use crate::port::disk::GuestDisk;
use crate::port::resolver::{Reference, ResolvedSource};
use crate::port::storage::Storage;
use crate::read::expanded::{ExpandedClusters, Scratch};
#[cfg(feature = "mutants")]
use crate::rules::OrderingRule;
use crate::rules::Rules;
use crate::sync::atomic::{AtomicBool, AtomicU64};
use crate::sync::{LockOwner, Mutex, Rank, RwLock};
use ::alloc::sync::Arc;
use ::alloc::vec;
use ::alloc::vec::Vec;
use qcow2_format::HeaderField;
use qcow2_format::feature::AutoclearFeatures;
use qcow2_format::header::CompressionType;
use qcow2_format::header::SECTOR_LEN;
use qcow2_format::{Geometry, Header, HostOffset, Version};

/// Bytes of L2 tables kept in memory at most, by default. Origin: QEMU on Linux.
pub const DEFAULT_L2_CACHE: u64 = 32 << 20;
/// Bytes of refcount blocks kept in memory at most, by default.
pub const DEFAULT_REFCOUNT_CACHE: u64 = 4 << 20;
/// Bytes of a table read at once when it is read whole.
const TABLE_PIECE: u64 = 1 << 20;
/// The largest cached piece of a table.
const MAX_PAGE: u64 = 64 << 10;
/// The cached piece of a table on disks that the cache does not cover.
const SMALL_PAGE: u64 = 4 << 10;

/// The compression methods that an image may ask for.
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
    /// The data file and the whole backing chain, as the source's resolver allows.
    Follow,
    /// The data file, but no backing file: bytes that this layer does not have cannot be read.
    NoBacking,
    /// Nothing: for looking at metadata. Data in an external file cannot be read.
    TopOnly,
}

/// How an image is opened.
#[derive(Clone)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Whether changes will be made.
    pub writable: bool,
    /// Which other files are opened.
    pub layers: Layers,
    /// The compression methods at hand; without the one an image uses, its compressed clusters cannot be
    /// read.
    pub codecs: Codecs,
    /// Bytes of L2 tables to keep in memory; `None`: as much as covers the disk, at most
    /// [`DEFAULT_L2_CACHE`].
    pub l2_cache_size: Option<u64>,
    /// Bytes of refcount blocks to keep in memory; `None`: [`DEFAULT_REFCOUNT_CACHE`] at most.
    pub refcount_cache_size: Option<u64>,
    /// Bytes of memory that the bits of all bitmaps may take: by default as much as the bits of the largest
    /// bitmap and half as much. An image whose bitmaps do not fit takes no changes until some are removed.
    pub bitmap_memory: u64,
    /// Whether host clusters that become free are given back to the storage (QEMU's `pass-discard-request`).
    pub discard_freed: bool,
    /// Whether a discarded or zeroed cluster keeps its host cluster, so that writing it again takes no other
    /// place (QEMU's `discard-no-unref`). Version 3 only.
    pub discard_no_unref: bool,
    /// What guest data may not be written over.
    pub overlap_checks: OverlapChecks,
    /// Opens damaged and uncleanly closed images for writing too; for repair.
    pub for_repair: bool,
    /// Opens encrypted images although there is no key: metadata can be seen, data can not.
    pub metadata_only: bool,
    /// Has the keys of encrypted layers.
    pub keys: Option<Arc<dyn Keyring>>,
    /// Switches one ordering rule off; for tests that must see the crash simulation fail.
    #[cfg(feature = "mutants")]
    pub broken_rule: Option<OrderingRule>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            writable: false,
            layers: Layers::Follow,
            codecs: Codecs::default(),
            l2_cache_size: None,
            refcount_cache_size: None,
            bitmap_memory: MAX_BITS_MEMORY,
            discard_freed: false,
            discard_no_unref: false,
            overlap_checks: OverlapChecks::CACHED,
            for_repair: false,
            metadata_only: false,
            keys: None,
            #[cfg(feature = "mutants")]
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

    /// These options with the compression methods at hand.
    #[must_use]
    pub fn with_codecs(self, codecs: Codecs) -> Self {
        Self { codecs, ..self }
    }

    /// These options with the keys of encrypted layers.
    #[must_use]
    pub fn with_keys(self, keys: Arc<dyn Keyring>) -> Self {
        Self { keys: Some(keys), ..self }
    }

    /// These options with another answer to which files are opened besides the image.
    #[must_use]
    pub fn with_layers(self, layers: Layers) -> Self {
        Self { layers, ..self }
    }
}

impl Image {
    /// Opens an image and, as `options` say, what it names. Disk: reads header and tables; opened for
    /// writing, clears unknown autoclear bits and, where the image was not closed cleanly, counts its
    /// refcounts anew. Errors: `Format` for bytes that are no such image, `Unsupported` for unknown features,
    /// `Corrupt` for an image marked so that is to be written, `Encrypted`, `Resolve`, `Chain`, `Storage`.
    ///
    /// Spec: "Header", "Header extensions".
    pub fn open(source: ResolvedSource, options: &OpenOptions) -> Result<Arc<Self>> {
        let image = Self::open_layer(&source, options, 0)?;
        if options.writable && !options.for_repair && image.header().is_dirty() {
            image.recover()?;
        }
        let backing = image.open_below(&source, options)?;
        Ok(Arc::new(image.with_backing(backing)))
    }

    /// Opens the chain below this layer, as far as `options` want it.
    pub(crate) fn open_below(
        &self,
        source: &ResolvedSource,
        options: &OpenOptions,
    ) -> Result<Option<Arc<dyn GuestDisk>>> {
        match self.backing_reference() {
            Some((name, format)) if options.layers == Layers::Follow => {
                chain::open_backing(source, (&name, format.as_deref()), options).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Opens one layer without what is below it. `depth`: how many layers stand on it.
    pub(crate) fn open_layer(source: &ResolvedSource, options: &OpenOptions, depth: usize) -> Result<Self> {
        let (header, sector) = read_header(&*source.storage)?;
        check_usable(&header, options)?;
        let _owner = LockOwner::new();
        let crypt = Crypt::unlock(source, &header, options, depth)?;
        let data = open_data(source, &header, options)?;
        let meta = build_meta(source, header, sector, data, options)?;
        if options.writable {
            clear_autoclear(&meta)?;
        }
        let header = meta.header();
        let codec = match header.compression_type {
            CompressionType::Zstd => options.codecs.zstd.clone(),
            _ => options.codecs.deflate.clone(),
        };
        Ok(Self {
            size: AtomicU64::new(header.disk_size()),
            meta,
            backing: None,
            backing_unopened: header.backing_file.is_some(),
            codec,
            scratch: Scratch::default(),
            crypt,
            structure: RwLock::new(Rank::Structure, ()),
            bitmaps: Bitmaps::new(options.bitmap_memory),
            raw_data_file: header.autoclear_features.contains(AutoclearFeatures::RAW_DATA_FILE),
        })
    }
}

/// Reads and parses the header: the first cluster, at most 2 MiB.
pub(crate) fn read_header(storage: &dyn Storage) -> Result<(Header, [u8; SECTOR_LEN])> {
    let bad = |e| Error::new(ErrorKind::Format, "not a usable qcow2 image").with_source(e);
    let mut start = vec![0; SECTOR_SIZE as usize];
    let n = storage.read_at(HostOffset::new(0), &mut start)?;
    let wanted = Header::probe_len(&start[..n]).map_err(bad)?;
    let mut bytes = vec![0; wanted];
    let n = storage.read_at(HostOffset::new(0), &mut bytes)?;
    bytes.truncate(n);
    let header = Header::parse(&bytes).map_err(bad)?;
    let mut sector = [0; SECTOR_LEN];
    let len = bytes.len().min(SECTOR_LEN);
    sector[..len].copy_from_slice(&bytes[..len]);
    Ok((header, sector))
}

fn check_usable(header: &Header, options: &OpenOptions) -> Result<()> {
    if options.discard_no_unref && header.version < Version::V3 {
        let message = "discard-no-unref is only supported since qcow2 version 3";
        return Err(Error::new(ErrorKind::InvalidOption, message));
    }
    if options.writable && !options.for_repair && header.is_corrupt() {
        let message = "image is marked corrupt; it can be opened for reading or repair only";
        return Err(Error::new(ErrorKind::MarkedCorrupt, message));
    }
    Ok(())
}

fn open_data(
    source: &ResolvedSource,
    header: &Header,
    options: &OpenOptions,
) -> Result<Option<Arc<dyn Storage>>> {
    if !header.has_data_file() {
        let raw = header.autoclear_features.contains(AutoclearFeatures::RAW_DATA_FILE);
        if raw && options.layers != Layers::TopOnly {
            let message = "image promises a raw external data file (autoclear bit 1), but has no data file";
            return Err(Error::new(ErrorKind::Format, message));
        }
        return Ok(Some(Arc::clone(&source.storage)));
    }
    if options.layers == Layers::TopOnly {
        return Ok(None);
    }
    let Some(name) = header.extensions.data_file_name() else {
        return Err(Error::new(ErrorKind::Resolve, "image needs an external data file but names none"));
    };
    let opened = source.resolver.resolve(Reference::DataFile { name: &name }, options.writable)?;
    Ok(Some(opened.storage))
}

fn build_meta(
    source: &ResolvedSource,
    header: Header,
    sector: [u8; SECTOR_LEN],
    data: Option<Arc<dyn Storage>>,
    options: &OpenOptions,
) -> Result<Meta> {
    let storage = Arc::clone(&source.storage);
    let bad = |e| Error::new(ErrorKind::Format, "not a usable qcow2 image").with_source(e);
    let (geometry, l2_format) = (header.geometry().map_err(bad)?, header.l2_format().map_err(bad)?);
    let l1 = read_words(&*storage, header.l1_table_offset, u64::from(header.l1_size))?;
    let refcounts =
        if options.writable { load_refcounts(&*storage, &header, &geometry)? } else { empty_refcounts() };
    let metadata = if options.writable {
        known_metadata(&*storage, &header, (&l1, &refcounts), options.overlap_checks)?
    } else {
        MetadataMap::default()
    };
    let l2_bytes = header.size.div_ceil(geometry.cluster_size()).saturating_mul(geometry.l2_entry_size());
    let l2_cache = options.l2_cache_size.unwrap_or(DEFAULT_L2_CACHE.min(l2_bytes));
    let page = if l2_cache >= l2_bytes { MAX_PAGE } else { SMALL_PAGE }.min(geometry.cluster_size());
    // Who only reads has no use for refcounts; a chain may have a thousand such layers.
    let refcount_cache = match options.writable {
        true => options.refcount_cache_size.unwrap_or(DEFAULT_REFCOUNT_CACHE),
        false => 0,
    };
    Ok(Meta {
        l1: L1Table::new(header.l1_table_offset, l1),
        geometry,
        l2_format,
        storage,
        data,
        header: Mutex::new(Rank::Header, HeaderState { header, sector }),
        l2_cache: PageCache::new(page, l2_cache, l2_bytes),
        refcount_cache: PageCache::new(geometry.cluster_size().min(MAX_PAGE), refcount_cache, u64::MAX),
        refcounts: Mutex::new(Rank::Refcounts, refcounts),
        refcount_io: Mutex::new(Rank::RefcountIo, ()),
        guard: Guard::new(metadata, options.overlap_checks),
        pending: Mutex::new(Rank::Pending, Default::default()),
        gate: RwLock::new(Rank::Gate, ()),
        table_lock: Mutex::new(Rank::NewTable, ()),
        flushing: Mutex::new(Rank::Flushing, ()),
        flush_rounds: AtomicU64::new(0),
        expanded: ExpandedClusters::default(),
        operations: Operations::default(),
        claims: Claims::default(),
        poisoned: AtomicBool::new(false),
        changing: AtomicBool::new(false),
        writable: options.writable,
        for_repair: options.for_repair,
        discard_freed: options.discard_freed,
        discard_no_unref: options.discard_no_unref,
        overlap_checks: options.overlap_checks,
        rules: rules(options),
        events: source.storage.events(),
    })
}

#[cfg(feature = "mutants")]
fn rules(options: &OpenOptions) -> Rules {
    Rules { broken: options.broken_rule }
}

#[cfg(not(feature = "mutants"))]
fn rules(_options: &OpenOptions) -> Rules {
    Rules::default()
}

/// `count` big-endian words at `offset`; past the end of the file they are zero. `count` was checked against
/// a limit.
pub(crate) fn read_words(storage: &dyn Storage, offset: HostOffset, count: u64) -> Result<Vec<u64>> {
    // Piece by piece: a table may have 32 MiB, and need not be in memory twice.
    let mut words = Vec::with_capacity(count as usize);
    let mut piece = vec![0; (count * 8).min(TABLE_PIECE) as usize];
    while (words.len() as u64) < count {
        let done = words.len() as u64 * 8;
        let bytes = &mut piece[..(count * 8 - done).min(TABLE_PIECE) as usize];
        storage.read_padded(HostOffset::new(offset.value() + done), bytes)?;
        words.extend(qcow2_format::bytes::words(bytes));
    }
    Ok(words)
}

fn empty_refcounts() -> Refcounts {
    Refcounts {
        table: Vec::new(),
        table_offset: HostOffset::new(0),
        table_clusters: 0,
        dirty_sectors: Default::default(),
        first_free: 0,
        pack: None,
    }
}

fn load_refcounts(storage: &dyn Storage, header: &Header, geometry: &Geometry) -> Result<Refcounts> {
    let clusters = u64::from(header.refcount_table_clusters);
    let table = read_words(storage, header.refcount_table_offset, clusters * geometry.cluster_size() / 8)?;
    Ok(Refcounts {
        table,
        table_offset: header.refcount_table_offset,
        table_clusters: clusters,
        ..empty_refcounts()
    })
}

/// Clears the autoclear bits that this engine does not keep up to date.
fn clear_autoclear(meta: &Meta) -> Result<()> {
    let features = meta.header().autoclear_features;
    let known = AutoclearFeatures::from_bits(features.bits() & !features.unknown().bits());
    if known != features {
        meta.update_header(&[HeaderField::Autoclear(known)])?;
    }
    Ok(())
}
