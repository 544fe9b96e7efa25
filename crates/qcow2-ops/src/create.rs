//! Creates an image: checks the options together, then writes the layout.
//!
//! The checks run in QEMU's order, so that a request with several faults is refused for the same one.

use crate::error::{Error, ErrorKind, Result};
use qcow2_core::format::geometry::{Geometry, GeometryFields};
use qcow2_core::format::{CompressionType, Version, limit};
use qcow2_core::{
    BackingName, CreateOptions, DataFileName, HostOffset, NewEncryption, Preallocation, Storage, StorageError,
};
use std::fmt;
use std::sync::Arc;

/// The requested properties of a new qcow2 image. The fields are unchecked; [`plan`] reports invalid
/// combinations. Start from [`Qcow2Request::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Qcow2Request {
    /// Virtual size in bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// The format version.
    pub version: Version,
    /// Cluster size in bytes.
    pub cluster_size: u64,
    /// Refcount width in bits.
    pub refcount_bits: u64,
    /// Allow refcount updates to be postponed (lazy refcounts).
    pub lazy_refcounts: bool,
    /// Use extended L2 entries: 32 subclusters per cluster.
    pub extended_l2: bool,
    /// Algorithm of compressed clusters.
    pub compression_type: CompressionType,
    /// What to allocate up front.
    pub preallocation: Preallocation,
    /// Name of the backing file.
    pub backing_file: Option<String>,
    /// Format of the backing file.
    pub backing_format: Option<String>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// Declare the data file a raw copy of the guest disk.
    pub data_file_raw: bool,
    /// Guest data will be encrypted. Separate from `encryption`, so that [`plan`] can check before a header
    /// exists.
    pub encrypted: bool,
    /// Encryption method with the encryption header.
    pub encryption: Option<NewEncryption>,
}

impl Qcow2Request {
    /// A version 3 image of `size` bytes with 64 KiB clusters, 16-bit refcounts and no optional features.
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
            backing_file: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
            encrypted: false,
            encryption: None,
        }
    }
}

/// The requested properties of a new raw image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRequest {
    /// Size in bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// What to allocate up front; a raw image has no metadata to preallocate.
    pub preallocation: Preallocation,
}

/// Invalid options, or options that exclude each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Extended L2 entries need version 3.
    ExtendedL2NeedsVersion3,
    /// The cluster size is not a power of two from 512 to 2 MiB.
    ClusterSize(u64),
    /// Extended L2 entries need clusters of at least 16 KiB.
    ExtendedL2ClusterSize(u64),
    /// A backing file and preallocation can only be combined with extended L2 entries.
    BackingAndPreallocation,
    /// A backing format was given without a backing file.
    BackingFormatWithoutFile,
    /// Lazy refcounts need version 3.
    LazyRefcountsNeedVersion3,
    /// The refcount width is not a power of two up to 64.
    RefcountBits(u64),
    /// Version 2 only has 16-bit refcounts.
    RefcountBitsNeedVersion3(u64),
    /// A raw data file was requested without a data file.
    DataFileRawWithoutFile,
    /// A backing file and a raw data file exclude each other.
    BackingAndDataFileRaw,
    /// An external data file needs version 3.
    DataFileNeedsVersion3,
    /// Compression types other than deflate need version 3.
    CompressionTypeNeedsVersion3,
    /// The size needs an L1 table larger than the limit.
    SizeTooLarge(u64),
    /// A raw image has no metadata to preallocate.
    RawMetadataPreallocation,
    /// Preallocation of an encrypted image needs version 3; in version 2 its clusters would read as noise.
    EncryptedPreallocationNeedsVersion3,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExtendedL2NeedsVersion3 => f.write_str("extended l2 entries need version 3"),
            Self::ClusterSize(n) => {
                write!(f, "cluster size is {n}, allowed are powers of two from 512 to 2097152")
            }
            Self::ExtendedL2ClusterSize(n) => {
                write!(f, "cluster size is {n}, allowed is at least 16384 with extended l2 entries")
            }
            Self::BackingAndPreallocation => {
                f.write_str("a backing file and preallocation can only be combined with extended l2 entries")
            }
            Self::BackingFormatWithoutFile => f.write_str("backing format without a backing file"),
            Self::LazyRefcountsNeedVersion3 => f.write_str("lazy refcounts need version 3"),
            Self::RefcountBits(n) => {
                write!(f, "refcount width is {n} bits, allowed are powers of two up to 64")
            }
            Self::RefcountBitsNeedVersion3(n) => write!(f, "refcount width is {n} bits, version 2 allows 16"),
            Self::DataFileRawWithoutFile => f.write_str("raw data file without a data file"),
            Self::BackingAndDataFileRaw => {
                f.write_str("a backing file and a raw data file exclude each other")
            }
            Self::DataFileNeedsVersion3 => f.write_str("a data file needs version 3"),
            Self::CompressionTypeNeedsVersion3 => {
                f.write_str("compression types other than deflate need version 3")
            }
            Self::SizeTooLarge(n) => write!(f, "size {n} needs too large an l1 table; use larger clusters"),
            Self::RawMetadataPreallocation => f.write_str("a raw image has no metadata to preallocate"),
            Self::EncryptedPreallocationNeedsVersion3 => {
                f.write_str("preallocation of an encrypted image needs version 3")
            }
        }
    }
}

