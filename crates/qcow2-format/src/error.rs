//! Format errors: which field is wrong, where, what was seen and what is allowed.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// A table that a header field points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Table {
    /// The refcount table; QEMU calls it "Reference count table".
    Refcount,
    /// The snapshot table; "Snapshot table".
    Snapshots,
    /// The L1 table of the active state; "Active L1 table".
    ActiveL1,
    /// The L1 table of a snapshot; "Snapshot L1 table".
    SnapshotL1,
}

impl Table {
    /// The specification's name of the table, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Refcount => "refcount table",
            Self::Snapshots => "snapshot table",
            Self::ActiveL1 => "active l1 table",
            Self::SnapshotL1 => "snapshot l1 table",
        }
    }
}

/// The kind of a format error. Carries the numbers a caller needs to write its own message.
///
/// QEMU's messages for the kinds that make it refuse an image; `N` is the number in the variant:
///
/// | variant | QEMU's message |
/// |---|---|
/// | `NotQcow2` | Image is not in qcow2 format |
/// | `Version` | Unsupported qcow2 version N |
/// | `ClusterBits` | Unsupported cluster size: 2^N |
/// | `HeaderTooShort` | qcow2 header too short |
/// | `HeaderExceedsCluster` | qcow2 header exceeds cluster size |
/// | `BackingOffset` | Invalid backing file offset |
/// | `CompressionType` | qcow2: unknown compression type: N |
/// | `CompressionBitMissing` | qcow2: Compression type incompatible feature bit must be set |
/// | `CompressionBitSet` | qcow2: Compression type incompatible feature bit must not be set |
/// | `UnknownIncompatible` | Unsupported qcow2 feature(s): NAME, NAME, Unknown incompatible feature: HEX |
/// | `SubclusterSize` | Unsupported subcluster size: N |
/// | `RefcountOrder` | Reference count entry width too large; may not exceed 64 bits |
/// | `NoRefcountTable` | Image does not contain a reference count table |
/// | `TableTooLarge` | TABLE too large |
/// | `TableOffset` | TABLE offset invalid |
/// | `ImageTooBig` | Image is too big |
/// | `L1TooSmall` | L1 table is too small |
/// | `CryptMethod` | Unsupported encryption method N |
/// | `ExtensionTooLarge` | Header extension too large |
/// | `BackingFormatTooLong` | ERROR: ext_backing_format: len=N too large (>=16) |
/// | `CryptoExtensionWithoutLuks` | CRYPTO header extension only expected with LUKS encryption method |
/// | `CryptoExtensionLength` | CRYPTO header extension size N, but expected size 16 |
/// | `CryptoOffset` | Encryption header offset 'N' is not a multiple of cluster size 'CLUSTER' |
/// | `BitmapsExtensionLength` | bitmaps_ext: Invalid extension length |
/// | `BitmapsReserved` | bitmaps_ext: Reserved field is not zero |
/// | `BitmapsCount` | bitmaps_ext: Image has N bitmaps, exceeding the QEMU supported maximum of 65535; for 0: found bitmaps extension with zero bitmaps |
/// | `BitmapDirectoryOffset` | bitmaps_ext: invalid bitmap directory offset |
/// | `BitmapDirectorySize` | bitmaps_ext: bitmap directory size (N) exceeds the maximum supported size (67107840); for 0: Requested bitmap directory size is zero |
/// | `MissingCryptoHeader` | Missing CRYPTO header for crypt method N |
/// | `BackingNameTooLong` | Backing file name too long |
/// | `SnapshotExtra` | Too much extra metadata in snapshot table entry INDEX |
/// | `BitmapDirectoryBroken` | Broken bitmap directory |
/// | `BitmapDirectoryCount` | More bitmaps found than specified in header extension; or: Less bitmaps found ... |
/// | `BitmapExtra` | Bitmap extra data is not supported |
/// | `BitmapConstraints` | Bitmap 'NAME' doesn't satisfy the constraints |
/// | `HeaderFull` | (when writing) ENOSPC: No space left on device |
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatErrorKind {
    /// The magic number is not `QFI\xfb`.
    NotQcow2,
    /// The version is neither 2 nor 3.
    Version(u32),
    /// The cluster size exponent is outside 9..=21.
    ClusterBits(u32),
    /// A version 3 header is shorter than 104 bytes.
    HeaderTooShort(u32),
    /// The header is longer than a cluster.
    HeaderExceedsCluster(u32),
    /// The backing file name starts past the first cluster.
    BackingOffset(u64),
    /// The compression type is neither 0 (deflate) nor 1 (zstd).
    CompressionType(u8),
    /// The compression type is not deflate and its incompatible feature bit is clear.
    CompressionBitMissing,
    /// The compression type is deflate and its incompatible feature bit is set.
    CompressionBitSet,
    /// Incompatible feature bits that this crate does not know are set.
    UnknownIncompatible {
        /// Names from the image's own feature name table, in the table's order.
        names: Vec<String>,
        /// Unknown bits that the table does not name.
        unnamed: u64,
    },
    /// Subclusters are below 512 bytes: extended L2 entries need `cluster_bits` of at least 14.
    SubclusterSize(u64),
    /// The refcount width exponent is above 6.
    RefcountOrder(u32),
    /// The refcount table has no clusters.
    NoRefcountTable,
    /// A table has more entries than the limit.
    TableTooLarge(Table),
    /// A table is not cluster aligned, or ends past 2^63 - 1.
    TableOffset(Table),
    /// The virtual size needs more than 2^31 - 1 L1 entries.
    ImageTooBig(u64),
    /// The active L1 table does not cover the virtual size.
    L1TooSmall {
        /// Entries in the L1 table.
        entries: u32,
        /// Entries the virtual size needs.
        needed: u64,
    },
    /// The encryption method is none of 0, 1 (AES) and 2 (LUKS).
    CryptMethod(u32),
    /// A header extension runs past the end of the extension area.
    ExtensionTooLarge {
        /// Its type.
        kind: u32,
        /// Its length field, in bytes.
        len: u32,
    },
    /// The backing format name is longer than 15 bytes.
    BackingFormatTooLong(u32),
    /// There is a LUKS pointer, but the encryption method is not LUKS.
    CryptoExtensionWithoutLuks,
    /// The LUKS pointer is not 16 bytes long.
    CryptoExtensionLength(u32),
    /// The LUKS area is not cluster aligned.
    CryptoOffset {
        /// Its host offset, in bytes.
        offset: u64,
        /// Cluster size in bytes.
        cluster_size: u64,
    },
    /// The bitmaps extension is not 24 bytes long.
    BitmapsExtensionLength(u32),
    /// The reserved word of the bitmaps extension is not zero.
    BitmapsReserved(u32),
    /// The bitmaps extension counts 0 bitmaps, or more than 65535.
    BitmapsCount(u32),
    /// The bitmap directory is not cluster aligned.
    BitmapDirectoryOffset(u64),
    /// The bitmap directory is empty or larger than the limit.
    BitmapDirectorySize(u64),
    /// The encryption method (always LUKS, 2) needs a LUKS pointer, and there is none or it has length 0.
    MissingCryptoHeader(u32),
    /// The backing file name is longer than 1023 bytes or runs past the end of the first cluster.
    BackingNameTooLong(u32),
    /// The header, its extensions and the backing file name do not fit into one cluster.
    HeaderFull {
        /// Bytes needed.
        needed: u64,
        /// Bytes available: the cluster size.
        cluster_size: u64,
    },
    /// The header is version 2, but a field that only exists in version 3 is set.
    NeedsVersion3,
    /// A value is longer than its length field can express; its length in bytes.
    TooLong(u64),
    /// A snapshot table entry has more than 1024 bytes of extra data.
    SnapshotExtra(u32),
    /// The bitmap directory ends inside an entry.
    BitmapDirectoryBroken,
    /// The bitmap directory holds a different number of bitmaps than the extension counts.
    BitmapDirectoryCount {
        /// Entries found. Parsing stops one entry past `expected`, so `expected + 1` means "that many or
        /// more".
        found: u32,
        /// The count in the bitmaps extension.
        expected: u32,
    },
    /// A bitmap has extra data.
    BitmapExtra(u32),
    /// A bitmap's directory entry breaks one of QEMU's rules; the bitmap's name.
    BitmapConstraints(String),
    /// A bitmap table entry has reserved bits set or an invalid offset.
    BitmapTableEntry(u64),
    /// The LUKS area does not start with a LUKS header.
    NotLuks,
    /// The LUKS version is not 1.
    LuksVersion(u16),
    /// A text field of the LUKS header has no terminating zero or is not UTF-8; the field's name.
    LuksName(&'static str),
    /// A LUKS key slot is marked neither enabled nor disabled.
    LuksSlotState(u32),
    /// The buffer ends inside the structure.
    Truncated,
    /// An offset that must be cluster aligned is not.
    Misaligned(u64),
    /// A standard L2 entry has its zero flag set in a version 2 image.
    ZeroFlagInVersion2,
    /// A subcluster is both allocated and zero, or allocated in a cluster without a host offset.
    SubclusterBitmap(u64),
    /// A compressed cluster starts past the largest host offset that the format allows.
    CompressedOffset(u64),
}

/// An error in the bytes of an image, with a kind to match and a message for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatError {
    kind: FormatErrorKind,
    message: String,
}

impl FormatError {
    /// An error of `kind`. `message` is lower case: what was seen, where, and what is allowed.
    pub fn new(kind: FormatErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The kind of error, for matching.
    pub fn kind(&self) -> &FormatErrorKind {
        &self.kind
    }
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl core::error::Error for FormatError {}
