//! Judges whether an image of unknown origin is safe to accept.
//!
//! Looks at the bytes only: opens nothing that they name, and decrypts nothing. Any bytes give a report;
//! memory and reads stay below named limits.
//!
//! | what | file |
//! |---|---|
//! | which containers the bytes pass for | `recognise.rs` |
//! | names, features, sizes and content of a qcow2 image | `qcow2.rs` |
//! | the same of VMDK, VHD, VHDX | `vmdk.rs`, `vhd.rs`, `vhdx.rs` |
//! | VDI, LUKS, partition tables | `disk.rs` |
//! | what a name would open | `name.rs` |

mod bytes;
mod disk;
mod finding;
mod name;
mod options;
mod qcow2;
mod recognise;
mod report;
mod vhd;
mod vhdx;
mod vmdk;

pub use finding::{BitsOf, Doubt, Finding, NamedBy, Verdict};
pub use name::{NameKind, NamedFile, references};
pub use options::VetOptions;
pub use report::{MAX_FINDINGS, VetReport};

use crate::error::{Error, ErrorKind, Result};
use bytes::Bytes;
use qcow2_core::format::signature::Container;
use qcow2_core::{Storage, StorageError};
use std::sync::Arc;

/// Judges the bytes in `storage`. Disk: reads headers, tables and, at most 16 MiB each, descriptors and what
/// follows the end of an image; writes nothing. Errors: `Read`: the storage failed.
///
/// ```
/// use qcow2_core::{Storage, StorageError};
/// use qcow2_io::MemoryStorage;
/// use qcow2_ops::vet::{Verdict, VetOptions, vet};
/// use std::sync::Arc;
///
/// let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::from(b"QED\0".to_vec()));
/// let report = vet(&storage, &VetOptions::default())?;
/// assert_eq!(report.verdict(), Verdict::Unsafe);
/// assert_eq!(report.findings[0].to_string(), "format is qed, which is not among the accepted ones");
/// # Ok::<(), qcow2_ops::Error>(())
/// ```
pub fn vet(storage: &Arc<dyn Storage>, options: &VetOptions) -> Result<VetReport> {
    let file = Bytes::new(storage).map_err(failed)?;
    look(storage, &file, options).map_err(failed)
}

fn failed(error: StorageError) -> Error {
    Error::new(ErrorKind::Read, "reading the image").with_source(error)
}

fn look(
    storage: &Arc<dyn Storage>,
    file: &Bytes<'_>,
    options: &VetOptions,
) -> Result<VetReport, StorageError> {
    let seen = recognise::containers(file)?;
    let format = recognise::chosen(&seen, file)?;
    let mut report = VetReport::new(format, file.len());
    for finding in recognise::judge(&seen, format, options) {
        report.found(finding);
    }
    match format {
        None => report.virtual_size = Some(file.len()),
        Some(Container::Qcow2) => qcow2::vet(storage, file, options, &mut report)?,
        Some(Container::Vmdk) => vmdk::vet(file, &mut report)?,
        Some(Container::Vhd) => vhd::vet(file, &mut report)?,
        Some(Container::Vhdx) => vhdx::vet(file, &mut report)?,
        Some(Container::Vdi) => disk::vet_vdi(file, &mut report)?,
        Some(Container::Luks) => disk::vet_luks(file, options, &mut report)?,
        Some(_) => {}
    }
    if seen.contains(&Container::Partitions) {
        disk::vet_partitions(file, &mut report)?;
    }
    if let Some(seen) = report.virtual_size.filter(|&size| size > options.max_virtual_size) {
        report.found(Finding::VirtualSize { seen, allowed: options.max_virtual_size });
    }
    Ok(report)
}
