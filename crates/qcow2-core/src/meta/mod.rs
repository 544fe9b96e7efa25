//! The tables that say what is where: cached, changed, and written back in an order that survives a crash.

pub(crate) mod alloc;
pub(crate) mod bulk;
pub(crate) mod cache;
pub(crate) mod extension;
pub(crate) mod flush;
pub(crate) mod grow;
pub(crate) mod guard;
pub(crate) mod header;
pub(crate) mod header_switch;
pub(crate) mod known;
pub(crate) mod l1;
pub(crate) mod mapping;
pub(crate) mod overlap;
pub(crate) mod page;
pub(crate) mod pending;
pub(crate) mod run;

use crate::error::{Error, ErrorKind, Result};
use crate::inflight::{Claims, Operations};
use crate::port::event::{Event, Events};
use crate::port::storage::Storage;
use crate::read::expanded::ExpandedClusters;
use crate::rules::Rules;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, RwLock};
use ::alloc::string::String;
use ::alloc::sync::Arc;
use qcow2_format::HeaderField;
use qcow2_format::feature::IncompatibleFeatures;
use qcow2_format::l2::L2Format;
use qcow2_format::{Geometry, Version};

/// Everything that is known about an open image's metadata.
pub(crate) struct Meta {
    pub(crate) geometry: Geometry,
    pub(crate) l2_format: L2Format,
    pub(crate) storage: Arc<dyn Storage>,
    /// Where guest data lives: the image file itself, or the external data file; `None` where that was not
    /// opened.
    pub(crate) data: Option<Arc<dyn Storage>>,
    pub(crate) header: Mutex<header::HeaderState>,
    pub(crate) l1: l1::L1Table,
    pub(crate) l2_cache: cache::PageCache,
    pub(crate) refcount_cache: cache::PageCache,
    pub(crate) refcounts: Mutex<alloc::Refcounts>,
    /// Held while refcount pages or the refcount table are being written.
    pub(crate) refcount_io: Mutex<()>,
    pub(crate) guard: guard::Guard,
    pub(crate) pending: Mutex<pending::PendingFrees>,
    /// Open (read) while mapping words change, closed (write) while a write-back copies them.
    pub(crate) gate: RwLock<()>,
    /// Held while an L1 entry gets a new L2 table.
    pub(crate) table_lock: Mutex<()>,
    /// Held for a flush round.
    pub(crate) flushing: Mutex<()>,
    /// How many flush rounds have begun.
    pub(crate) flush_rounds: AtomicU64,
    pub(crate) expanded: ExpandedClusters,
    pub(crate) operations: Operations,
    pub(crate) claims: Claims,
    pub(crate) poisoned: AtomicBool,
    /// Whether the header's warnings for a changing image are on disk.
    pub(crate) changing: AtomicBool,
    pub(crate) writable: bool,
    /// Opened to be repaired: damage is expected.
    pub(crate) for_repair: bool,
    /// Whether freed host clusters are given back to the storage.
    pub(crate) discard_freed: bool,
    /// Whether discarded and zeroed clusters keep their host clusters.
    pub(crate) discard_no_unref: bool,
    pub(crate) overlap_checks: overlap::OverlapChecks,
    pub(crate) rules: Rules,
    /// Who is told of the steps, if anybody is.
    pub(crate) events: Option<Arc<dyn Events>>,
}

impl Meta {
    /// Refuses changes to an image that was opened for reading or whose metadata could not be written.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if !self.writable {
            return Err(Error::new(ErrorKind::ReadOnly, "image is opened for reading only"));
        }
        if self.poisoned.load(Ordering::Acquire) {
            return Err(Error::new(
                ErrorKind::Poisoned,
                "an earlier metadata write failed; the image takes no changes until it is reopened",
            ));
        }
        Ok(())
    }

    /// Tells of a step right before its storage call.
    pub(crate) fn event(&self, event: Event) {
        if let Some(events) = &self.events {
            events.event(event);
        }
    }

    /// Passes a metadata result through; a failure poisons the image.
    pub(crate) fn poison_on_error<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.poisoned.store(true, Ordering::Release);
        }
        result
    }

    /// Sets the header's corrupt bit and refuses every further change; returns the error to report. Where the
    /// bit cannot be written (version 2, a failing storage) the refusal alone remains. Whoever repairs knows
    /// already.
    pub(crate) fn mark_corrupt(&self, message: String) -> Error {
        let header = self.header();
        if self.writable && !self.for_repair && header.version >= Version::V3 && !header.is_corrupt() {
            let marked = header.incompatible_features.with(IncompatibleFeatures::CORRUPT, true);
            let _ = self.update_header(&[HeaderField::Incompatible(marked)]);
        }
        if !self.for_repair {
            self.poisoned.store(true, Ordering::Release);
        }
        Error::corrupt(message)
    }

    /// Where guest data lives. Errors: `Resolve` where the data file was not opened.
    pub(crate) fn data(&self) -> Result<&Arc<dyn Storage>> {
        self.data
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::Resolve, "the external data file was not opened"))
    }

    /// Whether guest data lives outside the image file.
    pub(crate) fn has_data_file(&self) -> bool {
        self.l2_format.external_data
    }
}
