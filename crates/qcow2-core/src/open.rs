//! Opens an image: checks the header, loads the tables, builds the parts of the engine.
//!
//! Invariants I6 and I7: unknown incompatible bits stop the open; unknown autoclear bits are cleared before
//! the first write; opening for reading writes nothing.

mod options;

pub use options::{
    Codecs, DEFAULT_INDEX_SIZE, DEFAULT_L2_CACHE, DEFAULT_REFCOUNT_CACHE, Layers, OpenOptions,
};

use crate::bitmap::Bitmaps;
use crate::chain;
use crate::crypt::Crypt;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::merged::view::Merged;
use crate::meta::cache::PageCache;
use crate::meta::file::ImageFile;
use crate::meta::flush::Flusher;
use crate::meta::guard::{Guard, MetadataMap};
use crate::meta::header::HeaderStore;
use crate::meta::known::known_metadata;
use crate::meta::mapping::{L1Entries, Mapping};
use crate::meta::page::SECTOR_SIZE;
use crate::meta::refcount::{RefcountStore, Refcounts};
use crate::meta::tables::Tables;
use crate::port::disk::GuestDisk;
use crate::port::resolver::{Reference, ResolvedSource};
use crate::port::storage::Storage;
use crate::read::expanded::Scratch;
use crate::sync::atomic::AtomicU64;
use crate::sync::{LockOwner, Rank, RwLock};
use ::alloc::sync::Arc;
use ::alloc::vec;
use qcow2_format::feature::{AutoclearFeatures, IncompatibleFeatures};
use qcow2_format::header::CompressionType;
use qcow2_format::header::SECTOR_LEN;
use qcow2_format::{Geometry, Header, HostOffset, Version};

/// The largest cache page, in bytes.
const MAX_PAGE: u64 = 64 << 10;
/// Bytes of a cache page if the cache is smaller than all L2 tables: a miss then reads little.
const SMALL_PAGE: u64 = 4 << 10;

impl Image {
    /// Opens an image and, as far as `options` ask for them, its data file and backing chain. Disk: reads the
    /// header and tables. For writing, clears unknown autoclear bits and, if the dirty bit is set, recounts
    /// and corrects the refcounts. Errors: `Format` for a bad header or unknown incompatible bits;
    /// `MarkedCorrupt` if the corrupt bit is set and `options` are for writing, but not for repair;
    /// `Unsupported` for a layer of another format than raw, qcow2 and LUKS; `InvalidOption`, `Corrupt`,
    /// `Encrypted`, `Resolve`, `Chain`, `Storage`.
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

    /// Opens an image on `below`, a disk that is open already, whatever backing file the header names. The
    /// option [`layers`](OpenOptions::layers) decides about the data file only. The keyring is asked as for
    /// the top of a chain. Disk, errors: as [`open`](Self::open).
    pub fn open_on(
        source: &ResolvedSource,
        options: &OpenOptions,
        below: Arc<dyn GuestDisk>,
    ) -> Result<Arc<Self>> {
        let image = Self::open_layer(source, options, 0)?;
        if options.writable && !options.for_repair && image.header().is_dirty() {
            image.recover()?;
        }
        Ok(Arc::new(image.with_backing(Some(below))))
    }

