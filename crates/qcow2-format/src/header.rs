//! The image header, both versions. Spec: "Header", "Version 3 additional fields".
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic, `QFI` and 0xfb |
//! | 4 | 4 | version, 2 or 3 |
//! | 8, 16 | 8, 4 | backing file name: offset, length |
//! | 20 | 4 | `cluster_bits` |
//! | 24 | 8 | virtual size in bytes |
//! | 32 | 4 | encryption method |
//! | 36, 40 | 4, 8 | L1 table: entries, offset |
//! | 48, 56 | 8, 4 | refcount table: offset, clusters |
//! | 60, 64 | 4, 8 | snapshot table: entries, offset |
//! | 72, 80, 88 | 8 each | version 3: incompatible, compatible, autoclear features |
//! | 96 | 4 | version 3: log2 of the refcount width in bits |
//! | 100 | 4 | version 3: header length in bytes |
//! | 104 | 1 | compression type, if the header is longer than 104 bytes |
//! | 105 | 7 | zeroes |
//!
//! Unknown fields of later versions follow (kept byte for byte), then the extensions and the backing file
//! name. All of it lies inside the first cluster.

use crate::error::{FormatError, FormatErrorKind};
use crate::extension::Extensions;
use crate::feature::{AutoclearFeatures, Features, IncompatibleFeatures};
use crate::geometry::{Geometry, GeometryFields};
use crate::l2::L2Format;
use crate::limit;
use crate::units::HostOffset;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
// The byte offsets of the fields are repeated in `decode`, `edit` and `patch`; the table above is the
// reference.
pub use patch::{HeaderField, SECTOR_LEN};

mod decode;
pub mod edit;
mod patch;

/// The magic number: the first four bytes of an image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// The format version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// Version 2: no feature words, no zero flag, 16-bit refcounts. QEMU's `compat=0.10`.
    V2,
    /// Version 3. QEMU's `compat=1.1`.
    V3,
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CryptMethod {
    /// Not encrypted.
    None,
    /// AES-CBC with the password itself as the key; obsolete.
    Aes,
    /// LUKS. An extension points to its header.
    Luks,
}

/// Algorithm of compressed clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate; QEMU calls it "zlib".
    Deflate,
    /// Zstandard.
    Zstd,
}

/// The parsed header. Every field is public and unchecked; [`encode`](Self::encode) and
/// [`geometry`](Self::geometry) report invalid combinations.
///
/// ```
/// use qcow2_format::{Header, HostOffset, Version};
///
/// let mut header = Header::new(Version::V3, 16);
/// header.size = 1 << 30;
/// header.l1_size = 2;
/// header.l1_table_offset = HostOffset::new(0x30000);
/// header.refcount_table_offset = HostOffset::new(0x10000);
/// header.refcount_table_clusters = 1;
/// let bytes = header.encode()?;
/// assert_eq!(bytes.len(), 120); // the fields and an end marker
///
/// assert_eq!(Header::probe_len(&bytes)?, 65536);
/// let read = Header::parse(&bytes)?;
/// assert_eq!(read, header);
/// assert_eq!(read.geometry()?.l2_entries(), 8192);
/// # Ok::<(), qcow2_format::FormatError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The format version.
    pub version: Version,
    /// Backing file name as bytes, at most 1023; `None` without a backing file. [`encode`](Self::encode)
    /// decides where it is stored.
    pub backing_file: Option<Vec<u8>>,
    /// log2 of the cluster size in bytes, 9..=21.
    pub cluster_bits: u32,
    /// Virtual size in bytes, as stored. The usable size is [`disk_size`](Self::disk_size).
    pub size: u64,
    /// How guest data is encrypted.
    pub crypt_method: CryptMethod,
    /// Number of entries in the active L1 table.
    pub l1_size: u32,
    /// Host offset of the active L1 table.
    pub l1_table_offset: HostOffset,
    /// Host offset of the refcount table.
    pub refcount_table_offset: HostOffset,
    /// Number of clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub nb_snapshots: u32,
    /// Host offset of the snapshot table.
    pub snapshots_offset: HostOffset,
    /// The feature words. Empty in version 2.
    pub features: Features,
    /// log2 of the refcount width in bits, 0..=6. 4 in version 2.
    pub refcount_order: u32,
    /// Algorithm of compressed clusters. Always deflate in version 2.
    pub compression_type: CompressionType,
    /// Header bytes from 112 on: fields of a later version. Empty in version 2. [`encode`](Self::encode) pads
    /// them with zeroes to a multiple of 8, which does not change their meaning.
    pub unknown_fields: Vec<u8>,
    /// The header extensions.
    pub extensions: Extensions,
}

