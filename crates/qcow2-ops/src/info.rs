//! Describes an image: header, features, snapshots, bitmaps, encryption.
//!
//! Reads only the given storage: no files that the image names, and no guest data. So it is safe on untrusted
//! images. Spec: "Header", "Header extensions", "Snapshots", "Bitmaps".

mod bitmaps;

pub use bitmaps::{BitmapDamage, BitmapFault, MAX_BITMAP_TABLES};

use crate::error::{Error, ErrorKind, Result};
use qcow2_core::format::bitmap::Bitmap;
use qcow2_core::format::crypt::LuksHeader;
use qcow2_core::format::feature::{AutoclearFeatures, CompatibleFeatures, IncompatibleFeatures};
use qcow2_core::format::snapshot::Snapshot;
use qcow2_core::format::{CompressionType, CryptMethod, Header, HostOffset, Version};
use qcow2_core::{ImageFormat, Storage, StorageError, forward_storage};

/// Properties of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InfoReport {
    /// Virtual size in bytes. For a raw image the exact length of its storage.
    pub virtual_size: u64,
    /// Disk space used by the storage in bytes, if known.
    pub used_bytes: Option<u64>,
    /// Length of the storage in bytes.
    pub storage_len: u64,
    /// Properties of a qcow2 image; `None` for other formats.
    pub qcow2: Option<Qcow2Info>,
    /// The header of a LUKS container; `None` for other formats.
    pub luks: Option<Box<LuksHeader>>,
}

/// Properties of a qcow2 image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Qcow2Info {
    /// The format version.
    pub version: Version,
    /// Cluster size in bytes.
    pub cluster_size: u64,
    /// Algorithm of compressed clusters.
    pub compression_type: CompressionType,
    /// Refcount width in bits.
    pub refcount_bits: u32,
    /// True if refcount updates may be postponed.
    pub lazy_refcounts: bool,
    /// True if the image was not closed cleanly.
    pub dirty: bool,
    /// True if the image is marked corrupt.
    pub corrupt: bool,
    /// True if the image has extended L2 entries (subclusters).
    pub extended_l2: bool,
    /// The backing file named in the header.
    pub backing: Option<BackingName>,
    /// The external data file named in the header.
    pub data_file: Option<DataFileName>,
    /// Encryption method, if guest data is encrypted.
    pub encryption: Option<Encryption>,
    /// Internal snapshots, in table order.
    pub snapshots: Vec<Snapshot>,
    /// Persistent bitmaps, in directory order. Empty if another program has made the bitmaps extension stale.
    pub bitmaps: Vec<Bitmap>,
    /// What is wrong with them, in the order in which QEMU comes upon it. It opens no such image.
    pub bitmap_damage: Vec<BitmapDamage>,
}

/// The name of a backing file, as stored in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// The name as stored; may contain any characters.
    pub name: String,
    /// The format recorded with it.
    pub format: Option<String>,
}

/// The name of an external data file, as stored in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFileName {
    /// The name as stored; `None` if the image has a data file but no name for it.
    pub name: Option<String>,
    /// True if the file is a raw copy of the guest disk.
    pub raw: bool,
}

/// Encryption method of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// The legacy AES method.
    Aes,
    /// LUKS, with its header.
    Luks(Box<LuksHeader>),
}

/// Describes the image in `storage`, which has the given `format`. Disk: reads the header, the snapshot
/// table, the bitmap directory, the tables of bitmaps and the encryption header.
///
/// Errors: `Open` if the bytes are not such an image, with the engine's error as source; `Metadata` for
/// damaged snapshot tables or encryption headers; `Unsupported` for a format that is not implemented. Damaged
/// bitmaps are no error: the report tells of them.
pub fn info(storage: &dyn Storage, format: &ImageFormat) -> Result<InfoReport> {
    let failed = |e| opening("reading the size of the image", qcow2_core::Error::from(e));
    let storage_len = storage.len().map_err(failed)?;
    let used_bytes = storage.used_bytes().map_err(failed)?;
    let header = match format {
        ImageFormat::Raw => None,
        ImageFormat::Luks => {
            let luks = Box::new(read_luks(storage, HostOffset::default(), LUKS_READ)?);
            let virtual_size = storage_len.saturating_sub(u64::from(luks.payload_offset_sectors) * 512);
            return Ok(InfoReport { virtual_size, used_bytes, storage_len, qcow2: None, luks: Some(luks) });
        }
        ImageFormat::Qcow2 => Some(read_header(storage)?),
        other => {
            return Err(Error::new(ErrorKind::Unsupported, format!("format {other:?} is not supported")));
        }
    };
    let virtual_size = header.as_ref().map_or(storage_len, Header::disk_size);
    let qcow2 = header.map(|header| describe(storage, &header)).transpose()?;
    Ok(InfoReport { virtual_size, used_bytes, storage_len, qcow2, luks: None })
}

