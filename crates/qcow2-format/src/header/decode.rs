//! Decodes a [`Header`]. The checks run in QEMU's order, so that an image with several faults is refused for
//! the same one.

use super::{CompressionType, CryptMethod, Header, MAGIC, Version};
use crate::bytes::{read_u32, read_u64};
use crate::error::{FormatError, FormatErrorKind, Table};
use crate::extension::Extensions;
use crate::feature::{AutoclearFeatures, CompatibleFeatures, FeatureWord, IncompatibleFeatures};
use crate::geometry::{Geometry, GeometryFields};
use crate::limit;
use crate::units::HostOffset;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

impl Header {
    /// Number of bytes [`probe_len`](Self::probe_len) needs.
    pub const PROBE_LEN: usize = 24;

    /// Number of bytes that [`parse`](Self::parse) needs from the start of the file: one cluster, at most 2
    /// MiB. `start`: at least the first 24 bytes of the file, or all of a shorter file.
    ///
    /// Errors: `NotQcow2`, `Version`, `ClusterBits`.
    pub fn probe_len(start: &[u8]) -> Result<usize, FormatError> {
        let fields = Fields { bytes: start };
        fields.version()?;
        Ok(1 << fields.cluster_bits()?)
    }

    /// Parses the header. `bytes`: the first cluster of the file (see [`probe_len`](Self::probe_len)), or all
    /// of a shorter file. Missing bytes count as zeroes, excess bytes are ignored.
    ///
    /// Makes all the checks that QEMU makes when it opens an image, except those of the dirty and corrupt
    /// bits and of the data file. Errors: one kind per fault, see [`FormatErrorKind`].
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        parse(bytes, Purpose::Use)
    }

    /// Like [`parse`](Self::parse), but accepts what a check must report instead: a missing refcount table,
    /// and a snapshot table with an invalid offset or length.
    pub fn parse_for_check(bytes: &[u8]) -> Result<Self, FormatError> {
        parse(bytes, Purpose::Check)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Use,
    Check,
}

fn parse(bytes: &[u8], purpose: Purpose) -> Result<Header, FormatError> {
    let cluster_size = Header::probe_len(bytes)?;
    let fields = Fields { bytes: bytes.get(..cluster_size).unwrap_or(bytes) };
    let version = fields.version()?;
    let header_len = fields.header_len(version, cluster_size)?;
    let backing_offset = fields.backing_offset(cluster_size)?;
    let area_end = if backing_offset == 0 { cluster_size } else { backing_offset };
    let area = fields.range(header_len, area_end);

    let mut header = Header::new(version, fields.cluster_bits()?);
    header.size = fields.u64(24);
    header.l1_size = fields.u32(36);
    header.l1_table_offset = HostOffset::new(fields.u64(40));
    header.refcount_table_offset = HostOffset::new(fields.u64(48));
    header.refcount_table_clusters = fields.u32(56);
    header.nb_snapshots = fields.u32(60);
    header.snapshots_offset = HostOffset::new(fields.u64(64));
    if version >= Version::V3 {
        header.features.incompatible = IncompatibleFeatures::from_bits(fields.u64(72));
        header.features.compatible = CompatibleFeatures::from_bits(fields.u64(80));
        header.features.autoclear = AutoclearFeatures::from_bits(fields.u64(88));
        header.refcount_order = fields.u32(96);
        header.unknown_fields = fields.range(limit::HEADER_LEN_V3, header_len);
        header.compression_type = fields.compression_type(header_len, header.features.incompatible)?;
    }
    check_incompatible(header.features.incompatible, &area)?;
    let geometry = header.geometry()?;
    check_refcount_table(&header, &geometry, purpose)?;
    if purpose == Purpose::Use {
        check_snapshot_table(&header, &geometry)?;
    }
    check_l1_table(&header, &geometry)?;
    header.crypt_method = fields.crypt_method()?;
    header.extensions = Extensions::parse(&area)?;
    check_extensions(&header, &geometry)?;
    header.backing_file = fields.backing_name(backing_offset, cluster_size)?;
    Ok(header)
}

/// The first cluster or a prefix of it; missing bytes read as zeroes.
struct Fields<'a> {
    bytes: &'a [u8],
}

