//! The layout of a new empty image.
//!
//! Clusters in order: header, refcount table, refcount blocks, L1 table, LUKS area, then with preallocation
//! L2 tables and data. Order on disk: everything but the first sector, barrier, the first sector, barrier: an
//! image that opens is complete. The header may be longer than a sector, and a crash may lose any of its
//! sectors: the backing file's name, for one. What an empty image has behind its first sector goes out in one
//! write.

mod options;
mod raw;
mod refusal;
mod sink;

pub use options::{BackingName, CreateOptions, LuksArea, NewEncryption, Preallocation, RawOptions};
pub use raw::{create_container, create_raw};
pub use refusal::Refusal;

use self::sink::Sink;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::invariant;
use crate::meta::mapping::L1Entries;
use crate::meta::refcount::Refcounts;
use crate::open::{KnownTables, OpenOptions, check_usable};
use crate::port::disk::GuestDisk;
use crate::port::resolver::ResolvedSource;
use crate::port::storage::{Length, Storage, ZeroMode};
use ::alloc::string::String;
use ::alloc::sync::Arc;
use ::alloc::vec;
use ::alloc::vec::Vec;
use qcow2_format::feature::{AutoclearFeatures, CompatibleFeatures, FeatureName, IncompatibleFeatures};
use qcow2_format::header::{CompressionType, CryptMethod, SECTOR_LEN};
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::{ClusterEntry, L2Entry, L2Format};
use qcow2_format::limit::MAX_REFCOUNT_TABLE_SIZE;
use qcow2_format::refcount::encode_table_entry;
use qcow2_format::text::bytes_of;
use qcow2_format::{Geometry, Header, HostOffset, LuksPointer, Version};

/// Bytes written at a time.
const BATCH: u64 = 1 << 20;

impl Image {
    /// Creates an image in `source`, whose storage is empty, and opens it with `options`, always for writing.
    /// Disk: as [`create`]. Errors: `InvalidOption` with an external data file: use [`create`], which takes
    /// its storage too; otherwise as [`create`] and [`open`](Self::open).
    ///
    /// ```
    /// use qcow2_core::{CreateOptions, GuestDisk, GuestOffset, Image, ImageFormat};
    /// use qcow2_core::{OpenOptions, ResolvedSource};
    /// use qcow2_io::MemoryStorage;
    /// use std::sync::Arc;
    ///
    /// let source = ResolvedSource::new(Arc::new(MemoryStorage::new()), ImageFormat::Qcow2, "memory");
    /// let image = Image::create(source, &CreateOptions::new(1 << 20), &OpenOptions::default())?;
    /// image.write_at(GuestOffset::new(0), b"hello")?;
    /// image.close()?;
    /// # Ok::<(), qcow2_core::Error>(())
    /// ```
    pub fn create(source: ResolvedSource, new: &CreateOptions, options: &OpenOptions) -> Result<Arc<Self>> {
        let options = OpenOptions { writable: true, ..options.clone() };
        let image = Self::create_layer(&source, new, &options)?;
        let backing = image.open_below(&source, &options)?;
        Ok(Arc::new(image.with_backing(backing)))
    }

