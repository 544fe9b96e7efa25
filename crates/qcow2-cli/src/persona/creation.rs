//! Images that are not made.

use super::engine::{no_space, source_reason};
use super::keys::{crypt, no_secret};
use super::name;
use super::opening::{reason, with_hint};
use super::text::{capitalized, chain, storage};
use crate::failure::Failure;
use qcow2_blockdev::{CreateFailure, CreateFailureKind as Kind, Driver, OptionError, OptionErrorKind};
use qcow2_core::format::FormatErrorKind;
use qcow2_core::format::limit::{MAX_DISK_SIZE, MAX_FILE_OFFSET};
use qcow2_core::{Error, ImageFormat, Preallocation, Refusal, StorageError, StorageErrorKind, find_cause};
use qcow2_crypt::{CipherMode, CipherSpec, CryptError};
use qcow2_io::{OpenErrorKind, SourceError};

impl From<CreateFailure> for Failure {
    fn from(failure: CreateFailure) -> Self {
        let (reason, hints) = told(&failure);
        hints.into_iter().fold(Self::new(reason), Self::hint)
    }
}

/// What `create` says, which has words of its own for what is too long for its file system.
pub(crate) fn created(failure: CreateFailure) -> Failure {
    match failure.format() {
        format @ (ImageFormat::Raw | ImageFormat::Qcow2) if failure.is_too_long() => {
            Failure::new(too_large(format))
        }
        _ => failure.into(),
    }
}

/// What `measure` says, which checks the options of a new image in words of its own.
pub(crate) fn measured(failure: CreateFailure) -> Failure {
    match failure.kind() {
        Kind::Refused(Refusal::RefcountBitsNeedVersion3(_)) => Failure::new(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)",
        ),
        Kind::Option(error) if error.option == "compat" => {
            Failure::new(format!("Invalid compatibility level: '{}'", error.value))
        }
        Kind::Option(error) if error.option == "preallocation" => error.clone().into(),
        _ => failure.into(),
    }
}

fn is_pipe(error: &SourceError) -> bool {
    matches!(error, SourceError::Open(error)
        if error.kind() == OpenErrorKind::NotRegular && !error.is_directory_to_write())
}

fn too_large(format: &ImageFormat) -> String {
    let hint = if *format == ImageFormat::Qcow2 { " (try using a larger cluster size)" } else { "" };
    format!("The image size is too large for file format '{}'{hint}", format.name())
}

/// Of a container.
const TOO_LARGE: &str = "The requested file size is too large";