impl Header {
    /// The header of an empty disk: no tables, no optional fields, 16-bit refcounts, no feature name table.
    pub fn new(version: Version, cluster_bits: u32) -> Self {
        Self {
            version,
            backing_file: None,
            cluster_bits,
            size: 0,
            crypt_method: CryptMethod::None,
            l1_size: 0,
            l1_table_offset: HostOffset::default(),
            refcount_table_offset: HostOffset::default(),
            refcount_table_clusters: 0,
            nb_snapshots: 0,
            snapshots_offset: HostOffset::default(),
            features: Features::default(),
            refcount_order: 4,
            compression_type: CompressionType::Deflate,
            unknown_fields: Vec::new(),
            extensions: Extensions::default(),
        }
    }

    /// The image's geometry. Errors: `ClusterBits`, `SubclusterSize`, `RefcountOrder`.
    pub fn geometry(&self) -> Result<Geometry, FormatError> {
        Geometry::new(GeometryFields {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.features.incompatible.contains(IncompatibleFeatures::EXTENDED_L2),
        })
    }

    /// The parameters for decoding the image's L2 entries. Errors: as [`geometry`](Self::geometry).
    pub fn l2_format(&self) -> Result<L2Format, FormatError> {
        Ok(L2Format {
            geometry: self.geometry()?,
            zero_flag: self.version >= Version::V3,
            external_data: self.features.incompatible.contains(IncompatibleFeatures::DATA_FILE),
        })
    }

    /// Size of the guest disk in bytes. Like QEMU, rounds the stored size down to a multiple of 512.
    pub const fn disk_size(&self) -> u64 {
        self.size & !511
    }

    /// True if refcounts may be stale.
    pub const fn is_dirty(&self) -> bool {
        self.features.incompatible.contains(IncompatibleFeatures::DIRTY)
    }

    /// True if the image is marked corrupt.
    pub const fn is_corrupt(&self) -> bool {
        self.features.incompatible.contains(IncompatibleFeatures::CORRUPT)
    }

    /// True if guest data is in an external data file.
    pub const fn has_data_file(&self) -> bool {
        self.features.incompatible.contains(IncompatibleFeatures::DATA_FILE)
    }

    /// The bitmaps extension, if present and its autoclear bit is set; without the bit it is stale.
    pub fn trusted_bitmaps(&self) -> Option<&crate::extension::BitmapsExtension> {
        let trusted = self.features.autoclear.contains(AutoclearFeatures::BITMAPS);
        self.extensions.bitmaps.as_ref().filter(|_| trusted)
    }

    /// The backing file name as [text](crate::text) up to its first zero byte.
    pub fn backing_file_name(&self) -> Option<String> {
        let name = self.backing_file.as_deref()?.split(|&byte| byte == 0).next()?;
        Some(crate::text::text_of(name))
    }

