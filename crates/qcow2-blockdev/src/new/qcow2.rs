//! From options by name to those of the engine.

use super::encryption::Encryption;
use super::failure::CreateFailureKind;
use super::options::{NewOptions, no_such};
use crate::driver::may_be_recorded;
use crate::keys::Secrets;
use qcow2_core::format::{CompressionType, Version};
use qcow2_core::{CreateOptions, NewEncryption};

/// The image that `options` describe, known to be possible; its encryption header included, which takes its
/// time. Errors: the first one in QEMU's order.
pub(super) fn plan(options: &NewOptions, secrets: &Secrets) -> Result<CreateOptions, CreateFailureKind> {
    let (mut new, encryption) = read(options, secrets)?;
    new.encryption = encryption.is_some().then_some(NewEncryption::Pending);
    new.check().map_err(CreateFailureKind::Refused)?;
    new.encryption = encryption.map(|encryption| encryption.make()).transpose()?;
    Ok(new)
}

/// The path of the external data file, if there is to be one.
pub(super) fn data_file(options: &NewOptions) -> Option<&str> {
    options.text("data_file").map(|name| name.strip_prefix("file:").unwrap_or(name))
}

/// The options that name one of several choices are read in QEMU's order.
fn read(
    options: &NewOptions,
    secrets: &Secrets,
) -> Result<(CreateOptions, Option<Encryption>), CreateFailureKind> {
    let mut new = CreateOptions::new(options.number("size").unwrap_or(0));
    new.version = match options.text("compat") {
        None | Some("1.1" | "v3") => Version::V3,
        Some("0.10" | "v2") => Version::V2,
        Some(other) => return Err(no_such("compat", other).into()),
    };
    new.backing_file = options.text("backing_file").map(str::to_owned);
    new.backing_format = options.text("backing_fmt").map(str::to_owned);
    if let Some(other) = new.backing_format.as_ref().filter(|name| !may_be_recorded(name)) {
        return Err(no_such("backing_fmt", other).into());
    }
    let encryption = Encryption::of_image(options, secrets)?;
    new.cluster_size = options.number("cluster_size").unwrap_or(new.cluster_size);
    new.preallocation = options.preallocation()?;
    new.lazy_refcounts = options.switch("lazy_refcounts");
    new.refcount_bits = options.number("refcount_bits").unwrap_or(new.refcount_bits);
    new.extended_l2 = options.switch("extended_l2");
    new.compression_type = match options.text("compression_type") {
        None | Some("zlib") => CompressionType::Deflate,
        Some("zstd") => CompressionType::Zstd,
        Some(other) => return Err(no_such("compression_type", other).into()),
    };
    new.data_file = data_file(options).map(str::to_owned);
    new.data_file_raw = options.switch("data_file_raw");
    Ok((new, encryption))
}