fn told(failure: &CreateFailure) -> (String, Vec<String>) {
    let format = failure.format();
    let text = match failure.kind() {
        Kind::UnknownFormat => format!("Unknown file format '{}'", format.name()),
        Kind::NoCreation => format!("Format driver '{}' does not support image creation", format.name()),
        Kind::NoMeasurement => {
            format!("Block driver '{}' does not support size measurement", format.name())
        }
        Kind::NoAmendment => format!("Format driver '{}' does not support option amendment", format.name()),
        Kind::UnknownOption(name) => format!("Invalid parameter '{name}'"),
        Kind::OnlyWhenCreated(name) => {
            let hint = "This option is only supported for image creation".to_owned();
            return (format!("Invalid parameter '{name}'"), vec![hint]);
        }
        Kind::Option(error) => return option(error, format),
        Kind::ExtentSizeHint(_) => "Extent size hint is too large".to_owned(),
        Kind::Refused(refusal) => refused(refusal, format),
        Kind::EncryptedTwice => {
            "'encrypt.format' and its alias 'encryption' can't be used at the same time".to_owned()
        }
        Kind::NoEncryptFormat => "Parameter 'encrypt.format' is missing".to_owned(),
        Kind::DetachedHeader => "Parameter 'detached-header' is unexpected".to_owned(),
        Kind::NotWithAes(name) => format!("Parameter '{name}' is unexpected"),
        Kind::SecretNotNamed(name) => format!("Parameter '{name}' is required for cipher"),
        Kind::NoSecret(id) => no_secret(id),
        Kind::Cipher { spec, error } => not_together(spec, error),
        Kind::Crypt(error) => crypt(error),
        Kind::OutOfReach { driver, reason: kind } => {
            let (reason, hints) = reason(kind);
            let text = format!(
                "Protocol driver '{}' does not support creating new images, so an existing image must be selected as \
                 the target; however, opening the given target as an existing image failed: {reason}",
                driver.name()
            );
            return (text, hints);
        }
        Kind::NotWritable { path, error } => format!("Could not create '{path}': {error}"),
        // A pipe opens, and has no length.
        Kind::File { error, .. } if is_pipe(error) => "Could not resize file: Invalid argument".to_owned(),
        Kind::File { path, error } => return with_hint(source_reason(error, path)),
        Kind::NothingToPreallocate(mode) => format!("Unsupported preallocation mode '{}'", mode.name()),
        Kind::TooSmall(Driver::Nbd) => "Cannot grow NBD nodes".to_owned(),
        Kind::TooSmall(_) => "Cannot grow device files".to_owned(),
        Kind::Storage(error) => storage(error),
        Kind::DataFileName(kind) => return reason(kind),
        Kind::DataFileOnServer => "A data file is a file beside the image, which is none here".to_owned(),
        Kind::Name { backing, error } => {
            let what =
                match backing.as_ref().and_then(|backing| Some((&backing.name, backing.format.as_ref()?))) {
                    Some((name, format)) => {
                        format!("Could not assign backing file '{name}' with format '{format}'")
                    }
                    None => "Could not write the image header".to_owned(),
                };
            let full = error.format_error().map(|error| error.kind());
            let full = matches!(full, Some(FormatErrorKind::HeaderFull { .. }));
            format!("{what}: {}", if full { "No space left on device" } else { "Invalid argument" })
        }
        Kind::Writing { .. } if failure.is_too_long() && *format == ImageFormat::Luks => TOO_LARGE.to_owned(),
        Kind::Writing { preallocation, in_image, error } => {
            not_written(*preallocation, *in_image, format, error)
        }
        other => capitalized(&other.to_string()),
    };
    (text, Vec::new())
}

/// What making an image comes down to where it fails.
fn not_written(preallocation: Preallocation, in_image: bool, format: &ImageFormat, error: &Error) -> String {
    let Some(cause) = find_cause::<StorageError>(error) else {
        return format!("creating the image: {}", chain(error));
    };
    let fixed = matches!(cause.kind(), StorageErrorKind::FixedLength(_));
    let step = match preallocation {
        Preallocation::Off | Preallocation::Metadata if fixed => "Could not resize image".to_owned(),
        _ if fixed && in_image => "Could not resize image: Failed to resize underlying file".to_owned(),
        Preallocation::Off if in_image => "Could not write the image".to_owned(),
        _ if *format == ImageFormat::Qcow2 => {
            format!("Could not resize image: {}", no_space(preallocation, in_image))
        }
        _ => no_space(preallocation, false),
    };
    format!("{step}: {}", storage(cause))
}

/// A value of an option that is not what it should be.
fn option(error: &OptionError, format: &ImageFormat) -> (String, Vec<String>) {
    let of_file = error.option == "preallocation" && *format != ImageFormat::Qcow2;
    if error.kind != OptionErrorKind::NotAChoice || of_file {
        return name::option(error);
    }
    // Choices go by the names that they have in QEMU's schema.
    let option = match error.option.strip_prefix("encrypt.").unwrap_or(&error.option) {
        "compat" => "version".to_owned(),
        other => other.replace('_', "-"),
    };
    (format!("Parameter '{option}' does not accept value '{}'", error.value), Vec::new())
}

