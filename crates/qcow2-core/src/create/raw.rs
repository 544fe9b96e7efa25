//! Creates disks of other formats: raw disks and LUKS containers.

use super::options::{LuksArea, Preallocation, RawOptions};
use super::{refused, space_on, write_zeroes};
use crate::error::Result;
use crate::port::storage::Storage;
use ::alloc::sync::Arc;
use qcow2_format::HostOffset;

/// Creates a raw disk. `storage`: empty. Disk: sets the length, reserves space or writes zeroes, then a
/// barrier.
///
/// Errors: `InvalidOption` with a [`Refusal`](super::Refusal) as source, before anything is written;
/// `NoSpace`, `Storage`.
pub fn create_raw(storage: &Arc<dyn Storage>, options: &RawOptions) -> Result<()> {
    options.check().map_err(refused)?;
    let space = space_on(&**storage, options.preallocation).map_err(refused)?;
    let size = options.size.next_multiple_of(512);
    match space {
        Preallocation::Falloc if size > 0 => storage.allocate(HostOffset::default(), size)?,
        Preallocation::Full => {
            // A length that the storage cannot have fails before any data is written.
            storage.fit(size)?;
            write_zeroes(&**storage, 0, size)?;
        }
        _ => storage.fit(size)?,
    }
    Ok(storage.flush()?)
}

/// Creates a LUKS container. `storage`: empty, unless it is a device. `options.size` includes the header; 0
/// keeps the current length. `area`: the header. Disk: sets the length, reserves space or writes zeroes,
/// barrier; the header, barrier.
///
/// Errors: as [`create_raw`].
pub fn create_container(storage: &Arc<dyn Storage>, options: &RawOptions, area: &LuksArea) -> Result<()> {
    options.check_container().map_err(refused)?;
    if options.size > 0 {
        // All metadata that a container has is its header.
        let preallocation = match options.preallocation {
            Preallocation::Metadata => Preallocation::Off,
            other => other,
        };
        create_raw(storage, &RawOptions { preallocation, ..*options })?;
    }
    storage.write_at(HostOffset::default(), &area.0)?;
    Ok(storage.flush()?)
}