    /// Creates an overlay of `below`, a disk that is open already, in `source`, whose storage is empty, and
    /// opens it with `options`, always for writing. Neither `below` is read, nor what was written: one disk
    /// may be below thousands of overlays, which share its `Arc` and everything that it has cached. `new`: as
    /// for [`create`](Self::create), with the name of the backing file that is recorded. Nobody may write to
    /// `below` while it has overlays.
    ///
    /// Disk: as [`create`]. Errors: `InvalidOption` without a backing file's name, with an external data
    /// file, otherwise as [`create`] and [`open`](Self::open).
    ///
    /// ```
    /// use qcow2_core::{CreateOptions, GuestDisk, GuestOffset, Image, ImageFormat};
    /// use qcow2_core::{OpenOptions, RawDisk, ResolvedSource};
    /// use qcow2_io::MemoryStorage;
    /// use std::sync::Arc;
    ///
    /// let below = Arc::new(MemoryStorage::with_len(1 << 20));
    /// let base: Arc<dyn GuestDisk> = Arc::new(RawDisk::new(below, false)?);
    /// let new = CreateOptions::new(base.size()).with_backing("base.raw", "raw");
    /// for id in 0..3 {
    ///     let source = ResolvedSource::new(Arc::new(MemoryStorage::new()), ImageFormat::Qcow2, "memory");
    ///     let overlay = Image::create_on(&source, &new, &OpenOptions::default(), Arc::clone(&base))?;
    ///     overlay.write_at(GuestOffset::new(0), &[id])?;
    ///     overlay.close()?;
    /// }
    /// # Ok::<(), qcow2_core::Error>(())
    /// ```
    pub fn create_on(
        source: &ResolvedSource,
        new: &CreateOptions,
        options: &OpenOptions,
        below: Arc<dyn GuestDisk>,
    ) -> Result<Arc<Self>> {
        // Without it the image would open as one that has no backing file.
        if new.backing_file.as_ref().is_none_or(String::is_empty) {
            let message = "an overlay needs the name of its backing file";
            return Err(Error::new(ErrorKind::InvalidOption, message));
        }
        let image = Self::create_layer(source, new, &OpenOptions { writable: true, ..options.clone() })?;
        Ok(Arc::new(image.with_backing(Some(below))))
    }

    /// Creates an image and opens it, without its backing file. What was written is not read again.
    fn create_layer(source: &ResolvedSource, new: &CreateOptions, options: &OpenOptions) -> Result<Self> {
        if new.data_file.is_some() {
            let message = "an image with an external data file needs a second storage";
            return Err(Error::new(ErrorKind::InvalidOption, message));
        }
        new.check().map_err(refused)?;
        check_usable(&header_for(new)?, options)?;
        let Written { first, table, l2_tables } = write_image(&source.storage, None, new)?;
        if l2_tables > 0 {
            return Self::open_layer(source, options, 0);
        }
        let header = Header::parse(&first).map_err(invalid)?;
        let geometry = header.l2_format().map_err(invalid)?.geometry;
        let tables = KnownTables {
            l1: L1Entries::zeroes(u64::from(header.l1_size)),
            refcounts: Refcounts::created(&header, table, &geometry),
        };
        let mut sector = [0; SECTOR_LEN];
        sector.copy_from_slice(&first[..SECTOR_LEN]);
        Self::assemble(source, (header, sector), options, 0, Some(tables))
    }
}

/// The length of each part of the new image, in clusters (`l1_entries`: in entries). The parts follow each
/// other.
struct Layout {
    table: u64,
    blocks: u64,
    l1: u64,
    l1_entries: u64,
    luks: u64,
    l2_tables: u64,
    data: u64,
}

impl Layout {
    fn table_start(&self) -> u64 {
        1
    }
    fn blocks_start(&self) -> u64 {
        1 + self.table
    }
    fn l1_start(&self) -> u64 {
        self.blocks_start() + self.blocks
    }
    fn luks_start(&self) -> u64 {
        self.l1_start() + self.l1
    }
    fn l2_start(&self) -> u64 {
        self.luks_start() + self.luks
    }
    fn data_start(&self) -> u64 {
        self.l2_start() + self.l2_tables
    }
    fn end(&self) -> u64 {
        self.data_start() + self.data
    }
}

/// What was written of a new image.
struct Written {
    /// The header's cluster.
    first: Vec<u8>,
    /// The entries of the refcount table that are not zero.
    table: Vec<u64>,
    l2_tables: u64,
}

/// Writes a new image. `storage`: empty. `data`: the external data file's storage; with preallocation it
/// becomes as long as the disk. Disk: sets the length, writes everything but the first sector, barrier, the
/// first sector, barrier. Does not read what the storage held before.
///
/// Errors: `InvalidOption`, before anything is written, with a [`Refusal`] as source or for a name that does
/// not fit into the header; `NoSpace`, `Storage`.
pub fn create(
    storage: &Arc<dyn Storage>,
    data: Option<&Arc<dyn Storage>>,
    options: &CreateOptions,
) -> Result<()> {
    options.check().map_err(refused)?;
    write_image(storage, data, options).map(drop)
}

