//! A new image: options that are checked together, then the layout.
//!
//! The rules run in QEMU's order, so that a request with several faults is refused for the same one.

use crate::error::{Error, ErrorKind, Result};
use qcow2_core::format::geometry::{Geometry, GeometryFields};
use qcow2_core::format::{CompressionType, Version, limit};
use qcow2_core::{
    BackingName, CreateOptions, DataFileName, HostOffset, NewEncryption, Preallocation, Storage, StorageError,
};
use std::fmt;
use std::sync::Arc;

/// What a new qcow2 image is to be, as it was asked for: any combination can be written down, and [`plan`]
/// says which are possible. Start from [`Qcow2Request::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Qcow2Request {
    /// Bytes of the disk; rounded up to a multiple of 512.
    pub size: u64,
    /// The version of the format.
    pub version: Version,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Bits in a refcount.
    pub refcount_bits: u64,
    /// Whether writers may postpone refcounts.
    pub lazy_refcounts: bool,
    /// Whether clusters have 32 subclusters.
    pub extended_l2: bool,
    /// How compressed clusters will be compressed.
    pub compression_type: CompressionType,
    /// How much is there from the start.
    pub preallocation: Preallocation,
    /// The backing file's name.
    pub backing_file: Option<String>,
    /// The backing file's format.
    pub backing_format: Option<String>,
    /// The external data file's name.
    pub data_file: Option<String>,
    /// Whether the data file is to be the guest disk byte for byte.
    pub data_file_raw: bool,
    /// Whether guest data is to be encrypted: what [`plan`] asks, before there is a header.
    pub encrypted: bool,
    /// How guest data is encrypted, with the encryption header.
    pub encryption: Option<NewEncryption>,
}

impl Qcow2Request {
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
            backing_file: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
            encrypted: false,
            encryption: None,
        }
    }
}

/// What a new raw image is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRequest {
    /// Bytes of the disk; rounded up to a multiple of 512.
    pub size: u64,
    /// How much is there from the start; a raw image has no metadata to preallocate.
    pub preallocation: Preallocation,
}

/// Options that are not possible, or not together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Extended L2 entries in a version 2 image.
    ExtendedL2NeedsVersion3,
    /// The cluster size is not a power of two from 512 to 2 MiB.
    ClusterSize(u64),
    /// Extended L2 entries with clusters below 16 KiB.
    ExtendedL2ClusterSize(u64),
    /// A backing file and preallocation without extended L2 entries.
    BackingAndPreallocation,
    /// A backing format without a backing file.
    BackingFormatWithoutFile,
    /// Lazy refcounts in a version 2 image.
    LazyRefcountsNeedVersion3,
    /// The refcount width is not a power of two up to 64.
    RefcountBits(u64),
    /// Another refcount width than 16 bits in a version 2 image.
    RefcountBitsNeedVersion3(u64),
    /// The data file is to be raw and there is none.
    DataFileRawWithoutFile,
    /// A backing file and a raw data file.
    BackingAndDataFileRaw,
    /// A data file in a version 2 image.
    DataFileNeedsVersion3,
    /// Another compression type than deflate in a version 2 image.
    CompressionTypeNeedsVersion3,
    /// The size needs a larger L1 table than the limit.
    SizeTooLarge(u64),
    /// Metadata preallocation of a raw image.
    RawMetadataPreallocation,
    /// Preallocation of an encrypted version 2 image, whose clusters would read as noise.
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
                f.write_str("a backing file and preallocation go together only with extended l2 entries")
            }
            Self::BackingFormatWithoutFile => f.write_str("backing format without a backing file"),
            Self::LazyRefcountsNeedVersion3 => f.write_str("lazy refcounts need version 3"),
            Self::RefcountBits(n) => write!(f, "refcount width is {n} bits, allowed are powers of two to 64"),
            Self::RefcountBitsNeedVersion3(n) => write!(f, "refcount width is {n} bits, version 2 allows 16"),
            Self::DataFileRawWithoutFile => f.write_str("raw data file without a data file"),
            Self::BackingAndDataFileRaw => {
                f.write_str("a backing file and a raw data file exclude each other")
            }
            Self::DataFileNeedsVersion3 => f.write_str("a data file needs version 3"),
            Self::CompressionTypeNeedsVersion3 => f.write_str("a compression type needs version 3"),
            Self::SizeTooLarge(n) => write!(f, "size {n} needs too large an l1 table; larger clusters help"),
            Self::RawMetadataPreallocation => f.write_str("a raw image has no metadata to preallocate"),
            Self::EncryptedPreallocationNeedsVersion3 => {
                f.write_str("preallocation of an encrypted image needs version 3")
            }
        }
    }
}

