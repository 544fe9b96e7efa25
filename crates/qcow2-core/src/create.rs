//! The layout of a new empty image.
//!
//! Clusters in order: header, refcount table, refcount blocks, L1 table, then (preallocated) L2 tables and
//! data. Order on disk: everything else first, barrier, the header, barrier: an image that opens is whole.

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::invariant;
use crate::open::OpenOptions;
use crate::port::resolver::ResolvedSource;
use crate::port::storage::Storage;
use ::alloc::format;
use ::alloc::string::String;
use ::alloc::sync::Arc;
use ::alloc::vec;
use ::alloc::vec::Vec;
use core::fmt;
use qcow2_format::bytes::push_words;
use qcow2_format::feature::{AutoclearFeatures, CompatibleFeatures, FeatureName, IncompatibleFeatures};
use qcow2_format::header::{CompressionType, CryptMethod};
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::{ClusterEntry, L2Entry, L2Format};
use qcow2_format::limit::{MAX_L1_TABLE_SIZE, MAX_REFCOUNT_TABLE_SIZE};
use qcow2_format::refcount::encode_table_entry;
use qcow2_format::{Geometry, Header, HostOffset, LuksPointer, Version};

/// Bytes of a table that are written at a time.
const BATCH: u64 = 1 << 20;

/// How much of a new image is there from the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: clusters are allocated as they are written.
    #[default]
    Off,
    /// All tables; the data area is a hole.
    Metadata,
    /// All tables; space for the data area is reserved.
    Falloc,
    /// All tables; the data area is written with zeroes.
    Full,
}

/// The backing file that a new image stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// Its name as it is to be recorded, at most 1023 bytes.
    pub name: String,
    /// Its format as it is to be recorded, at most 15 bytes; `None` leaves later readers to guess, which is
    /// unsafe.
    pub format: Option<String>,
}

/// The external data file of a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFileName {
    /// Its name as it is to be recorded.
    pub name: String,
    /// Whether the data file is to be the guest disk byte for byte; excludes a backing file.
    pub raw: bool,
}

/// How the guest data of a new image is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewEncryption {
    /// By the old AES method, which records nothing but its name.
    Aes,
    /// By LUKS.
    Luks(LuksArea),
}

/// The encryption header of a new image: everything from the LUKS header to the last key slot, as it will be
/// stored.
#[derive(Clone, PartialEq, Eq)]
pub struct LuksArea(pub Arc<[u8]>);

impl fmt::Debug for LuksArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LuksArea({} bytes)", self.0.len())
    }
}

/// What a new image is to be. Start from [`CreateOptions::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CreateOptions {
    /// Bytes of the disk; rounded up to a multiple of 512.
    pub size: u64,
    /// The version of the format; features need version 3.
    pub version: Version,
    /// Bytes in a cluster: a power of two from 512 to 2 MiB, from 16 KiB with extended L2 entries.
    pub cluster_size: u64,
    /// Bits in a refcount: a power of two from 1 to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Whether writers may postpone refcounts.
    pub lazy_refcounts: bool,
    /// Whether clusters have 32 subclusters.
    pub extended_l2: bool,
    /// How compressed clusters will be compressed.
    pub compression_type: CompressionType,
    /// How much is there from the start.
    pub preallocation: Preallocation,
    /// The backing file, if any.
    pub backing: Option<BackingName>,
    /// The external data file, if any.
    pub data_file: Option<DataFileName>,
    /// How guest data is encrypted, if it is.
    pub encryption: Option<NewEncryption>,
}

impl CreateOptions {
    /// A version 3 image of `size` bytes with 64 KiB clusters, 16-bit refcounts and nothing optional.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: Version::V3,
            cluster_size: 64 << 10,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            compression_type: CompressionType::Deflate,
            preallocation: Preallocation::Off,
            backing: None,
            data_file: None,
            encryption: None,
        }
    }
}

impl Image {
    /// Makes a new image in `source`, whose storage is empty, and opens it as `options` say, for writing in
    /// any case. Disk: as [`create`]. Errors: `InvalidOption` for an external data file, whose storage
    /// [`create`] takes; otherwise as [`create`] and [`open`](Self::open).
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
        if new.data_file.is_some() {
            return Err(option_error("an image with an external data file is made from two storages"));
        }
        create(&source.storage, None, new)?;
        Self::open(source, &OpenOptions { writable: true, ..options.clone() })
    }
}

/// Where everything goes; offsets and lengths in clusters.
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

