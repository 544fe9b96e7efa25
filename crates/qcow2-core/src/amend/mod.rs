//! Changing what an image is: version, features, names in the header.
//!
//! Each change is prepared on disk, made durable, and then comes true with one sector of the header; a crash
//! leaves the image before it or after it. What the open image knows of itself (the width of refcounts,
//! whether there is a zero flag) is stale after such calls: they end the use of the image, and the caller who
//! goes on opens it again.

mod downgrade;
mod width;

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::sync::write;
use ::alloc::string::String;
use core::ops::ControlFlow;
use qcow2_format::Version;
use qcow2_format::feature::{AutoclearFeatures, CompatibleFeatures};

/// Called with the number of steps done and the number of all steps; returns whether to go on. A caller that
/// stops finds the image as it was, or partly changed with the same guest content.
pub type AmendProgress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + 'a;

/// The error of a caller that stopped.
fn stopped(flow: ControlFlow<()>) -> Result<()> {
    match flow {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::new(ErrorKind::Stopped, "amending was stopped")),
    }
}

/// Changes that take place in the header alone; `None` leaves a thing as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeaderChange {
    /// Whether refcounts may be brought up to date later. Version 3 only.
    pub lazy_refcounts: Option<bool>,
    /// The external data file's name; empty: none is recorded. Only where there is such a file.
    pub data_file: Option<String>,
    /// The external data file need not be the guest disk byte for byte any more.
    pub forget_raw_data_file: bool,
}

impl Image {
    /// Makes `change` durable. The open image goes on with the data file it has. Errors: `Unsupported` for
    /// what the version or the image does not have; `Format` where the header gets too long; `ReadOnly`,
    /// `Poisoned`, `Storage`.
    pub fn change_header(&self, change: &HeaderChange) -> Result<()> {
        self.flush()?;
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        let mut header = self.header();
        if let Some(lazy) = change.lazy_refcounts {
            if lazy && header.version < Version::V3 {
                let message = "lazy refcounts are for version 3";
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            header.features.compatible =
                header.features.compatible.with(CompatibleFeatures::LAZY_REFCOUNTS, lazy);
        }
        if let Some(name) = &change.data_file {
            if !header.has_data_file() {
                return Err(Error::new(ErrorKind::Unsupported, "image has no external data file"));
            }
            header.extensions.data_file = Some(name.clone().into_bytes()).filter(|name| !name.is_empty());
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

    /// Makes a version 2 image a version 3 one, and ends its use. Disk: a snapshot table whose entries say
    /// all that version 3 wants, then the header. Errors: `Corrupt` for a damaged snapshot table; `ReadOnly`,
    /// `Poisoned`, `Storage`.
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

    /// Nothing is changed through this image any more: it is not what it was.
    fn end_use(&self) {
        self.file.poison();
    }
}