impl std::error::Error for Refusal {}

/// Checks the options of a qcow2 image together. Touches nothing. Errors: the first rule that is broken.
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

/// Checks the options of a raw image. Touches nothing.
pub fn plan_raw(request: &RawRequest) -> Result<(), Refusal> {
    match request.preallocation {
        Preallocation::Metadata => Err(Refusal::RawMetadataPreallocation),
        _ if request.size.checked_next_multiple_of(512).is_none_or(|size| size > limit::MAX_FILE_OFFSET) => {
            Err(Refusal::SizeTooLarge(request.size))
        }
        _ => Ok(()),
    }
}

/// Makes a qcow2 image. `storage`: empty; `data`: the empty external data file, needed where the request
/// names one. Disk: all tables, barrier, the header, barrier.
///
/// Errors: `InvalidOption` with a [`Refusal`] below, before anything is touched; `Create` with the engine's
/// error.
pub fn create(
    storage: &Arc<dyn Storage>,
    data: Option<&Arc<dyn Storage>>,
    request: &Qcow2Request,
) -> Result<()> {
    let options = plan(request).map_err(refused)?;
    let failed = |e| Error::new(ErrorKind::Create, "making the image").with_source(e);
    qcow2_core::create(storage, data, &options).map_err(failed)?;
    // The data file is as long as the disk from the start.
    match data.filter(|_| request.data_file.is_some()) {
        Some(data) => grow(data, request.size.next_multiple_of(512)).map_err(|e| failed(e.into())),
        None => Ok(()),
    }
}

/// Makes a raw image. `storage`: empty. Disk: sets the length, or reserves or writes zeroes, then a barrier.
///
/// Errors: `InvalidOption` with a [`Refusal`] below, before anything is touched; `Create` with the engine's
/// error.
pub fn create_raw(storage: &Arc<dyn Storage>, request: &RawRequest) -> Result<()> {
    plan_raw(request).map_err(refused)?;
    let size = request.size.next_multiple_of(512);
    let made = match request.preallocation {
        Preallocation::Falloc if size > 0 => storage.allocate(HostOffset::default(), size),
        Preallocation::Full => write_real_zeroes(&**storage, size),
        _ => storage.set_len(size),
    };
    made.and_then(|()| storage.flush()).map_err(|e| {
        Error::new(ErrorKind::Create, "making the image").with_source(qcow2_core::Error::from(e))
    })
}

/// Makes a LUKS container. `storage`: empty, unless it is a device; `request`: the whole container, header
/// included (a `size` of 0 leaves the length as it is); `area`: its header. Disk: the length, or reserves or
/// writes zeroes, a barrier, then the header and a barrier.
///
/// Errors: `InvalidOption` with a [`Refusal`] below, before anything is touched; `Create` with the engine's
/// error.
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
        Error::new(ErrorKind::Create, "making the container").with_source(qcow2_core::Error::from(e))
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

/// A file that cannot be so long is not filled first.
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

/// Bytes of zeroes written at once.
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
    fn one_fault_at_a_time() {
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
    fn the_largest_sizes() {
        let fits = |cluster_size, size| {
            refusal(|r| (r.cluster_size, r.size) = (cluster_size, size)) != Some(Refusal::SizeTooLarge(size))
        };
        assert!(fits(512, 128 << 30));
        assert!(!fits(512, (128 << 30) + 1));
        assert!(fits(65536, 2 << 50));
        assert!(!fits(65536, (2 << 50) + 512));
        assert!(!fits(2 << 20, u64::MAX));
    }

    /// Of two faults QEMU reports the one on the left.
    #[test]
    fn faults_in_order() {
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
            "the size comes last"
        );
    }
}