impl std::error::Error for Refusal {}

/// Checks the options of a qcow2 image together. No I/O. Errors: the first rule that is broken.
pub fn plan(request: &Qcow2Request) -> Result<CreateOptions, Refusal> {
    check_geometry(request)?;
    check_features(request)?;
    check_size(request)?;
    let mut options = CreateOptions::new(request.size);
    options.version = request.version;
    options.cluster_size = request.cluster_size;
    options.refcount_bits =
        u32::try_from(request.refcount_bits).map_err(|_| Refusal::RefcountBits(request.refcount_bits))?;
    options.lazy_refcounts = request.lazy_refcounts;
    options.extended_l2 = request.extended_l2;
    options.compression_type = request.compression_type;
    options.preallocation = request.preallocation;
    options.backing = request
        .backing_file
        .as_ref()
        .map(|name| BackingName { name: name.clone(), format: request.backing_format.clone() });
    options.encryption = request.encryption.clone();
    options.data_file = request
        .data_file
        .as_ref()
        .map(|name| DataFileName { name: name.clone(), raw: request.data_file_raw });
    Ok(options)
}

/// Checks the options of a raw image. No I/O.
pub fn plan_raw(request: &RawRequest) -> Result<(), Refusal> {
    match request.preallocation {
        Preallocation::Metadata => Err(Refusal::RawMetadataPreallocation),
        _ if request.size.checked_next_multiple_of(512).is_none_or(|size| size > limit::MAX_FILE_OFFSET) => {
            Err(Refusal::SizeTooLarge(request.size))
        }
        _ => Ok(()),
    }
}

/// Creates a qcow2 image. `storage`: empty. `data`: the empty external data file, required if the request
/// names one. Disk: all tables, barrier, the header, barrier.
///
/// Errors: `InvalidOption` with a [`Refusal`] as source, before anything is written; `Create` with the
/// engine's error.
pub fn create(
    storage: &Arc<dyn Storage>,
    data: Option<&Arc<dyn Storage>>,
    request: &Qcow2Request,
) -> Result<()> {
    let options = plan(request).map_err(refused)?;
    let failed = |e| Error::new(ErrorKind::Create, "creating the image").with_source(e);
    qcow2_core::create(storage, data, &options).map_err(failed)?;
    // The data file has the size of the disk from the start.
    match data.filter(|_| request.data_file.is_some()) {
        Some(data) => grow(data, request.size.next_multiple_of(512)).map_err(|e| failed(e.into())),
        None => Ok(()),
    }
}

/// Creates a raw image. `storage`: empty. Disk: sets the length, reserves space or writes zeroes, then a
/// barrier.
///
/// Errors: `InvalidOption` with a [`Refusal`] as source, before anything is written; `Create` with the
/// engine's error.
pub fn create_raw(storage: &Arc<dyn Storage>, request: &RawRequest) -> Result<()> {
    plan_raw(request).map_err(refused)?;
    let size = request.size.next_multiple_of(512);
    let made = match request.preallocation {
        Preallocation::Falloc if size > 0 => storage.allocate(HostOffset::default(), size),
        Preallocation::Full => write_real_zeroes(&**storage, size),
        _ => storage.set_len(size),
    };
    made.and_then(|()| storage.flush()).map_err(|e| {
        Error::new(ErrorKind::Create, "creating the image").with_source(qcow2_core::Error::from(e))
    })
}