    /// Encodes the header, the extensions and the backing file name, in this order and without trailing
    /// zeroes; see [`encode_cluster`](Self::encode_cluster) for the whole cluster. A version 3 header is 112
    /// bytes plus the unknown fields. For the same field values QEMU writes the same bytes.
    ///
    /// Errors: `HeaderFull` if it does not fit into a cluster, `BackingNameTooLong`, `BackingFormatTooLong`,
    /// `NeedsVersion3`, and those of [`geometry`](Self::geometry).
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let geometry = self.geometry()?;
        self.check_version_2()?;
        let mut out = self.encode_fields();
        self.extensions.encode(&mut out)?;
        if let Some(name) = &self.backing_file {
            let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
            if len > limit::MAX_BACKING_NAME {
                return Err(FormatError::new(
                    FormatErrorKind::BackingNameTooLong(len),
                    format!("backing file name of {len} bytes, allowed are {}", limit::MAX_BACKING_NAME),
                ));
            }
            let offset = out.len() as u64;
            out[8..16].copy_from_slice(&offset.to_be_bytes());
            out[16..20].copy_from_slice(&len.to_be_bytes());
            out.extend_from_slice(name);
        }
        let (needed, cluster_size) = (out.len() as u64, geometry.cluster_size());
        if needed > cluster_size {
            return Err(FormatError::new(
                FormatErrorKind::HeaderFull { needed, cluster_size },
                format!(
                    "header, extensions and backing file name need {needed} bytes, a cluster has {cluster_size}"
                ),
            ));
        }
        Ok(out)
    }

    /// Encodes the header and the extensions without the backing file name. The header's name offset is set
    /// to `name_at`; the caller writes the name there. Errors: as [`encode`](Self::encode).
    pub fn encode_with_name_at(&self, name_at: u64) -> Result<Vec<u8>, FormatError> {
        let name_len = self.backing_file.as_ref().map_or(0, Vec::len);
        let mut out = self.encode()?;
        out.truncate(out.len() - name_len);
        if name_len > 0 {
            out[8..16].copy_from_slice(&name_at.to_be_bytes());
        }
        Ok(out)
    }

    /// The whole first cluster: [`encode`](Self::encode), padded with zeroes. Errors: the same.
    pub fn encode_cluster(&self) -> Result<Vec<u8>, FormatError> {
        let mut out = self.encode()?;
        out.resize(1 << self.cluster_bits, 0);
        Ok(out)
    }

    fn check_version_2(&self) -> Result<(), FormatError> {
        let plain = self.features.incompatible.is_empty()
            && self.features.compatible.is_empty()
            && self.features.autoclear.is_empty()
            && self.refcount_order == 4
            && self.compression_type == CompressionType::Deflate
            && self.unknown_fields.is_empty();
        if plain || self.version >= Version::V3 {
            return Ok(());
        }
        Err(FormatError::new(
            FormatErrorKind::NeedsVersion3,
            "header: features, refcount width and compression type can only be written in version 3",
        ))
    }

    fn encode_fields(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        put32(&mut out, if self.version == Version::V2 { 2 } else { 3 });
        out.extend_from_slice(&[0; 12]); // backing file name: `encode` fills it in
        put32(&mut out, self.cluster_bits);
        put64(&mut out, self.size);
        put32(&mut out, self.crypt_method as u32);
        put32(&mut out, self.l1_size);
        put64(&mut out, self.l1_table_offset.value());
        put64(&mut out, self.refcount_table_offset.value());
        put32(&mut out, self.refcount_table_clusters);
        put32(&mut out, self.nb_snapshots);
        put64(&mut out, self.snapshots_offset.value());
        if self.version >= Version::V3 {
            put64(&mut out, self.features.incompatible.bits());
            put64(&mut out, self.features.compatible.bits());
            put64(&mut out, self.features.autoclear.bits());
            put32(&mut out, self.refcount_order);
            let header_len = (limit::HEADER_LEN_V3 + self.unknown_fields.len()).next_multiple_of(8);
            put32(&mut out, header_len as u32);
            out.push(self.compression_type as u8);
            out.resize(limit::HEADER_LEN_V3, 0);
            out.extend_from_slice(&self.unknown_fields);
            out.resize(header_len, 0);
        }
        out
    }
}

fn put32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn put64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests;
