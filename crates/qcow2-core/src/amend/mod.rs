//! Changes version, features and names in the header of an image.
//!
//! Each change is prepared on disk, made durable, and switched on with one sector of the header; a crash
//! leaves the old image or the new one. Cached properties of the open image (refcount width, zero flag) are
//! stale after some of these calls, so they poison the image: the caller reopens it to go on.

mod downgrade;
mod width;

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::sync::write;
use ::alloc::string::String;
use core::ops::ControlFlow;
use qcow2_format::Version;
use qcow2_format::feature::{AutoclearFeatures, CompatibleFeatures};
use qcow2_format::text::bytes_of;

/// Called with the number of finished steps and the total; returns whether to go on. After a stop the image
/// is unchanged, or partly changed with the same guest data.
pub type AmendProgress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + 'a;

/// Turns a caller's `Break` into the error `Stopped`.
fn stopped(flow: ControlFlow<()>) -> Result<()> {
    match flow {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::new(ErrorKind::Stopped, "amending was stopped")),
    }
}

/// Changes in the header only. `None` leaves a field as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeaderChange {
    /// True to allow writers to postpone refcount updates. Version 3 only.
    pub lazy_refcounts: Option<bool>,
    /// The external data file's name; empty removes the name. Only for an image with a data file.
    pub data_file: Option<String>,
    /// True to clear the autoclear bit for a raw data file, which promises that the external data file is the
    /// guest disk byte for byte.
    pub forget_raw_data_file: bool,
}

impl Image {
    /// Writes `change` to the header; durable when it returns. The open image keeps using the data file that
    /// it has opened. Errors: `Unsupported` for lazy refcounts in version 2, or a data file's name without a
    /// data file; `Format` if the header gets too long; `ReadOnly`, `Poisoned`, `Storage`.
    pub fn change_header(&self, change: &HeaderChange) -> Result<()> {
        self.flush()?;
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        let mut header = self.header();
        if let Some(lazy) = change.lazy_refcounts {
            if lazy && header.version < Version::V3 {
                let message = "lazy refcounts need version 3";
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            header.features.compatible =
                header.features.compatible.with(CompatibleFeatures::LAZY_REFCOUNTS, lazy);
        }
        if let Some(name) = &change.data_file {
            if !header.has_data_file() {
                return Err(Error::new(ErrorKind::Unsupported, "image has no external data file"));
            }
            header.extensions.data_file = Some(bytes_of(name).into_owned()).filter(|name| !name.is_empty());
        }
        if change.forget_raw_data_file {
            header.features.autoclear =
                header.features.autoclear.with(AutoclearFeatures::RAW_DATA_FILE, false);
        }
        if header == self.header() {
            return Ok(());
        }
        self.header.switch_to(header)
    }

    /// Upgrades a version 2 image to version 3. The image takes no changes afterwards: reopen it. Disk:
    /// writes a snapshot table with the fields that version 3 requires, then the header. Errors: `Corrupt`
    /// for a damaged snapshot table; `ReadOnly`, `Poisoned`, `Storage`.
    pub fn upgrade(&self) -> Result<()> {
        self.flush()?;
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        if self.header().version >= Version::V3 {
            return Ok(());
        }
        if self.header().nb_snapshots > 0 {
            self.rewrite_snapshot_table()?;
        }
        self.flusher.settle()?;
        let mut header = self.header();
        header.version = Version::V3;
        self.header.switch_to(header)?;
        self.end_use();
        Ok(())
    }

    /// Refuses further changes through this `Image`: its cached properties are stale.
    fn end_use(&self) {
        self.file.poison();
    }
}