/// Writes a new image. `storage`: empty; `data`: the external data file's storage, needed with preallocation
/// on it. Disk: the length, all tables, barrier, the header, barrier; what the storage held before is not
/// looked at.
///
/// Errors: `InvalidOption` for a combination that the format does not allow, `NoSpace`, `Storage`.
pub fn create(
    storage: &Arc<dyn Storage>,
    data: Option<&Arc<dyn Storage>>,
    options: &CreateOptions,
) -> Result<()> {
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
    let first = header.encode().map_err(invalid)?;
    make_room(&**storage, &header)?;
    write_refcounts(&**storage, &geometry, &layout)?;
    if let Some(NewEncryption::Luks(area)) = &options.encryption {
        storage.write_at(at(layout.luks_start()), &area.0)?;
    }
    write_mapping(&**storage, &format, &layout, options)?;
    preallocate_data(&**storage, data, &geometry, &layout, options)?;
    if let Some(data) = data {
        data.flush()?;
    }
    storage.flush()?;
    storage.write_at(HostOffset::new(0), &first)?;
    storage.flush()?;
    Ok(())
}

fn invalid(error: qcow2_format::FormatError) -> Error {
    Error::new(ErrorKind::InvalidOption, "image cannot be made").with_source(error)
}

fn option_error(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOption, message)
}

fn header_for(options: &CreateOptions) -> Result<Header> {
    if !options.cluster_size.is_power_of_two() {
        return Err(option_error(format!(
            "cluster size is {}, allowed are powers of two",
            options.cluster_size
        )));
    }
    if !options.refcount_bits.is_power_of_two() || options.refcount_bits > 64 {
        let message =
            format!("refcount width is {} bits, allowed are powers of two to 64", options.refcount_bits);
        return Err(option_error(message));
    }
    let size = options.size.checked_next_multiple_of(512).filter(|&s| s <= i64::MAX as u64);
    let mut header = Header::new(options.version, options.cluster_size.trailing_zeros());
    header.size = size.ok_or_else(|| option_error(format!("size {} is past 2^63 - 1", options.size)))?;
    header.refcount_order = options.refcount_bits.trailing_zeros();
    header.compression_type = options.compression_type;
    let zstd = options.compression_type == CompressionType::Zstd;
    header.features.incompatible.set(IncompatibleFeatures::COMPRESSION_TYPE, zstd);
    header.features.incompatible.set(IncompatibleFeatures::EXTENDED_L2, options.extended_l2);
    header.features.incompatible.set(IncompatibleFeatures::DATA_FILE, options.data_file.is_some());
    header.features.compatible.set(CompatibleFeatures::LAZY_REFCOUNTS, options.lazy_refcounts);
    if let Some(data) = &options.data_file {
        if data.raw && options.backing.is_some() {
            return Err(option_error("a raw data file and a backing file exclude each other"));
        }
        header.features.autoclear.set(AutoclearFeatures::RAW_DATA_FILE, data.raw);
        header.extensions.data_file = Some(data.name.clone().into_bytes());
    }
    header.crypt_method = match &options.encryption {
        None => CryptMethod::None,
        Some(NewEncryption::Aes) => CryptMethod::Aes,
        Some(NewEncryption::Luks(_)) => CryptMethod::Luks,
    };
    if options.encryption.is_some() && options.version < Version::V3 && preallocates(options) {
        return Err(option_error(
            "preallocated clusters of an encrypted version 2 image would read as noise",
        ));
    }
    if let Some(backing) = &options.backing {
        if options.preallocation != Preallocation::Off && !options.extended_l2 {
            return Err(option_error("a backing file and preallocation need extended l2 entries"));
        }
        header.backing_file = Some(backing.name.clone().into_bytes());
        header.extensions.backing_format = backing.format.clone().map(String::into_bytes);
    }
    if options.version >= Version::V3 && options.cluster_size > 4096 {
        header.extensions.feature_names = Some(FeatureName::standard());
    }
    Ok(header)
}

fn preallocates(options: &CreateOptions) -> bool {
    options.preallocation != Preallocation::Off || options.data_file.as_ref().is_some_and(|data| data.raw)
}

fn plan_layout(geometry: &Geometry, options: &CreateOptions) -> Result<Layout> {
    let size = options.size.next_multiple_of(512);
    let (cluster_size, per_block) = (geometry.cluster_size(), geometry.refcount_block_entries());
    let l1_entries = geometry.l1_entries_for(size);
    if l1_entries * 8 > MAX_L1_TABLE_SIZE {
        let message =
            format!("size {size} needs {l1_entries} l1 entries, allowed are {}", MAX_L1_TABLE_SIZE / 8);
        return Err(option_error(message));
    }
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
    loop {
        let blocks = layout.end().div_ceil(per_block);
        let table = geometry.clusters_for(blocks * 8);
        if (blocks, table) == (layout.blocks, layout.table) {
            break;
        }
        (layout.blocks, layout.table) = (blocks.max(layout.blocks), table.max(layout.table));
    }
    invariant::all_counted(layout.blocks, per_block, layout.end());
    assert!(layout.table * cluster_size / 8 >= layout.blocks, "a block that no table entry leads to");
    if layout.table * cluster_size > MAX_REFCOUNT_TABLE_SIZE.max(cluster_size) {
        let message = format!("refcount table would need {} clusters of {cluster_size} bytes", layout.table);
        return Err(option_error(message));
    }
    Ok(layout)
}

