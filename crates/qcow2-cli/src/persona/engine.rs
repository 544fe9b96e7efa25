//! Errors of the engine, of storages and of new images.

use super::keys::unlock;
use super::opening::{reason, with_hint};
use super::text::{capitalized, chain, storage};
use crate::failure::Failure;
use qcow2_blockdev::FailureKind;
use qcow2_core::format::{FormatError, FormatErrorKind as Kind, Table};
use qcow2_core::{Error, ErrorKind, Preallocation, ResolveError, TableKind, UnlockError, find_cause};
use qcow2_io::{OpenError, OpenErrorKind, SourceError, text_of_name};

/// Why the file at `path` could not be opened, and a hint that follows on a line of its own.
pub(crate) fn source_reason(error: &SourceError, path: &str) -> (String, Option<String>) {
    match error {
        SourceError::Open(error) => open_reason(error, path),
        SourceError::Probe(error) => {
            (format!("Could not read image for determining its format: {}", storage(error)), None)
        }
        other => (chain(other), None),
    }
}

/// The failure to open `name`, whose image the engine refuses.
pub(crate) fn engine_failure(name: &str, error: &Error) -> Failure {
    let (reason, hints) = engine_reason(error);
    let failure = Failure::could_not_open(name, &reason);
    hints.into_iter().fold(failure, Failure::hint)
}

/// Why the engine refused an image, and what follows on lines of their own.
pub(super) fn engine_reason(error: &Error) -> (String, Vec<String>) {
    if let Some(below) = find_cause::<ResolveError>(error) {
        if let Some(kind) = find_cause::<FailureKind>(below) {
            let (reason, hints) = reason(kind);
            return (capitalized(&reason), hints);
        }
        return match find_cause::<OpenError>(below) {
            Some(open) => with_hint(open_reason(open, &text_of_name(open.path().as_os_str()))),
            None => (capitalized(&below.to_string()), Vec::new()),
        };
    }
    if let Some(locked) = find_cause::<UnlockError>(error) {
        return (unlock(locked), Vec::new());
    }
    let reason = match (error.format_error(), error.storage_error()) {
        (Some(format), _) => format_reason(format),
        (None, Some(error)) => storage(error),
        (None, None) => match error.kind() {
            ErrorKind::MarkedCorrupt => "qcow2: Image is corrupt; cannot be opened read/write".to_owned(),
            // The only name that is not there without being looked for.
            ErrorKind::Resolve => "'data-file' is required for this image".to_owned(),
            ErrorKind::Encrypted => "Parameter 'encrypt.key-secret' is required for cipher".to_owned(),
            _ => capitalized(&error.to_string()),
        },
    };
    (reason, Vec::new())
}

/// What is wrong with the L1 table of a snapshot, and the system's text for it, if `error` is about that.
pub(crate) fn snapshot_l1(error: &Error) -> Option<(String, &'static str)> {
    let format = error.format_error()?;
    match format.kind() {
        Kind::TableOffset(Table::SnapshotL1) => Some((format_reason(format), "Invalid argument")),
        Kind::TableTooLarge(Table::SnapshotL1) => Some((format_reason(format), "File too large")),
        _ => None,
    }
}

/// Whether `error` is about a snapshot table that the file ends in. What is missing of it QEMU reads as
/// zeroes, so it finds entries without a name.
pub(crate) fn snapshots_cut(error: &Error) -> bool {
    let cut = |error: &FormatError| *error.kind() == Kind::Truncated;
    error.place().table == Some(TableKind::Snapshots) && error.format_error().is_some_and(cut)
}

/// What follows the complaint about a bitmap that was in use.
pub(crate) const INCONSISTENT_HINT: &str = "Try block-dirty-bitmap-remove to delete this bitmap from disk";

/// What could not be done where a disk or its new part gets no space. `own_file`: a qcow2 image that has the
/// data itself.
pub(crate) fn no_space(preallocation: Preallocation, own_file: bool) -> String {
    let step = match preallocation {
        Preallocation::Off => "Could not resize file",
        Preallocation::Metadata => return "Allocating clusters failed".to_owned(),
        Preallocation::Falloc => "Could not preallocate new data",
        Preallocation::Full => "Could not write zeros for preallocation",
    };
    if own_file { format!("Failed to resize underlying file: {step}") } else { step.to_owned() }
}

fn open_reason(error: &OpenError, path: &str) -> (String, Option<String>) {
    if let Some(text) = system_reason(error) {
        return (format!("Could not open '{path}': {text}"), None);
    }
    match error.lock_conflict() {
        Some(conflict) => {
            let shared = if conflict.is_shared() { "shared " } else { "" };
            let reason = format!("Failed to get {shared}\"{}\" lock", conflict.permission().name());
            (reason, Some(format!("Is another process using the image [{path}]?")))
        }
        None if error.kind() == OpenErrorKind::NotRegular => (
            format!(
                "'file' driver requires '{}' to be a regular file",
                text_of_name(error.path().as_os_str())
            ),
            None,
        ),
        None => (error.reason(), None),
    }
}

/// Why the system does not open a file. `None`: it does, and we refuse.
fn system_reason(error: &OpenError) -> Option<String> {
    match error.kind() {
        OpenErrorKind::NotRegular if error.is_directory_to_write() => Some("Is a directory".to_owned()),
        OpenErrorKind::NotRegular | OpenErrorKind::SameFile | OpenErrorKind::Locked => None,
        _ => Some(error.reason()),
    }
}