    /// Opens the backing chain of this layer; `None` without a backing file, or if `options` exclude it.
    pub(crate) fn open_below(
        &self,
        source: &ResolvedSource,
        options: &OpenOptions,
    ) -> Result<Option<Arc<dyn GuestDisk>>> {
        match chain::below(source, self) {
            Some((name, format)) if options.layers == Layers::Follow => {
                chain::open_backing(source, (&name, format.as_deref()), options).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Opens one layer without its backing file. `depth`: how many overlays are above it.
    pub(crate) fn open_layer(source: &ResolvedSource, options: &OpenOptions, depth: usize) -> Result<Self> {
        let (header, sector) = read_header(&*source.storage)?;
        check_usable(&header, options)?;
        Self::assemble(source, (header, sector), options, depth, None)
    }

    /// Opens one layer whose header has been read and checked, and its tables too if they are `known`.
    /// `sector`: the first sector of the header.
    pub(crate) fn assemble(
        source: &ResolvedSource,
        (header, sector): (Header, [u8; SECTOR_LEN]),
        options: &OpenOptions,
        depth: usize,
        known: Option<KnownTables>,
    ) -> Result<Self> {
        let _owner = LockOwner::new();
        let crypt = Crypt::unlock(source, &header, options, depth)?;
        let data = open_data(source, &header, options)?;
        let Parts { tables, refcounts, flusher } =
            build_parts(source, (header, sector), data, options, known)?;
        let (file, store) = (Arc::clone(tables.file()), Arc::clone(tables.header()));
        if options.writable {
            store.clear_unknown_autoclear()?;
        }
        let header = store.current();
        let codec = match header.compression_type {
            CompressionType::Zstd => options.codecs.zstd.clone(),
            _ => options.codecs.deflate.clone(),
        };
        Ok(Self {
            file,
            header: store,
            tables,
            refcounts,
            flusher,
            size: AtomicU64::new(header.disk_size()),
            backing: None,
            backing_unopened: header.backing_file.is_some(),
            codec,
            scratch: Scratch::default(),
            merged: Merged::new(index_size(options)),
            crypt,
            structure: RwLock::new(Rank::Structure, ()),
            bitmaps: Bitmaps::new(options.bitmap_memory),
            raw_data_file: header.features.autoclear.contains(AutoclearFeatures::RAW_DATA_FILE),
            discard_no_unref: options.discard_no_unref,
        })
    }
}

/// Reads and parses the header: the first cluster, at most 2 MiB. Also returns the first sector as it is.
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

/// Checks that an image with `header` can be opened with `options`. Errors: `InvalidOption`, `MarkedCorrupt`.
pub(crate) fn check_usable(header: &Header, options: &OpenOptions) -> Result<()> {
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
        let raw = header.features.autoclear.contains(AutoclearFeatures::RAW_DATA_FILE);
        if raw && options.layers != Layers::TopOnly {
            let message = "autoclear bit 1 (raw external data file) is set, but the image has no data file";
            return Err(Error::new(ErrorKind::Format, message));
        }
        return Ok(Some(Arc::clone(&source.storage)));
    }
    if options.layers == Layers::TopOnly {
        return Ok(None);
    }
    let chosen = || source.resolver.has_chosen(Reference::DataFile { name: "" }).then(Default::default);
    let Some(name) = header.extensions.data_file_name().or_else(chosen) else {
        let message = "image needs an external data file, but its header has no name for it";
        return Err(Error::new(ErrorKind::Resolve, message));
    };
    let opened = source.resolver.resolve(Reference::DataFile { name: &name }, options.writable)?;
    Ok(Some(opened.storage))
}

/// The tables of an image that need not be read, because it was just created.
pub(crate) struct KnownTables {
    pub(crate) l1: L1Entries,
    pub(crate) refcounts: Refcounts,
}

/// The parts of the engine for one image.
struct Parts {
    tables: Arc<Tables>,
    refcounts: Arc<RefcountStore>,
    flusher: Flusher,
}

/// Builds the parts, each on the ones before it. `sector`: the first sector of the header. Disk: reads the L1
/// table and, for writing, the refcount table, unless they are `known`; for writing, also whatever
/// [`known_metadata`] needs.
fn build_parts(
    source: &ResolvedSource,
    (header, sector): (Header, [u8; SECTOR_LEN]),
    data: Option<Arc<dyn Storage>>,
    options: &OpenOptions,
    known: Option<KnownTables>,
) -> Result<Parts> {
    let bad = |e| Error::new(ErrorKind::Format, "not a usable qcow2 image").with_source(e);
    // The parser has refused unknown incompatible bits already (I6).
    assert!(header.features.incompatible.unknown() == IncompatibleFeatures::NONE, "{header:?}");
    let l2_format = header.l2_format().map_err(bad)?;
    let file = Arc::new(ImageFile::new(l2_format, Arc::clone(&source.storage), data, options));
    let (geometry, storage) = (file.geometry(), file.storage());
    let (l1, refcounts) = match known {
        Some(KnownTables { l1, refcounts }) => (l1, Some(refcounts)),
        None => (L1Entries::read(storage, header.l1_table_offset, u64::from(header.l1_size))?, None),
    };
    let (refcounts, metadata) = if options.writable {
        let refcounts = match refcounts {
            Some(refcounts) => refcounts,
            None => Refcounts::load(storage, &header, geometry)?,
        };
        let known =
            known_metadata(storage, &header, (&l1.to_vec(), refcounts.table()), options.overlap_checks)?;
        (refcounts, known)
    } else {
        (Refcounts::default(), MetadataMap::default())
    };
    let l2_cache = l2_cache(&header, geometry, options);
    // A read-only layer never looks at refcounts, and a chain may have a thousand of them.
    let refcount_bytes = match options.writable {
        true => options.refcount_cache_size.unwrap_or(DEFAULT_REFCOUNT_CACHE),
        false => 0,
    };
    let refcount_cache = PageCache::new(geometry.cluster_size().min(MAX_PAGE), refcount_bytes, u64::MAX);
    let l1 = (header.l1_table_offset, l1);
    let header =
        Arc::new(HeaderStore::new(Arc::clone(&file), (header, sector), options.damage_observer.clone()));
    let guard = Guard::new(metadata, options.overlap_checks);
    let tables = Arc::new(Tables::new(file, header, guard, options.overlap_checks));
    let refcounts =
        Arc::new(RefcountStore::new(Arc::clone(&tables), refcounts, refcount_cache, options.discard_freed));
    let mapping = Mapping::new(Arc::clone(&refcounts), l1, l2_cache);
    let flusher = Flusher::new(Arc::clone(&refcounts), mapping);
    Ok(Parts { tables, refcounts, flusher })
}

/// The cache of L2 tables. Its pages are small if it cannot hold all L2 tables, so that a miss reads little.
fn l2_cache(header: &Header, geometry: &Geometry, options: &OpenOptions) -> PageCache {
    let needed = header.size.div_ceil(geometry.cluster_size()).saturating_mul(geometry.l2_entry_size());
    let bytes = options.l2_cache_size.unwrap_or(DEFAULT_L2_CACHE.min(needed));
    // Nobody changes it: its index has the other half, see `index_size`.
    let shared = !options.writable && options.l2_cache_size.is_some() && options.index_size.is_none();
    let bytes = if shared { bytes - bytes / 2 } else { bytes };
    let page = if bytes >= needed { MAX_PAGE } else { SMALL_PAGE }.min(geometry.cluster_size());
    PageCache::new(page, bytes, needed)
}

/// The budget of the index: a limit for L2 tables in memory is one for what is known of them in another form.
fn index_size(options: &OpenOptions) -> u64 {
    let half = options.l2_cache_size.map(|bytes| (bytes / 2).min(DEFAULT_INDEX_SIZE));
    options.index_size.or(half).unwrap_or(DEFAULT_INDEX_SIZE)
}
