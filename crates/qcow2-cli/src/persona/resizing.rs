//! Disks that do not get another size.

use super::creation::on_device;
use super::damage::told;
use super::engine::{INCONSISTENT_HINT, no_space};
use super::text::{FIXED_SIZE, capitalized, cause, chain};
use crate::failure::Failure;
use qcow2_core::format::AutoclearFeatures;
use qcow2_core::{
    ErrorKind, GuestDisk, Image, Length, Preallocation, StorageError, StorageErrorKind, find_cause,
};
use qcow2_ops::resize::{MAX_DISK_SIZE, Refusal};

/// Why `disk` has its old size. `program`: the name before a warning.
pub(crate) fn not_resized(
    program: &str,
    error: &qcow2_ops::Error,
    preallocation: Preallocation,
    disk: &dyn GuestDisk,
) -> Failure {
    let Some(refusal) = find_cause::<Refusal>(error) else {
        if let Some(failure) = inconsistent_bitmap(error) {
            return failure;
        }
        let reason = error.core_error().map_or_else(|| chain(error), |e| cause(e));
        // A raw file gets its length and its space in one.
        let one_step = preallocation == Preallocation::Falloc && disk.as_raw().is_some();
        let fixed = |error: &StorageError| matches!(error.kind(), StorageErrorKind::FixedLength(_));
        if find_cause::<StorageError>(error).is_some_and(fixed) {
            let raw_data =
                |image: &Image| image.header().features.autoclear.contains(AutoclearFeatures::RAW_DATA_FILE);
            // The exerciser asks for a size at least, and qemu-img for that size.
            if disk.as_image().map_or(program == "qemu-io", raw_data) {
                return Failure::new(reason);
            }
            return Failure::new(reason.replacen("Cannot grow", "Cannot resize", 1));
        }
        // Only a longer L1 table needs clusters.
        if disk.as_image().is_some() && told(error).is_some() {
            return Failure::new(format!("Failed to grow the L1 table: {reason}"));
        }
        if error.kind() != qcow2_ops::ErrorKind::Preallocate && !one_step {
            return Failure::new(format!("Could not resize file: {reason}"));
        }
        let own_file = disk.as_image().is_some_and(|image| !image.header().has_data_file());
        return Failure::new(format!("{}: {reason}", no_space(preallocation, own_file)));
    };
    match refusal {
        Refusal::PreallocationOnDevice(mode) if disk.as_image().is_some() => {
            Failure::new(format!("Failed to resize underlying file: {}", on_device(*mode)))
        }
        refusal => resize_refusal(program, refusal),
    }
}

/// Why a disk is not resized, in QEMU's words.
pub(crate) fn resize_refusal(program: &str, refusal: &Refusal) -> Failure {
    Failure::new(match refusal {
        Refusal::NotPositive => "New image size must be positive".to_owned(),
        Refusal::NothingToPreallocate => "Preallocation can only be used for growing images".to_owned(),
        Refusal::TooLarge(size) => format!("offset({size}) exceeds maximum({MAX_DISK_SIZE})"),
        Refusal::NotSectors(_) => "The new size must be a multiple of 512".to_owned(),
        Refusal::Version2Snapshots => "Can't resize a v2 image which has snapshots".to_owned(),
        Refusal::L1TooLarge => "Failed to grow the L1 table: File too large".to_owned(),
        Refusal::PreallocationOnDevice(mode) => on_device(*mode),
        Refusal::RawMetadata => "Unsupported preallocation mode: metadata".to_owned(),
        Refusal::FixedLength(Length::Window) => FIXED_SIZE.to_owned(),
        Refusal::FixedLength(_) => "Image format driver does not support resize".to_owned(),
        Refusal::WouldShrink => {
            let failure = Failure::new("Use the --shrink option to perform a shrink operation.");
            return failure.hint(format!("{}: warning: {LOSS}", program));
        }
        other => other.to_string(),
    })
}

/// The failure of a change of size that a bitmap stands in the way of, which nobody can correct.
pub(crate) fn inconsistent_bitmap(error: &qcow2_ops::Error) -> Option<Failure> {
    let engine = error.core_error().filter(|engine| engine.kind() == ErrorKind::Inconsistent)?;
    Some(Failure::new(capitalized(&engine.to_string())).hint(INCONSISTENT_HINT))
}

/// What a script may wait for; a person should read it.
const LOSS: &str = "Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an \
                    operation, make sure there is no important data there.";
