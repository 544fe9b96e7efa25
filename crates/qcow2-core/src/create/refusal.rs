//! The rules for the options of a new image.

use super::options::{CreateOptions, Preallocation, RawOptions};
use core::fmt;
use qcow2_format::geometry::{Geometry, GeometryFields};
use qcow2_format::header::CompressionType;
use qcow2_format::{Version, limit};

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
    /// The size needs an L1 table larger than the limit, or is larger than a file can be.
    SizeTooLarge(u64),
    /// A raw image has no metadata to preallocate.
    RawMetadataPreallocation,
    /// Preallocation of an encrypted image needs version 3; in version 2 its clusters would read as noise.
    EncryptedPreallocationNeedsVersion3,
    /// A block device has its space: none can be reserved on it.
    PreallocationOnDevice(Preallocation),
    /// Preallocated clusters need a refcount table larger than the limit.
    RefcountTableTooLarge {
        /// Clusters that the table would have.
        clusters: u64,
        /// Bytes of each.
        cluster_size: u64,
    },
    /// The encryption header has not been made.
    NoEncryptionHeader,
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
            Self::PreallocationOnDevice(mode) => {
                write!(f, "preallocation is {}, a block device allows off and metadata", mode.name())
            }
            Self::RefcountTableTooLarge { clusters, cluster_size } => {
                write!(f, "refcount table would need {clusters} clusters of {cluster_size} bytes")
            }
            Self::NoEncryptionHeader => f.write_str("the encryption header has not been made"),
        }
    }
}

impl core::error::Error for Refusal {}

/// The rules of a qcow2 image, in QEMU's order.
pub(super) fn check(options: &CreateOptions) -> Result<(), Refusal> {
    check_geometry(options)?;
    check_features(options)?;
    check_size(options)
}

/// The rules of a raw disk.
pub(super) fn check_raw(options: &RawOptions) -> Result<(), Refusal> {
    match options.preallocation {
        Preallocation::Metadata => Err(Refusal::RawMetadataPreallocation),
        _ if options.size.checked_next_multiple_of(512).is_none_or(|size| size > limit::MAX_FILE_OFFSET) => {
            Err(Refusal::SizeTooLarge(options.size))
        }
        _ => Ok(()),
    }
}

/// The rules of a LUKS container, header included.
pub(super) fn check_container(options: &RawOptions) -> Result<(), Refusal> {
    if options.preallocation != Preallocation::Metadata {
        check_raw(options)?;
    }
    match options.size > limit::MAX_DISK_SIZE {
        true => Err(Refusal::SizeTooLarge(options.size)),
        false => Ok(()),
    }
}

fn check_geometry(options: &CreateOptions) -> Result<(), Refusal> {
    let size = options.cluster_size;
    if options.extended_l2 && options.version < Version::V3 {
        return Err(Refusal::ExtendedL2NeedsVersion3);
    }
    let smallest = 1 << limit::MIN_CLUSTER_BITS;
    let largest = 1 << limit::MAX_CLUSTER_BITS;
    if !size.is_power_of_two() || !(smallest..=largest).contains(&size) {
        return Err(Refusal::ClusterSize(size));
    }
    if options.extended_l2 && size < 1 << limit::MIN_CLUSTER_BITS_EXTENDED {
        return Err(Refusal::ExtendedL2ClusterSize(size));
    }
    Ok(())
}

fn check_features(options: &CreateOptions) -> Result<(), Refusal> {
    let (v2, bits) = (options.version < Version::V3, options.refcount_bits);
    let backed = options.backing_file.is_some();
    let broken = [
        (
            backed && options.preallocation != Preallocation::Off && !options.extended_l2,
            Refusal::BackingAndPreallocation,
        ),
        (!backed && options.backing_format.is_some(), Refusal::BackingFormatWithoutFile),
        (v2 && options.lazy_refcounts, Refusal::LazyRefcountsNeedVersion3),
        (!bits.is_power_of_two() || bits > 1 << limit::MAX_REFCOUNT_ORDER, Refusal::RefcountBits(bits)),
        (v2 && bits != 16, Refusal::RefcountBitsNeedVersion3(bits)),
        (options.data_file_raw && options.data_file.is_none(), Refusal::DataFileRawWithoutFile),
        (options.data_file_raw && backed, Refusal::BackingAndDataFileRaw),
        (v2 && options.data_file.is_some(), Refusal::DataFileNeedsVersion3),
        (
            v2 && options.encryption.is_some() && options.preallocation != Preallocation::Off,
            Refusal::EncryptedPreallocationNeedsVersion3,
        ),
        (v2 && options.compression_type != CompressionType::Deflate, Refusal::CompressionTypeNeedsVersion3),
    ];
    broken.into_iter().find(|(broken, _)| *broken).map_or(Ok(()), |(_, refusal)| Err(refusal))
}

fn check_size(options: &CreateOptions) -> Result<(), Refusal> {
    let too_large = Refusal::SizeTooLarge(options.size);
    let fields = GeometryFields {
        cluster_bits: options.cluster_size.trailing_zeros(),
        refcount_order: options.refcount_bits.trailing_zeros(),
        extended_l2: options.extended_l2,
    };
    let geometry = Geometry::new(fields).map_err(|_| Refusal::ClusterSize(options.cluster_size))?;
    let size = options.size.checked_next_multiple_of(512).ok_or(too_large)?;
    match size > limit::MAX_FILE_OFFSET || geometry.l1_entries_for(size) > limit::MAX_L1_ENTRIES {
        true => Err(too_large),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(change: impl FnOnce(&mut CreateOptions)) -> Option<Refusal> {
        let mut options = CreateOptions::new(1 << 20);
        change(&mut options);
        options.check().err()
    }

    #[test]
    fn each_single_fault_is_refused() {
        use Refusal::*;
        let v2 = |r: &mut CreateOptions| r.version = Version::V2;
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

    #[test]
    fn raw_disks_and_containers() {
        let raw = |size, preallocation| RawOptions { size, preallocation };
        let (largest, gib) = (limit::MAX_FILE_OFFSET / 512 * 512, 1 << 30);
        assert_eq!(raw(largest, Preallocation::Full).check(), Ok(()));
        assert_eq!(raw(largest + 1, Preallocation::Off).check(), Err(Refusal::SizeTooLarge(largest + 1)));
        let metadata = raw(gib, Preallocation::Metadata);
        assert_eq!(metadata.check(), Err(Refusal::RawMetadataPreallocation));
        assert_eq!(metadata.check_container(), Ok(()), "the header is all the metadata there is");
        assert_eq!(raw(limit::MAX_DISK_SIZE, Preallocation::Off).check_container(), Ok(()));
        assert_eq!(raw(largest, Preallocation::Off).check_container(), Err(Refusal::SizeTooLarge(largest)));
    }

    /// With two faults the earlier rule of QEMU's order is reported.
    #[test]
    fn first_fault_is_the_one_qemu_reports() {
        use Refusal::*;
        let backed = |r: &mut CreateOptions| {
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