fn refused(refusal: &Refusal, format: &ImageFormat) -> String {
    let past_files = |size: u64| size.checked_next_multiple_of(512).is_none_or(|size| size > MAX_FILE_OFFSET);
    match (refusal, format) {
        (Refusal::SizeTooLarge(_), ImageFormat::Raw) => "Could not resize file: Invalid argument".to_owned(),
        (&Refusal::SizeTooLarge(size), ImageFormat::Luks) if past_files(size) => TOO_LARGE.to_owned(),
        (&Refusal::SizeTooLarge(size), ImageFormat::Luks) => exceeds(size),
        (&Refusal::SizeTooLarge(size), _) if past_files(size) => {
            "Could not resize image: Image size cannot be negative".to_owned()
        }
        (&Refusal::SizeTooLarge(size), _) if size > MAX_DISK_SIZE => {
            format!("Could not resize image: {}", exceeds(size))
        }
        (Refusal::SizeTooLarge(_), _) => too_large(&ImageFormat::Qcow2),
        (Refusal::PreallocationOnDevice(mode), ImageFormat::Qcow2) => {
            format!("Could not resize image: Failed to resize underlying file: {}", on_device(*mode))
        }
        (Refusal::PreallocationOnDevice(mode), _) => on_device(*mode),
        (other, _) => impossible(other),
    }
}

pub(crate) fn on_device(mode: Preallocation) -> String {
    format!("Preallocation mode '{}' unsupported for this non-regular file", mode.name())
}

fn exceeds(size: u64) -> String {
    format!("offset({}) exceeds maximum({MAX_DISK_SIZE})", size.next_multiple_of(512))
}

/// Options that are not possible together.
fn impossible(refusal: &Refusal) -> String {
    let needs_v3 = "compatibility level 1.1 and above (use version=v3 or greater)";
    match refusal {
        Refusal::ExtendedL2NeedsVersion3 => format!("Extended L2 entries are only supported with {needs_v3}"),
        Refusal::ClusterSize(_) => "Cluster size must be a power of two between 512 and 2048k".to_owned(),
        Refusal::ExtendedL2ClusterSize(_) => {
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes".to_owned()
        }
        Refusal::BackingAndPreallocation => {
            "Backing file and preallocation can only be used at the same time if extended_l2 is on".to_owned()
        }
        Refusal::BackingFormatWithoutFile => "Backing format cannot be used without backing file".to_owned(),
        Refusal::LazyRefcountsNeedVersion3 => format!("Lazy refcounts only supported with {needs_v3}"),
        Refusal::RefcountBits(_) => {
            "Refcount width must be a power of two and may not exceed 64 bits".to_owned()
        }
        Refusal::RefcountBitsNeedVersion3(_) => {
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)"
                .to_owned()
        }
        Refusal::DataFileRawWithoutFile => "data-file-raw requires data-file".to_owned(),
        Refusal::BackingAndDataFileRaw => {
            "Backing file and data-file-raw cannot be used at the same time".to_owned()
        }
        Refusal::DataFileNeedsVersion3 => format!("External data files are only supported with {needs_v3}"),
        Refusal::CompressionTypeNeedsVersion3 => {
            format!("Non-zlib compression type is only supported with {needs_v3}")
        }
        Refusal::RawMetadataPreallocation => "Unsupported preallocation mode: metadata".to_owned(),
        Refusal::RefcountTableTooLarge { .. } => format!("creating the image: {refusal}"),
        other => capitalized(&other.to_string()),
    }
}

/// Parts of a cipher that do not go together.
fn not_together(spec: &CipherSpec, error: &CryptError) -> String {
    match spec.essiv_hash() {
        _ if spec.mode == CipherMode::Xts && spec.alg.block_len() != 16 => {
            format!("Unsupported cipher mode {}", spec.mode.name())
        }
        Some(_) if spec.alg.block_len() != 16 => {
            format!("Cipher {} not supported with essiv", spec.alg.name())
        }
        Some(hash) => {
            let family = match spec.alg.family() {
                "aes" => "AES",
                "serpent" => "Serpent",
                _ => "Twofish",
            };
            format!("No {family} cipher with key size {} available", hash.digest_len())
        }
        None => crypt(error),
    }
}