/// Creates a LUKS container. `storage`: empty, unless it is a device. `request`: the whole container, header
/// included; a `size` of 0 keeps the current length. `area`: the header. Disk: sets the length, reserves
/// space or writes zeroes, barrier; then the header, barrier.
///
/// Errors: `InvalidOption` with a [`Refusal`] as source, before anything is written; `Create` with the
/// engine's error.
pub fn create_container(
    storage: &Arc<dyn Storage>,
    request: &RawRequest,
    area: &qcow2_core::LuksArea,
) -> Result<()> {
    if request.size > 0 {
        create_raw(storage, request)?;
    }
    let written = storage.write_at(HostOffset::default(), &area.0).and_then(|()| storage.flush());
    written.map_err(|e| {
        Error::new(ErrorKind::Create, "creating the container").with_source(qcow2_core::Error::from(e))
    })
}

fn check_geometry(request: &Qcow2Request) -> Result<(), Refusal> {
    let size = request.cluster_size;
    if request.extended_l2 && request.version < Version::V3 {
        return Err(Refusal::ExtendedL2NeedsVersion3);
    }
    let smallest = 1 << limit::MIN_CLUSTER_BITS;
    let largest = 1 << limit::MAX_CLUSTER_BITS;
    if !size.is_power_of_two() || !(smallest..=largest).contains(&size) {
        return Err(Refusal::ClusterSize(size));
    }
    if request.extended_l2 && size < 1 << limit::MIN_CLUSTER_BITS_EXTENDED {
        return Err(Refusal::ExtendedL2ClusterSize(size));
    }
    Ok(())
}

fn check_features(request: &Qcow2Request) -> Result<(), Refusal> {
    let (v2, bits) = (request.version < Version::V3, request.refcount_bits);
    let backed = request.backing_file.is_some();
    let broken = [
        (
            backed && request.preallocation != Preallocation::Off && !request.extended_l2,
            Refusal::BackingAndPreallocation,
        ),
        (!backed && request.backing_format.is_some(), Refusal::BackingFormatWithoutFile),
        (v2 && request.lazy_refcounts, Refusal::LazyRefcountsNeedVersion3),
        (!bits.is_power_of_two() || bits > 1 << limit::MAX_REFCOUNT_ORDER, Refusal::RefcountBits(bits)),
        (v2 && bits != 16, Refusal::RefcountBitsNeedVersion3(bits)),
        (request.data_file_raw && request.data_file.is_none(), Refusal::DataFileRawWithoutFile),
        (request.data_file_raw && backed, Refusal::BackingAndDataFileRaw),
        (v2 && request.data_file.is_some(), Refusal::DataFileNeedsVersion3),
        (
            v2 && request.encrypted && request.preallocation != Preallocation::Off,
            Refusal::EncryptedPreallocationNeedsVersion3,
        ),
        (v2 && request.compression_type != CompressionType::Deflate, Refusal::CompressionTypeNeedsVersion3),
    ];
    broken.into_iter().find(|(broken, _)| *broken).map_or(Ok(()), |(_, refusal)| Err(refusal))
}

fn check_size(request: &Qcow2Request) -> Result<(), Refusal> {
    let too_large = Refusal::SizeTooLarge(request.size);
    let fields = GeometryFields {
        cluster_bits: request.cluster_size.trailing_zeros(),
        refcount_order: request.refcount_bits.trailing_zeros(),
        extended_l2: request.extended_l2,
    };
    let geometry = Geometry::new(fields).map_err(|_| Refusal::ClusterSize(request.cluster_size))?;
    let size = request.size.checked_next_multiple_of(512).ok_or(too_large)?;
    match size > limit::MAX_FILE_OFFSET || geometry.l1_entries_for(size) > limit::MAX_L1_ENTRIES {
        true => Err(too_large),
        false => Ok(()),
    }
}

fn refused(refusal: Refusal) -> Error {
    Error::new(ErrorKind::InvalidOption, "options of the new image").with_source(refusal)
}

fn grow(storage: &Arc<dyn Storage>, size: u64) -> Result<(), StorageError> {
    if storage.len()? < size {
        storage.set_len(size)?;
        storage.flush()?;
    }
    Ok(())
}

/// Writes `size` zero bytes. Sets the length first, so that an impossible length fails before any data is
/// written.
fn write_real_zeroes(storage: &dyn Storage, size: u64) -> Result<(), StorageError> {
    storage.set_len(size)?;
    let zeroes = vec![0; usize::try_from(size.min(ZERO_PIECE)).unwrap_or(0)];
    let mut at = 0;
    while at < size {
        let piece = (size - at).min(ZERO_PIECE);
        storage.write_at(HostOffset::new(at), &zeroes[..usize::try_from(piece).unwrap_or(0)])?;
        at += piece;
    }
    Ok(())
}