impl Fields<'_> {
    /// The bytes `start..end` of the cluster, padded with zeroes. Empty if `end` is before `start`.
    fn range(&self, start: usize, end: usize) -> Vec<u8> {
        let len = end.saturating_sub(start);
        let there = self.bytes.get(start..).unwrap_or_default();
        let mut range = there.get(..len).unwrap_or(there).to_vec();
        range.resize(len, 0);
        range
    }

    fn u32(&self, at: usize) -> u32 {
        read_u32(self.bytes, at).or_else(|| read_u32(&self.range(at, at + 4), 0)).unwrap_or_default()
    }

    fn u64(&self, at: usize) -> u64 {
        read_u64(self.bytes, at).or_else(|| read_u64(&self.range(at, at + 8), 0)).unwrap_or_default()
    }

    fn version(&self) -> Result<Version, FormatError> {
        if self.range(0, 4) != MAGIC {
            return Err(FormatError::new(
                FormatErrorKind::NotQcow2,
                format!("magic is {:#010x}, allowed is {:#010x}", self.u32(0), u32::from_be_bytes(MAGIC)),
            ));
        }
        match self.u32(4) {
            2 => Ok(Version::V2),
            3 => Ok(Version::V3),
            n => Err(FormatError::new(
                FormatErrorKind::Version(n),
                format!("header: version is {n}, allowed are 2 and 3"),
            )),
        }
    }

    fn cluster_bits(&self) -> Result<u32, FormatError> {
        let fields = GeometryFields { cluster_bits: self.u32(20), refcount_order: 0, extended_l2: false };
        Geometry::new(fields).map(|geometry| geometry.cluster_bits())
    }

    fn header_len(&self, version: Version, cluster_size: usize) -> Result<usize, FormatError> {
        if version == Version::V2 {
            return Ok(limit::HEADER_LEN_V2);
        }
        let (len, min) = (self.u32(100), limit::MIN_HEADER_LEN_V3);
        let kind = match usize::try_from(len) {
            Ok(n) if n < min => FormatErrorKind::HeaderTooShort(len),
            Ok(n) if n <= cluster_size => return Ok(n),
            _ => FormatErrorKind::HeaderExceedsCluster(len),
        };
        let message = format!("header: header_length is {len}, allowed are {min} to {cluster_size}");
        Err(FormatError::new(kind, message))
    }

    fn backing_offset(&self, cluster_size: usize) -> Result<usize, FormatError> {
        let offset = self.u64(8);
        usize::try_from(offset).ok().filter(|&n| n <= cluster_size).ok_or_else(|| {
            FormatError::new(
                FormatErrorKind::BackingOffset(offset),
                format!("header: backing file name at {offset:#x}, allowed is up to {cluster_size:#x}"),
            )
        })
    }

    fn backing_name(&self, offset: usize, cluster_size: usize) -> Result<Option<Vec<u8>>, FormatError> {
        let len = self.u32(16);
        if offset == 0 || len == 0 {
            return Ok(None);
        }
        let max = (limit::MAX_BACKING_NAME as usize).min(cluster_size - offset);
        match usize::try_from(len) {
            Ok(n) if n <= max => Ok(Some(self.range(offset, offset + n))),
            _ => Err(FormatError::new(
                FormatErrorKind::BackingNameTooLong(len),
                format!("header: backing file name of {len} bytes at {offset:#x}, allowed are {max}"),
            )),
        }
    }

    fn compression_type(
        &self,
        header_len: usize,
        features: IncompatibleFeatures,
    ) -> Result<CompressionType, FormatError> {
        let byte = if header_len > 104 { self.range(104, 105)[0] } else { 0 };
        let bit = features.contains(IncompatibleFeatures::COMPRESSION_TYPE);
        let (kind, message) = match (byte, bit) {
            (0, false) => return Ok(CompressionType::Deflate),
            (1, true) => return Ok(CompressionType::Zstd),
            (0, true) => (FormatErrorKind::CompressionBitSet, "set, allowed is clear with deflate"),
            (1, false) => (FormatErrorKind::CompressionBitMissing, "clear, allowed is set with zstd"),
            (n, _) => {
                let message = format!("header: compression type is {n}, allowed are 0 and 1");
                return Err(FormatError::new(FormatErrorKind::CompressionType(n), message));
            }
        };
        Err(FormatError::new(kind, format!("header: compression type feature bit is {message}")))
    }

    fn crypt_method(&self) -> Result<CryptMethod, FormatError> {
        match self.u32(32) {
            0 => Ok(CryptMethod::None),
            1 => Ok(CryptMethod::Aes),
            2 => Ok(CryptMethod::Luks),
            n => Err(FormatError::new(
                FormatErrorKind::CryptMethod(n),
                format!("header: encryption method is {n}, allowed are 0 to 2"),
            )),
        }
    }
}

fn check_incompatible(features: IncompatibleFeatures, area: &[u8]) -> Result<(), FormatError> {
    let unknown = features.unknown().bits();
    if unknown == 0 {
        return Ok(());
    }
    let mut unnamed = unknown;
    let mut names: Vec<String> = Vec::new();
    for name in Extensions::feature_names(area) {
        let bit = 1u64.checked_shl(name.bit.into()).unwrap_or(0);
        if name.word == FeatureWord::Incompatible && unnamed & bit != 0 {
            unnamed &= !bit;
            names.push(name.name());
        }
    }
    Err(FormatError::new(
        FormatErrorKind::UnknownIncompatible { names, unnamed },
        format!("header: incompatible features {unknown:#x} are not known"),
    ))
}

