//! What an image says of itself: header, features, snapshots, bitmaps, encryption.
//!
//! Reads the one storage it is given, never a file that the image names, and no guest data: safe on images
//! from anywhere. Spec: "Header", "Header extensions", "Snapshots", "Bitmaps".

use crate::error::{Error, ErrorKind, Result};
use qcow2_core::format::bitmap::Bitmap;
use qcow2_core::format::crypt::LuksHeader;
use qcow2_core::format::feature::{AutoclearFeatures, CompatibleFeatures, IncompatibleFeatures};
use qcow2_core::format::snapshot::Snapshot;
use qcow2_core::format::{CompressionType, CryptMethod, Header, HostOffset, Version};
use qcow2_core::{ImageFormat, Storage};

/// What was learned about one image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InfoReport {
    /// Bytes of the disk that the machine sees; of a raw image the length of its storage, to the byte.
    pub virtual_size: u64,
    /// Bytes of real space that the storage takes, where that is known.
    pub used_bytes: Option<u64>,
    /// Bytes in the storage.
    pub storage_len: u64,
    /// What only a qcow2 image has.
    pub qcow2: Option<Qcow2Info>,
    /// The header of a LUKS container.
    pub luks: Option<Box<LuksHeader>>,
}

/// What a qcow2 image says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Qcow2Info {
    /// The version of the format.
    pub version: Version,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// How compressed clusters are compressed.
    pub compression_type: CompressionType,
    /// Bits in a refcount.
    pub refcount_bits: u32,
    /// Whether refcount updates may be postponed.
    pub lazy_refcounts: bool,
    /// Whether it was not closed cleanly.
    pub dirty: bool,
    /// Whether it is marked as damaged.
    pub corrupt: bool,
    /// Whether clusters have subclusters.
    pub extended_l2: bool,
    /// The backing file it names.
    pub backing: Option<BackingName>,
    /// The external data file it names.
    pub data_file: Option<DataFileName>,
    /// How guest data is encrypted, if it is.
    pub encryption: Option<Encryption>,
    /// Internal snapshots, in the order of the table.
    pub snapshots: Vec<Snapshot>,
    /// Persistent bitmaps, in the order of the directory. Bitmaps that another program made stale are left
    /// out.
    pub bitmaps: Vec<Bitmap>,
}

/// The backing file that an image names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// As it stands in the image; any characters.
    pub name: String,
    /// The format recorded beside it.
    pub format: Option<String>,
}

/// The external data file that an image names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFileName {
    /// As it stands in the image; `None` where the name is missing.
    pub name: Option<String>,
    /// Whether the file is byte for byte the guest disk.
    pub raw: bool,
}

/// How guest data is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// The old method.
    Aes,
    /// LUKS, with what its header says.
    Luks(Box<LuksHeader>),
}

/// Learns about the image in `storage`, which is of `format`. Disk: reads header, snapshot table, bitmap
/// directory and encryption header.
///
/// Errors: `Open` for bytes that are no such image, with the engine's error below; `Metadata` for damaged
/// snapshot tables, bitmap directories or encryption headers; `Unsupported` for a format that is known by
/// name only.
pub fn info(storage: &dyn Storage, format: &ImageFormat) -> Result<InfoReport> {
    let failed = |e| opening("asking for the size of the image", qcow2_core::Error::from(e));
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
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("format {other:?} is known by name only"),
            ));
        }
    };
    let virtual_size = header.as_ref().map_or(storage_len, Header::disk_size);
    let qcow2 = header.map(|header| describe(storage, &header)).transpose()?;
    Ok(InfoReport { virtual_size, used_bytes, storage_len, qcow2, luks: None })
}

fn describe(storage: &dyn Storage, header: &Header) -> Result<Qcow2Info> {
    let extensions = &header.extensions;
    Ok(Qcow2Info {
        version: header.version,
        cluster_size: 1 << header.cluster_bits,
        compression_type: header.compression_type,
        refcount_bits: 1 << header.refcount_order,
        lazy_refcounts: header.compatible_features.contains(CompatibleFeatures::LAZY_REFCOUNTS),
        dirty: header.is_dirty(),
        corrupt: header.is_corrupt(),
        extended_l2: header.incompatible_features.contains(IncompatibleFeatures::EXTENDED_L2),
        backing: header
            .backing_file_name()
            .map(|name| BackingName { name, format: extensions.backing_format_name() }),
        data_file: header.has_data_file().then(|| DataFileName {
            name: extensions.data_file_name(),
            raw: header.autoclear_features.contains(AutoclearFeatures::RAW_DATA_FILE),
        }),
        encryption: read_encryption(storage, header)?,
        snapshots: read_snapshots(storage, header)?,
        bitmaps: read_bitmaps(storage, header)?,
    })
}

/// Reads and judges the header: the first cluster, at most 2 MiB.
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
    let bytes = read_up_to(storage, at, len)?;
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

fn read_bitmaps(storage: &dyn Storage, header: &Header) -> Result<Vec<Bitmap>> {
    let Some(extension) = header.trusted_bitmaps() else {
        return Ok(Vec::new());
    };
    let wanted = usize::try_from(extension.directory_size).unwrap_or(usize::MAX);
    let len = storage.len().map_err(|e| opening("asking for the size of the image", e.into()))?;
    let end = extension.directory_offset.checked_add(extension.directory_size);
    if end.is_none_or(|end| end.value() > len) {
        return Err(Error::new(ErrorKind::Metadata, "bitmap directory passes the end of the image"));
    }
    let directory = read_up_to(storage, extension.directory_offset, wanted)?;
    Bitmap::parse_directory(&directory, extension.count)
        .map_err(|e| Error::new(ErrorKind::Metadata, "bitmap directory is damaged").with_source(e))
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

/// Bytes of a LUKS header that say something.
const LUKS_READ: usize = 592;
