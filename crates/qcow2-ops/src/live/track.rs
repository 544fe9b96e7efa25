//! Keeps track of what changes in the top of a chain while it is copied into the layer below.

use super::layer::copy_layer;
use super::locks::{AtomicBool, Mutex, Ordering, PoisonError};
use super::regions::Regions;
use super::watched::Watcher;
use crate::error::{Error, Result};
use qcow2_core::{GuestDisk, GuestRange};
use std::sync::Arc;

/// So few regions may be left for the time when requests are held back.
pub(super) const FEW: u64 = 8;

/// The regions of `top` that still have to be copied into `base`. Changes are marked after they are made:
/// whoever copies clears the mark first and reads then, so that a change is either seen or marked.
pub(super) struct Tracking {
    top: Arc<dyn GuestDisk>,
    base: Arc<dyn GuestDisk>,
    pub(super) regions: Regions,
    /// True if changes copy too, until few regions are left: then the number of those falls however much is
    /// written.
    helping: AtomicBool,
    /// Why a change could not copy.
    failure: Mutex<Option<Error>>,
}

impl Tracking {
    pub(super) fn new(top: Arc<dyn GuestDisk>, base: Arc<dyn GuestDisk>) -> Self {
        let regions = Regions::all(top.size());
        Self { top, base, regions, helping: AtomicBool::new(false), failure: Mutex::default() }
    }

    /// From now on every change copies regions before it returns, as long as there are more than [`FEW`].
    pub(super) fn set_helping(&self, helping: bool) {
        self.helping.store(helping, Ordering::SeqCst);
    }

    /// Why a change could not copy; told once.
    pub(super) fn failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Copies the first region from `first` on that needs it; returns its number.
    pub(super) fn copy_one(&self, first: u64, buffer: &mut Vec<u8>) -> Result<Option<u64>> {
        let Some(region) = self.regions.take(first) else { return Ok(None) };
        let bytes = self.regions.bytes(region);
        let copied = copy_layer(&*self.top, &*self.base, bytes, buffer);
        self.regions.give(region);
        if copied.is_err() {
            self.regions.mark(bytes);
        }
        copied.map(|()| Some(region))
    }
}

impl Watcher for Tracking {
    /// An error here is no error of the change: the copying ends, and the chain goes on as it is.
    fn after(&self, bytes: GuestRange) {
        self.regions.mark(bytes);
        let mut buffer = Vec::new();
        while self.helping.load(Ordering::SeqCst) && self.regions.left() > FEW {
            match self.copy_one(0, &mut buffer) {
                Ok(Some(_)) => {}
                // Others copy all that is left.
                Ok(None) => return,
                Err(error) => {
                    self.set_helping(false);
                    *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            }
        }
    }
}