/// [`create`] for checked options.
fn write_image(
    storage: &Arc<dyn Storage>,
    data: Option<&Arc<dyn Storage>>,
    options: &CreateOptions,
) -> Result<Written> {
    let target = data.unwrap_or(storage);
    let space = match data {
        Some(data) if !data.limits().growable() => Preallocation::Off,
        _ => space_on(&**target, options.preallocation).map_err(refused)?,
    };
    let mut header = header_for(options)?;
    let format = header.l2_format().map_err(invalid)?;
    let geometry = format.geometry;
    let layout = plan_layout(&geometry, options)?;
    let at = |cluster: u64| HostOffset::new(cluster * geometry.cluster_size());
    header.refcount_table_offset = at(layout.table_start());
    header.refcount_table_clusters = layout.table as u32;
    header.l1_table_offset = at(layout.l1_start());
    header.l1_size = layout.l1_entries as u32;
    if let Some(NewEncryption::Luks(area)) = &options.encryption {
        let (offset, len) = (at(layout.luks_start()), area.0.len() as u64);
        header.extensions.luks = Some(LuksPointer { offset, len });
    }
    let first = header.encode_cluster().map_err(invalid)?;
    make_room(&**storage, &header)?;
    let blocks = layout.blocks_start()..layout.l1_start();
    let table: Vec<u64> = blocks.map(|block| encode_table_entry(Some(at(block)))).collect();
    let mut sink = Sink::new(&**storage);
    sink.bytes(HostOffset::new(SECTOR_LEN as u64), &first[SECTOR_LEN..])?;
    write_refcounts(&mut sink, &geometry, &layout, &table)?;
    let stale = !target.limits().growable() && !options.data_file_raw;
    write_mapping(&mut sink, &format, &layout, options, stale)?;
    sink.finish()?;
    if let Some(NewEncryption::Luks(area)) = &options.encryption {
        storage.write_at(at(layout.luks_start()), &area.0)?;
    }
    preallocate_data(&**storage, data, &layout, options, space)?;
    if let Some(data) = data {
        data.flush()?;
    }
    storage.flush()?;
    storage.write_at(HostOffset::new(0), &first[..SECTOR_LEN])?;
    storage.flush()?;
    Ok(Written { first, table, l2_tables: layout.l2_tables })
}

fn invalid(error: qcow2_format::FormatError) -> Error {
    Error::new(ErrorKind::InvalidOption, "image cannot be created").with_source(error)
}

fn refused(refusal: Refusal) -> Error {
    Error::new(ErrorKind::InvalidOption, "image cannot be created").with_source(refusal)
}

/// The header for checked options, without the offsets of the tables.
fn header_for(options: &CreateOptions) -> Result<Header> {
    let mut header = Header::new(options.version, options.cluster_size.trailing_zeros());
    header.size = options.size.next_multiple_of(512);
    header.refcount_order = options.refcount_bits.trailing_zeros();
    header.compression_type = options.compression_type;
    let zstd = options.compression_type == CompressionType::Zstd;
    header.features.incompatible.set(IncompatibleFeatures::COMPRESSION_TYPE, zstd);
    header.features.incompatible.set(IncompatibleFeatures::EXTENDED_L2, options.extended_l2);
    header.features.incompatible.set(IncompatibleFeatures::DATA_FILE, options.data_file.is_some());
    header.features.compatible.set(CompatibleFeatures::LAZY_REFCOUNTS, options.lazy_refcounts);
    header.features.autoclear.set(AutoclearFeatures::RAW_DATA_FILE, options.data_file_raw);
    let bytes = |name: &Option<String>| name.as_deref().map(|name| bytes_of(name).into_owned());
    header.extensions.data_file = bytes(&options.data_file);
    header.backing_file = bytes(&options.backing_file);
    header.extensions.backing_format = bytes(&options.backing_format);
    header.crypt_method = match &options.encryption {
        None => CryptMethod::None,
        Some(NewEncryption::Pending) => return Err(refused(Refusal::NoEncryptionHeader)),
        Some(NewEncryption::Aes) => CryptMethod::Aes,
        Some(NewEncryption::Luks(_)) => CryptMethod::Luks,
    };
    if options.version >= Version::V3 && options.cluster_size > NAMED_ABOVE {
        header.extensions.feature_names = Some(FeatureName::standard());
    }
    Ok(header)
}

