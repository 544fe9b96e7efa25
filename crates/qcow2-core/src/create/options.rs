//! Options for a new image.

use super::Refusal;
use ::alloc::string::String;
use ::alloc::sync::Arc;
use core::fmt;
use qcow2_format::Version;
use qcow2_format::header::CompressionType;

/// The properties of a new qcow2 image. Not every combination is valid: [`check`](Self::check). Start from
/// [`CreateOptions::new`].
///
/// ```
/// use qcow2_core::{CreateOptions, Preallocation, Refusal};
///
/// let overlay = CreateOptions::new(1 << 30).with_cluster_size(16 << 10).with_backing("base.raw", "raw");
/// assert_eq!(overlay.check(), Ok(()));
/// let full = overlay.with_preallocation(Preallocation::Full);
/// assert_eq!(full.check(), Err(Refusal::BackingAndPreallocation));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CreateOptions {
    /// Virtual size in bytes; rounded up to a multiple of 512.
    pub size: u64,
    /// The format version; features need version 3.
    pub version: Version,
    /// Cluster size in bytes: a power of two from 512 to 2 MiB, from 16 KiB with extended L2 entries.
    pub cluster_size: u64,
    /// Refcount width in bits: a power of two from 1 to 64; 16 in version 2.
    pub refcount_bits: u64,
    /// Writers may postpone refcount updates.
    pub lazy_refcounts: bool,
    /// Extended L2 entries: 32 subclusters per cluster.
    pub extended_l2: bool,
    /// Algorithm of compressed clusters.
    pub compression_type: CompressionType,
    /// What is allocated up front.
    pub preallocation: Preallocation,
    /// Name of the backing file as it is recorded, at most 1023 bytes.
    pub backing_file: Option<String>,
    /// Format of the backing file as it is recorded, at most 15 bytes. With `None` later readers have to
    /// probe the format, which is unsafe for raw files.
    pub backing_format: Option<String>,
    /// Name of the external data file as it is recorded.
    pub data_file: Option<String>,
    /// The data file is the guest disk byte for byte; excludes a backing file.
    pub data_file_raw: bool,
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
            backing_file: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
            encryption: None,
        }
    }

    /// These options with another version.
    #[must_use]
    pub fn with_version(self, version: Version) -> Self {
        Self { version, ..self }
    }

    /// These options with clusters of `cluster_size` bytes.
    #[must_use]
    pub fn with_cluster_size(self, cluster_size: u64) -> Self {
        Self { cluster_size, ..self }
    }

    /// These options with another preallocation.
    #[must_use]
    pub fn with_preallocation(self, preallocation: Preallocation) -> Self {
        Self { preallocation, ..self }
    }

    /// These options with the backing file `name` of the given `format`.
    #[must_use]
    pub fn with_backing(self, name: impl Into<String>, format: impl Into<String>) -> Self {
        Self { backing_file: Some(name.into()), backing_format: Some(format.into()), ..self }
    }

    /// These options with guest data in the external data file `name`.
    #[must_use]
    pub fn with_data_file(self, name: impl Into<String>) -> Self {
        Self { data_file: Some(name.into()), ..self }
    }

    /// These options with encrypted guest data.
    #[must_use]
    pub fn with_encryption(self, encryption: NewEncryption) -> Self {
        Self { encryption: Some(encryption), ..self }
    }

    /// These options with refcounts of `refcount_bits`.
    #[must_use]
    pub fn with_refcount_bits(self, refcount_bits: u64) -> Self {
        Self { refcount_bits, ..self }
    }

    /// These options with lazy refcounts, or without.
    #[must_use]
    pub fn with_lazy_refcounts(self, lazy_refcounts: bool) -> Self {
        Self { lazy_refcounts, ..self }
    }

    /// These options with extended L2 entries, or without.
    #[must_use]
    pub fn with_extended_l2(self, extended_l2: bool) -> Self {
        Self { extended_l2, ..self }
    }

    /// These options with another algorithm of compressed clusters.
    #[must_use]
    pub fn with_compression_type(self, compression_type: CompressionType) -> Self {
        Self { compression_type, ..self }
    }

    /// These options with a data file that is the guest disk byte for byte, or not.
    #[must_use]
    pub fn with_data_file_raw(self, data_file_raw: bool) -> Self {
        Self { data_file_raw, ..self }
    }

    /// Checks the options. No I/O. Errors: the first broken rule, in QEMU's order, so that both report the
    /// same one of several faults.
    pub fn check(&self) -> Result<(), Refusal> {
        super::refusal::check(self)
    }
}

/// The properties of a new raw disk, or of the file of a LUKS container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawOptions {
    /// Bytes of the file; rounded up to a multiple of 512.
    pub size: u64,
    /// What is allocated up front; there is no metadata to preallocate.
    pub preallocation: Preallocation,
}

impl RawOptions {
    /// Checks the options of a raw disk. No I/O.
    pub fn check(&self) -> Result<(), Refusal> {
        super::refusal::check_raw(self)
    }

    /// Checks the options of a LUKS container. No I/O.
    pub fn check_container(&self) -> Result<(), Refusal> {
        super::refusal::check_container(self)
    }
}

/// What is allocated when an image is created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: writes allocate clusters.
    #[default]
    Off,
    /// All tables; the data area is a hole.
    Metadata,
    /// All tables; space for the data area is reserved.
    Falloc,
    /// All tables; the data area is written with zeroes.
    Full,
}

impl Preallocation {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }

    /// The preallocation called `name`: `off`, `metadata`, `falloc` or `full`.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "off" => Self::Off,
            "metadata" => Self::Metadata,
            "falloc" => Self::Falloc,
            "full" => Self::Full,
            _ => return None,
        })
    }
}

/// The backing file of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// Its name as it is to be recorded, at most 1023 bytes.
    pub name: String,
    /// Its format as it is to be recorded, at most 15 bytes. With `None` later readers have to probe the
    /// format, which is unsafe for raw files.
    pub format: Option<String>,
}

/// How the guest data of a new image is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NewEncryption {
    /// A method whose header does not exist yet: allows [`check`](CreateOptions::check) before a key is
    /// derived, which takes long. [`create`](super::create()) refuses it.
    Pending,
    /// The old AES method, which has no encryption header.
    Aes,
    /// LUKS.
    Luks(LuksArea),
}

/// The encryption header of a new image: the stored bytes from the LUKS header to the last key slot.
#[derive(Clone, PartialEq, Eq)]
pub struct LuksArea(pub Arc<[u8]>);

impl fmt::Debug for LuksArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LuksArea({} bytes)", self.0.len())
    }
}