/// The file that the system does not open, and why, if that is the reason for a failure.
pub(super) fn unopened(kind: &FailureKind) -> Option<(String, String)> {
    let of_error = |error: &OpenError, path: &str| Some((path.to_owned(), system_reason(error)?));
    match kind {
        FailureKind::File { path, error } => match &**error {
            SourceError::Open(error) => of_error(error, path),
            _ => None,
        },
        FailureKind::NoDevice { path, error } => Some((path.clone(), error.to_string())),
        FailureKind::Engine(error) => {
            let below = find_cause::<ResolveError>(error)?;
            match find_cause::<FailureKind>(below) {
                Some(kind) => unopened(kind),
                None => find_cause::<OpenError>(below)
                    .and_then(|e| of_error(e, &text_of_name(e.path().as_os_str()))),
            }
        }
        _ => None,
    }
}

fn format_reason(error: &FormatError) -> String {
    match error.kind() {
        Kind::NotQcow2 => "Image is not in qcow2 format".to_owned(),
        Kind::Version(n) => format!("Unsupported qcow2 version {n}"),
        Kind::ClusterBits(n) => format!("Unsupported cluster size: 2^{n}"),
        Kind::HeaderTooShort(_) => "qcow2 header too short".to_owned(),
        Kind::HeaderExceedsCluster(_) => "qcow2 header exceeds cluster size".to_owned(),
        Kind::BackingOffset(_) => "Invalid backing file offset".to_owned(),
        Kind::CompressionType(n) => format!("qcow2: unknown compression type: {n}"),
        Kind::CompressionBitMissing => {
            "qcow2: Compression type incompatible feature bit must be set".to_owned()
        }
        Kind::CompressionBitSet => {
            "qcow2: Compression type incompatible feature bit must not be set".to_owned()
        }
        Kind::UnknownIncompatible { names, unnamed } => unknown_features(names, *unnamed),
        Kind::SubclusterSize(n) => format!("Unsupported subcluster size: {n}"),
        Kind::RefcountOrder(_) => "Reference count entry width too large; may not exceed 64 bits".to_owned(),
        Kind::NoRefcountTable => "Image does not contain a reference count table".to_owned(),
        Kind::TableTooLarge(table) => format!("{} too large", table_name(*table)),
        Kind::TableOffset(table) => format!("{} offset invalid", table_name(*table)),
        Kind::ImageTooBig(_) => "Image is too big".to_owned(),
        Kind::L1TooSmall { .. } => "L1 table is too small".to_owned(),
        Kind::CryptMethod(n) => format!("Unsupported encryption method {n}"),
        Kind::ExtensionTooLarge { .. } => "Header extension too large".to_owned(),
        Kind::BackingFormatTooLong(n) => format!("ERROR: ext_backing_format: len={n} too large (>=16)"),
        Kind::CryptoExtensionWithoutLuks => {
            "CRYPTO header extension only expected with LUKS encryption method".to_owned()
        }
        Kind::CryptoExtensionLength(n) => format!("CRYPTO header extension size {n}, but expected size 16"),
        Kind::CryptoOffset { offset, cluster_size } => {
            format!("Encryption header offset '{offset}' is not a multiple of cluster size '{cluster_size}'")
        }
        Kind::MissingCryptoHeader(n) => format!("Missing CRYPTO header for crypt method {n}"),
        Kind::BackingNameTooLong(_) => "Backing file name too long".to_owned(),
        _ => bitmap_reason(error),
    }
}

fn bitmap_reason(error: &FormatError) -> String {
    match error.kind() {
        Kind::BitmapsExtensionLength(_) => "bitmaps_ext: Invalid extension length".to_owned(),
        Kind::BitmapsReserved(_) => "bitmaps_ext: Reserved field is not zero".to_owned(),
        Kind::BitmapsCount(0) => "found bitmaps extension with zero bitmaps".to_owned(),
        Kind::BitmapsCount(n) => {
            format!("bitmaps_ext: Image has {n} bitmaps, exceeding the QEMU supported maximum of 65535")
        }
        Kind::BitmapDirectoryOffset(_) => "bitmaps_ext: invalid bitmap directory offset".to_owned(),
        Kind::BitmapDirectorySize(0) => "Requested bitmap directory size is zero".to_owned(),
        Kind::BitmapDirectorySize(n) => {
            format!("bitmaps_ext: bitmap directory size ({n}) exceeds the maximum supported size (67107840)")
        }
        _ => capitalized(&error.to_string()),
    }
}

fn unknown_features(names: &[String], unnamed: u64) -> String {
    let mut features: Vec<String> = names.iter().map(|name| qcow2_report::human::escaped(name)).collect();
    if unnamed != 0 {
        features.push(format!("Unknown incompatible feature: {unnamed:x}"));
    }
    format!("Unsupported qcow2 feature(s): {}", features.join(", "))
}

fn table_name(table: Table) -> &'static str {
    match table {
        Table::Refcount => "Reference count table",
        Table::Snapshots => "Snapshot table",
        Table::ActiveL1 => "Active L1 table",
        _ => "Snapshot L1 table",
    }
}