/// Whether the header of a version 3 image names its features: QEMU leaves that out where clusters are small.
pub(crate) fn has_room_for_names(geometry: &Geometry) -> bool {
    geometry.cluster_size() > NAMED_ABOVE
}

/// See [`has_room_for_names`]; in bytes.
const NAMED_ABOVE: u64 = 4096;

fn preallocates(options: &CreateOptions) -> bool {
    options.preallocation != Preallocation::Off || options.data_file_raw
}

fn plan_layout(geometry: &Geometry, options: &CreateOptions) -> Result<Layout> {
    let size = options.size.next_multiple_of(512);
    let (cluster_size, per_block) = (geometry.cluster_size(), geometry.refcount_block_entries());
    let l1_entries = geometry.l1_entries_for(size);
    let filled = preallocates(options);
    let guest = geometry.clusters_for(size);
    let mut layout = Layout {
        table: 1,
        blocks: 1,
        l1: geometry.clusters_for(l1_entries * 8),
        l1_entries,
        luks: match &options.encryption {
            Some(NewEncryption::Luks(area)) => geometry.clusters_for(area.0.len() as u64),
            _ => 0,
        },
        l2_tables: if filled { guest.div_ceil(geometry.l2_entries()) } else { 0 },
        data: if filled && options.data_file.is_none() { guest } else { 0 },
    };
    // A fixed point: blocks and table must also cover their own clusters.
    loop {
        let blocks = layout.end().div_ceil(per_block);
        let table = geometry.clusters_for(blocks * 8);
        if (blocks, table) == (layout.blocks, layout.table) {
            break;
        }
        (layout.blocks, layout.table) = (blocks.max(layout.blocks), table.max(layout.table));
    }
    invariant::all_counted(layout.blocks, per_block, layout.end());
    assert!(layout.table * cluster_size / 8 >= layout.blocks, "more refcount blocks than table entries");
    if layout.table * cluster_size > MAX_REFCOUNT_TABLE_SIZE.max(cluster_size) {
        let clusters = layout.table;
        return Err(refused(Refusal::RefcountTableTooLarge { clusters, cluster_size }));
    }
    Ok(layout)
}

/// Makes the storage as long as its tables before anything is written. A file system with speculative
/// preallocation (XFS: as much again as the file has) reserves space behind a file that grows by writes, and
/// releases it only once while the inode is cached; that once is needed for the data that comes later.
fn make_room(storage: &dyn Storage, header: &Header) -> Result<()> {
    let end = header.l1_table_offset.value() + u64::from(header.l1_size) * 8;
    if storage.limits().growable() && storage.len()? < end {
        storage.set_len(end)?;
    }
    Ok(())
}

/// Writes the refcount table with the entries `table`, and blocks in which every cluster of the layout has
/// refcount 1.
fn write_refcounts(sink: &mut Sink<'_>, geometry: &Geometry, layout: &Layout, table: &[u64]) -> Result<()> {
    let size = geometry.cluster_size();
    let at = |cluster: u64| HostOffset::new(cluster * size);
    let words = (layout.blocks, layout.table * size / 8);
    sink.words(at(layout.table_start()), words, |i| table[i as usize])?;
    let width = geometry.refcount_width();
    let per_word = u64::from(64 / width.bits());
    let ones = (0..per_word).fold(0, |word, slot| width.insert(word, slot, 1));
    let used = layout.end();
    let words = (used.div_ceil(per_word), layout.blocks * size / 8);
    sink.words(at(layout.blocks_start()), words, |i| {
        let (first, end) = (i * per_word, (i + 1) * per_word);
        if end <= used {
            ones
        } else {
            (first..used.max(first)).fold(0, |word, slot| width.insert(word, slot - first, 1))
        }
    })
}