fn check_refcount_table(header: &Header, geometry: &Geometry, purpose: Purpose) -> Result<(), FormatError> {
    let clusters = u64::from(header.refcount_table_clusters);
    if clusters == 0 && purpose == Purpose::Use {
        return Err(FormatError::new(
            FormatErrorKind::NoRefcountTable,
            "header: refcount table has 0 clusters, allowed is at least 1",
        ));
    }
    let place = TablePlace {
        table: Table::Refcount,
        offset: header.refcount_table_offset,
        entries: clusters.saturating_mul(geometry.cluster_size() / 8),
        entry_size: 8,
        max_size: limit::MAX_REFCOUNT_TABLE_SIZE,
    };
    place.check(geometry)
}

fn check_snapshot_table(header: &Header, geometry: &Geometry) -> Result<(), FormatError> {
    const ENTRY: u64 = 40; // an entry without its variable part
    let place = TablePlace {
        table: Table::Snapshots,
        offset: header.snapshots_offset,
        entries: header.nb_snapshots.into(),
        entry_size: ENTRY,
        max_size: ENTRY * u64::from(limit::MAX_SNAPSHOTS),
    };
    place.check(geometry)
}

fn check_l1_table(header: &Header, geometry: &Geometry) -> Result<(), FormatError> {
    let place = TablePlace {
        table: Table::ActiveL1,
        offset: header.l1_table_offset,
        entries: header.l1_size.into(),
        entry_size: 8,
        max_size: limit::MAX_L1_TABLE_SIZE,
    };
    place.check(geometry)?;
    let needed = geometry.l1_entries_for(header.size);
    if needed > limit::MAX_SIZE_L1_ENTRIES {
        return Err(FormatError::new(
            FormatErrorKind::ImageTooBig(header.size),
            format!("header: virtual size {} needs {needed} l1 entries", header.size),
        ));
    }
    if u64::from(header.l1_size) < needed {
        return Err(FormatError::new(
            FormatErrorKind::L1TooSmall { entries: header.l1_size, needed },
            format!("header: l1 table has {} entries, the virtual size needs {needed}", header.l1_size),
        ));
    }
    Ok(())
}

fn check_extensions(header: &Header, geometry: &Geometry) -> Result<(), FormatError> {
    match &header.extensions.luks {
        Some(_) if header.crypt_method != CryptMethod::Luks => {
            return Err(FormatError::new(
                FormatErrorKind::CryptoExtensionWithoutLuks,
                "header: luks pointer without luks encryption",
            ));
        }
        Some(luks) if !geometry.is_aligned(luks.offset.value()) => {
            let (offset, cluster_size) = (luks.offset.value(), geometry.cluster_size());
            return Err(FormatError::new(
                FormatErrorKind::CryptoOffset { offset, cluster_size },
                format!("header: luks area at {offset:#x} is not a multiple of {cluster_size}"),
            ));
        }
        _ => {}
    }
    if let Some(bitmaps) = header.trusted_bitmaps() {
        bitmaps.validate(geometry.cluster_size())?;
    }
    if header.crypt_method == CryptMethod::Luks && header.extensions.luks.is_none_or(|luks| luks.len == 0) {
        return Err(FormatError::new(
            FormatErrorKind::MissingCryptoHeader(CryptMethod::Luks as u32),
            "header: luks encryption without a luks header area",
        ));
    }
    Ok(())
}

/// Location and size of a table, as stored in the header.
struct TablePlace {
    table: Table,
    offset: HostOffset,
    entries: u64,
    entry_size: u64,
    max_size: u64,
}

impl TablePlace {
    fn check(&self, geometry: &Geometry) -> Result<(), FormatError> {
        let name = self.table.name();
        if self.entries > self.max_size / self.entry_size {
            return Err(FormatError::new(
                FormatErrorKind::TableTooLarge(self.table),
                format!(
                    "header: {name} has {} entries, allowed are {}",
                    self.entries,
                    self.max_size / self.entry_size
                ),
            ));
        }
        let end = self.offset.value().checked_add(self.entries * self.entry_size);
        if end.is_none_or(|end| end > limit::MAX_FILE_OFFSET) || !geometry.is_aligned(self.offset.value()) {
            return Err(FormatError::new(
                FormatErrorKind::TableOffset(self.table),
                format!(
                    "header: {name} at {} is not a multiple of {} or ends past 2^63 - 1",
                    self.offset,
                    geometry.cluster_size()
                ),
            ));
        }
        Ok(())
    }
}
