//! The formats of new images.

use super::failure::{CreateFailure, CreateFailureKind};
use crate::driver::{Driver, is_known_driver, makes_no_images};
use qcow2_core::ImageFormat;
use std::path::Path;

/// The format `name`, if images of it are made here: `qcow2`, `raw` or `luks`, or the name of a driver of
/// plain bytes, `file`, `host_device`, `host_cdrom` or `nbd`. Errors: `UnknownFormat`, `NoCreation`.
pub fn new_image_format(name: &str) -> Result<ImageFormat, CreateFailure> {
    let format = ImageFormat::from_name(name);
    match format {
        ImageFormat::Raw | ImageFormat::Qcow2 | ImageFormat::Luks => Ok(format),
        _ if bytes_driver(&format).is_some() => Ok(format),
        _ if makes_no_images(name) => Err(CreateFailure::new(&format, CreateFailureKind::NoCreation)),
        _ => Err(CreateFailure::new(&format, CreateFailureKind::UnknownFormat)),
    }
}

/// The driver of plain bytes that `format` names in place of a format, if it does.
pub(super) fn bytes_driver(format: &ImageFormat) -> Option<Driver> {
    Driver::parse(format.name()).filter(|driver| driver.is_file() || *driver == Driver::Nbd)
}

/// The format `name`, if an image of it can be measured: `qcow2`, `raw` or `luks`. Errors: `NoMeasurement`
/// for others that QEMU makes images of, `NoCreation`, `UnknownFormat`.
pub fn measured_format(name: &str) -> Result<ImageFormat, CreateFailure> {
    let format = ImageFormat::from_name(name);
    let kind = match format {
        ImageFormat::Raw | ImageFormat::Qcow2 | ImageFormat::Luks => return Ok(format),
        _ if makes_no_images(name) => CreateFailureKind::NoCreation,
        _ if is_known_driver(name) => CreateFailureKind::NoMeasurement,
        _ => CreateFailureKind::UnknownFormat,
    };
    Err(CreateFailure::new(&format, kind))
}

/// The format `name`, if images of it can be amended: `qcow2` or `luks`. Errors: `UnknownFormat`,
/// `NoAmendment`.
pub fn amended_format(name: &str) -> Result<ImageFormat, CreateFailure> {
    let format = ImageFormat::from_name(name);
    match format {
        ImageFormat::Qcow2 | ImageFormat::Luks => Ok(format),
        _ if is_known_driver(name) => Err(CreateFailure::new(&format, CreateFailureKind::NoAmendment)),
        _ => Err(CreateFailure::new(&format, CreateFailureKind::UnknownFormat)),
    }
}

/// The format that the ending of a file's name stands for; raw for an ending that stands for none. Errors:
/// `UnknownFormat` for the ending of a format that is not made here, which raw bytes would belie.
///
/// ```
/// use qcow2_blockdev::format_of_ending;
/// use qcow2_core::ImageFormat;
///
/// assert_eq!(format_of_ending("disk.qcow2")?, ImageFormat::Qcow2);
/// assert_eq!(format_of_ending("disk.img")?, ImageFormat::Raw);
/// assert_eq!(format_of_ending("disk.vmdk").unwrap_err().format().name(), "vmdk");
/// # Ok::<(), qcow2_blockdev::CreateFailure>(())
/// ```
pub fn format_of_ending(name: &str) -> Result<ImageFormat, CreateFailure> {
    let ending = Path::new(name).extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    match &*ending {
        "qcow2" => Ok(ImageFormat::Qcow2),
        "luks" => Ok(ImageFormat::Luks),
        "vmdk" | "vdi" | "vhd" | "vpc" | "vhdx" | "qed" | "qcow" | "parallels" => {
            let format = ImageFormat::Other(ending);
            Err(CreateFailure::new(&format, CreateFailureKind::UnknownFormat))
        }
        _ => Ok(ImageFormat::Raw),
    }
}