/// Writes the L1 table and, with preallocation, the L2 tables. `stale`: the data clusters hold what was there
/// before, which the disk must not show.
fn write_mapping(
    sink: &mut Sink<'_>,
    format: &L2Format,
    layout: &Layout,
    options: &CreateOptions,
    stale: bool,
) -> Result<()> {
    let size = format.geometry.cluster_size();
    let l1_at = HostOffset::new(layout.l1_start() * size);
    let table = |i: u64| HostOffset::new((layout.l2_start() + i) * size);
    sink.words(l1_at, (layout.l2_tables, layout.l1_entries), |i| {
        L1Entry { l2_table: Some(table(i)), copied: true }.encode()
    })?;
    if layout.l2_tables == 0 {
        return Ok(());
    }
    let guest = format.geometry.clusters_for(options.size.next_multiple_of(512));
    let first = if options.data_file.is_some() { 0 } else { layout.data_start() };
    // Unwritten clusters of an encrypted image would decrypt to noise, so they are preallocated zero
    // clusters.
    let (allocated, zero) = match &options.encryption {
        _ if options.extended_l2 => (0, 0),
        Some(_) => (0, 1),
        None if stale && options.version >= Version::V3 => (0, 1),
        None => (1, 0),
    };
    let words_per_entry = format.geometry.l2_entry_size() / 8;
    let words = layout.l2_tables * size / 8;
    sink.words(table(0), (words, words), |i| {
        let cluster = i / words_per_entry;
        if cluster >= guest || i % words_per_entry != 0 {
            return 0;
        }
        let host = Some(HostOffset::new((first + cluster) * size));
        let entry = L2Entry::Standard(ClusterEntry { host, copied: true, allocated, zero });
        format.encode(&entry).map_or(0, |(raw, _)| raw)
    })
}

/// What `mode` comes to on the storage of an image: one of fixed length has its space already. Errors: a mode
/// that a device is not asked for.
fn space_on(storage: &dyn Storage, mode: Preallocation) -> core::result::Result<Preallocation, Refusal> {
    match (storage.limits().length, mode) {
        (Length::Grows, mode) => Ok(mode),
        (Length::Device, Preallocation::Falloc | Preallocation::Full) => {
            Err(Refusal::PreallocationOnDevice(mode))
        }
        _ => Ok(Preallocation::Off),
    }
}

fn preallocate_data(
    storage: &dyn Storage,
    data: Option<&Arc<dyn Storage>>,
    layout: &Layout,
    options: &CreateOptions,
    space: Preallocation,
) -> Result<()> {
    let size = options.size.next_multiple_of(512);
    let (target, start, end) = match (&options.data_file, data) {
        (Some(_), Some(data)) => (&**data, 0, size),
        (Some(_), None) => return Ok(()),
        (None, _) => {
            let (start, end) = (layout.data_start(), layout.end());
            (storage, start * options.cluster_size, end * options.cluster_size)
        }
    };
    if layout.data == 0 && options.data_file.is_none() {
        return Ok(());
    }
    match space {
        // Version 2 has no other way to say that there are zeroes.
        Preallocation::Off if !target.limits().growable() && options.version < Version::V3 => {
            target.fit(end)?;
            target.write_zeroes(HostOffset::new(start), end - start, ZeroMode::KeepAllocated)?;
        }
        Preallocation::Off | Preallocation::Metadata => target.fit(end)?,
        Preallocation::Falloc => target.allocate(HostOffset::new(start), end - start)?,
        Preallocation::Full => write_zeroes(target, start, end)?,
    }
    Ok(())
}

/// Writes zeroes, so that no later write can run out of space. Sets the length first, so that a length that
/// the storage cannot have fails before anything is written.
fn write_zeroes(target: &dyn Storage, start: u64, end: u64) -> Result<()> {
    if target.len()? < end {
        target.fit(end)?;
    }
    let zeroes = vec![0; BATCH as usize];
    let mut at = start;
    while at < end {
        let len = (end - at).min(BATCH);
        target.write_at(HostOffset::new(at), &zeroes[..len as usize])?;
        at += len;
    }
    Ok(())
}