/// Bytes of zeroes per write.
const ZERO_PIECE: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(change: impl FnOnce(&mut Qcow2Request)) -> Option<Refusal> {
        let mut request = Qcow2Request::new(1 << 20);
        change(&mut request);
        plan(&request).err()
    }

    #[test]
    fn each_fault_is_refused_alone() {
        use Refusal::*;
        let v2 = |r: &mut Qcow2Request| r.version = Version::V2;
        assert_eq!(refusal(|_| {}), None);
        assert_eq!(refusal(|r| (v2(r), r.extended_l2 = true).1), Some(ExtendedL2NeedsVersion3));
        for size in [0, 3, 256, 4 << 20, 1 << 32, (1 << 32) + 65536] {
            assert_eq!(refusal(|r| r.cluster_size = size), Some(ClusterSize(size)));
        }
        assert_eq!(
            refusal(|r| (r.extended_l2, r.cluster_size) = (true, 8192)),
            Some(ExtendedL2ClusterSize(8192))
        );
        assert_eq!(refusal(|r| r.backing_format = Some("raw".into())), Some(BackingFormatWithoutFile));
        for bits in [0, 3, 128, 1 << 32, u64::MAX] {
            assert_eq!(refusal(|r| r.refcount_bits = bits), Some(RefcountBits(bits)));
        }
        assert_eq!(refusal(|r| (v2(r), r.refcount_bits = 8).1), Some(RefcountBitsNeedVersion3(8)));
        assert_eq!(refusal(|r| r.data_file_raw = true), Some(DataFileRawWithoutFile));
        assert_eq!(refusal(|r| (v2(r), r.data_file = Some("d".into())).1), Some(DataFileNeedsVersion3));
        assert_eq!(
            refusal(|r| (v2(r), r.compression_type = CompressionType::Zstd).1),
            Some(CompressionTypeNeedsVersion3)
        );
        assert_eq!(refusal(|r| (v2(r), r.lazy_refcounts = true).1), Some(LazyRefcountsNeedVersion3));
    }

    #[test]
    fn size_limits() {
        let fits = |cluster_size, size| {
            refusal(|r| (r.cluster_size, r.size) = (cluster_size, size)) != Some(Refusal::SizeTooLarge(size))
        };
        assert!(fits(512, 128 << 30));
        assert!(!fits(512, (128 << 30) + 1));
        assert!(fits(65536, 2 << 50));
        assert!(!fits(65536, (2 << 50) + 512));
        assert!(!fits(2 << 20, u64::MAX));
    }

    /// Of two faults QEMU reports the left one.
    #[test]
    fn first_fault_is_the_one_qemu_reports() {
        use Refusal::*;
        let backed = |r: &mut Qcow2Request| {
            (r.backing_file, r.preallocation) = (Some("b".into()), Preallocation::Metadata);
        };
        assert_eq!(
            refusal(|r| (r.version, r.extended_l2, r.cluster_size) = (Version::V2, true, 3)),
            Some(ExtendedL2NeedsVersion3)
        );
        assert_eq!(refusal(|r| (backed(r), r.cluster_size = 3).1), Some(ClusterSize(3)));
        assert_eq!(refusal(|r| (backed(r), r.refcount_bits = 3).1), Some(BackingAndPreallocation));
        assert_eq!(
            refusal(|r| (r.backing_format, r.refcount_bits) = (Some("raw".into()), 3)),
            Some(BackingFormatWithoutFile)
        );
        assert_eq!(
            refusal(|r| (r.version, r.refcount_bits, r.lazy_refcounts) = (Version::V2, 8, true)),
            Some(LazyRefcountsNeedVersion3)
        );
        assert_eq!(refusal(|r| (r.refcount_bits, r.data_file_raw) = (3, true)), Some(RefcountBits(3)));
        assert_eq!(
            refusal(|r| {
                (r.version, r.data_file_raw) = (Version::V2, true);
                r.compression_type = CompressionType::Zstd;
            }),
            Some(DataFileRawWithoutFile)
        );
        assert_eq!(
            refusal(|r| {
                (r.version, r.data_file, r.data_file_raw) = (Version::V2, Some("d".into()), true);
                r.backing_file = Some("b".into());
            }),
            Some(BackingAndDataFileRaw)
        );
        assert_eq!(
            refusal(|r| (r.size, r.data_file_raw) = (64 << 50, true)),
            Some(DataFileRawWithoutFile),
            "the size is checked last"
        );
    }
}