/// Makes the storage as long as its tables before anything is written: file systems that reserve space ahead
/// of a file that grows by its writes (XFS, as much again as the file has) give it back only once while the
/// file is in memory, and that once is wanted for the data that comes later.
fn make_room(storage: &dyn Storage, header: &Header) -> Result<()> {
    let end = header.l1_table_offset.value() + u64::from(header.l1_size) * 8;
    if storage.limits().growable && storage.len()? < end {
        storage.set_len(end)?;
    }
    Ok(())
}

/// The refcount table, and blocks in which every cluster of the layout counts one.
fn write_refcounts(storage: &dyn Storage, geometry: &Geometry, layout: &Layout) -> Result<()> {
    let size = geometry.cluster_size();
    let block = |i: u64| HostOffset::new((layout.blocks_start() + i) * size);
    let table_at = HostOffset::new(layout.table_start() * size);
    write_words(storage, table_at, layout.table * size / 8, |i| {
        encode_table_entry((i < layout.blocks).then(|| block(i)))
    })?;
    let width = geometry.refcount_width();
    let per_word = u64::from(64 / width.bits());
    let ones = (0..per_word).fold(0, |word, slot| width.insert(word, slot, 1));
    let used = layout.end();
    write_words(storage, block(0), layout.blocks * size / 8, |i| {
        let (first, end) = (i * per_word, (i + 1) * per_word);
        if end <= used {
            ones
        } else {
            (first..used.max(first)).fold(0, |word, slot| width.insert(word, slot - first, 1))
        }
    })
}

/// The L1 table and, preallocated, the L2 tables.
fn write_mapping(
    storage: &dyn Storage,
    format: &L2Format,
    layout: &Layout,
    options: &CreateOptions,
) -> Result<()> {
    let size = format.geometry.cluster_size();
    let l1_at = HostOffset::new(layout.l1_start() * size);
    let table = |i: u64| HostOffset::new((layout.l2_start() + i) * size);
    write_words(storage, l1_at, layout.l1_entries, |i| {
        let entry = L1Entry { l2_table: Some(table(i)), copied: true };
        if i < layout.l2_tables { entry.encode() } else { 0 }
    })?;
    if layout.l2_tables == 0 {
        return Ok(());
    }
    let guest = format.geometry.clusters_for(options.size.next_multiple_of(512));
    let first = if options.data_file.is_some() { 0 } else { layout.data_start() };
    // Unwritten clusters of an encrypted image would read as noise: they are marked as zeroes that have a
    // place.
    let (allocated, zero) = match &options.encryption {
        _ if options.extended_l2 => (0, 0),
        Some(_) => (0, 1),
        None => (1, 0),
    };
    let words_per_entry = format.geometry.l2_entry_size() / 8;
    write_words(storage, table(0), layout.l2_tables * size / 8, |i| {
        let cluster = i / words_per_entry;
        if cluster >= guest || i % words_per_entry != 0 {
            return 0;
        }
        let host = Some(HostOffset::new((first + cluster) * size));
        let entry = L2Entry::Standard(ClusterEntry { host, copied: true, allocated, zero });
        format.encode(&entry).map_or(0, |(raw, _)| raw)
    })
}

fn preallocate_data(
    storage: &dyn Storage,
    data: Option<&Arc<dyn Storage>>,
    geometry: &Geometry,
    layout: &Layout,
    options: &CreateOptions,
) -> Result<()> {
    let size = options.size.next_multiple_of(512);
    let (target, start, end) = match (&options.data_file, data) {
        (Some(_), Some(data)) => (&**data, 0, size),
        (Some(_), None) => return Ok(()),
        (None, _) => {
            (storage, layout.data_start() * geometry.cluster_size(), layout.end() * geometry.cluster_size())
        }
    };
    if layout.data == 0 && options.data_file.is_none() {
        return Ok(());
    }
    match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => target.set_len(end)?,
        Preallocation::Falloc => target.allocate(HostOffset::new(start), end - start)?,
        Preallocation::Full => write_zeroes(target, start, end)?,
    }
    Ok(())
}

/// Real zeroes, so that no later write can run out of room. A file that cannot be so long is not filled
/// first.
fn write_zeroes(target: &dyn Storage, start: u64, end: u64) -> Result<()> {
    if target.limits().growable && target.len()? < end {
        target.set_len(end)?;
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

/// Writes `count` big-endian words, `word(i)` giving the `i`-th, in large pieces.
fn write_words(storage: &dyn Storage, at: HostOffset, count: u64, word: impl Fn(u64) -> u64) -> Result<()> {
    let mut bytes: Vec<u8> = Vec::with_capacity((count * 8).min(BATCH) as usize);
    let mut done = 0;
    for i in 0..count {
        push_words(&mut bytes, [word(i)]);
        if bytes.len() as u64 == BATCH || i + 1 == count {
            storage.write_at(HostOffset::new(at.value() + done), &bytes)?;
            done += bytes.len() as u64;
            bytes.clear();
        }
    }
    Ok(())
}