/// The same with zeroes for all bytes past the end of the storage, as QEMU reads them: a snapshot table there
/// shows snapshots without a name.
pub fn info_past_end(storage: &dyn Storage, format: &ImageFormat) -> Result<InfoReport> {
    info(&Endless { inner: storage }, format)
}

/// A storage behind whose end zeroes are read.
struct Endless<'a> {
    inner: &'a dyn Storage,
}

impl Storage for Endless<'_> {
    forward_storage!(inner: len write_at write_zeroes discard allocate set_len flush extent_at limits used_bytes);

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        self.inner.read_padded(offset, buf)?;
        Ok(buf.len())
    }
}

fn describe(storage: &dyn Storage, header: &Header) -> Result<Qcow2Info> {
    let extensions = &header.extensions;
    let (bitmaps, bitmap_damage) = bitmaps::read(storage, header)?;
    Ok(Qcow2Info {
        version: header.version,
        cluster_size: 1 << header.cluster_bits,
        compression_type: header.compression_type,
        refcount_bits: 1 << header.refcount_order,
        lazy_refcounts: header.features.compatible.contains(CompatibleFeatures::LAZY_REFCOUNTS),
        dirty: header.is_dirty(),
        corrupt: header.is_corrupt(),
        extended_l2: header.features.incompatible.contains(IncompatibleFeatures::EXTENDED_L2),
        backing: header
            .backing_file_name()
            .map(|name| BackingName { name, format: extensions.backing_format_name() }),
        data_file: header.has_data_file().then(|| DataFileName {
            name: extensions.data_file_name(),
            raw: header.features.autoclear.contains(AutoclearFeatures::RAW_DATA_FILE),
        }),
        encryption: read_encryption(storage, header)?,
        snapshots: read_snapshots(storage, header)?,
        bitmaps,
        bitmap_damage,
    })
}

/// Reads and parses the header: the first cluster, at most 2 MiB.
fn read_header(storage: &dyn Storage) -> Result<Header> {
    let judge = |e| {
        let kind = qcow2_core::ErrorKind::Format;
        opening("opening the image", qcow2_core::Error::new(kind, "not a usable qcow2 image").with_source(e))
    };
    let start = read_up_to(storage, HostOffset::default(), Header::PROBE_LEN)?;
    let wanted = Header::probe_len(&start).map_err(judge)?;
    let bytes = read_up_to(storage, HostOffset::default(), wanted)?;
    Header::parse(&bytes).map_err(judge)
}

fn read_encryption(storage: &dyn Storage, header: &Header) -> Result<Option<Encryption>> {
    let luks = match (header.crypt_method, header.extensions.luks) {
        (CryptMethod::None, _) => return Ok(None),
        (CryptMethod::Aes, _) => return Ok(Some(Encryption::Aes)),
        (_, None) => return Err(Error::new(ErrorKind::Metadata, "image has no encryption header")),
        (_, Some(luks)) => luks,
    };
    let wanted = usize::try_from(luks.len).unwrap_or(usize::MAX).min(LUKS_READ);
    Ok(Some(Encryption::Luks(Box::new(read_luks(storage, luks.offset, wanted)?))))
}

fn read_luks(storage: &dyn Storage, at: HostOffset, len: usize) -> Result<LuksHeader> {
    let mut bytes = read_up_to(storage, at, len)?;
    // What is too short for a header is none, not a damaged one.
    bytes.resize(len, 0);
    LuksHeader::parse(&bytes)
        .map_err(|e| Error::new(ErrorKind::Metadata, "encryption header is damaged").with_source(e))
}

fn read_snapshots(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    qcow2_core::snapshot::read_snapshots(storage, header).map_err(|error| match error.format_error() {
        Some(cause) => Error::new(ErrorKind::Metadata, error.to_string()).with_source(cause.clone()),
        None if error.storage_error().is_none() => Error::new(ErrorKind::Metadata, error.to_string()),
        None => opening("reading the snapshot table", error),
    })
}

/// At most `len` bytes from `offset`; fewer at the end of the storage.
fn read_up_to(storage: &dyn Storage, offset: HostOffset, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let n = storage
        .read_at(offset, &mut bytes)
        .map_err(|e| opening(&format!("reading {len} bytes at {offset}"), e.into()))?;
    bytes.truncate(n);
    Ok(bytes)
}

fn opening(step: &str, error: qcow2_core::Error) -> Error {
    Error::new(ErrorKind::Open, step).with_source(error)
}

/// Length of a LUKS header in bytes, without the key material.
const LUKS_READ: usize = 592;
