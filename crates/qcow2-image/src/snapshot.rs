//! Internal snapshots of a disk.

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use qcow2_core::NewSnapshot;
use qcow2_core::format::snapshot::Snapshot;
use qcow2_ops::snapshot::{SnapshotName, apply, create, delete};
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

/// Internal snapshots. They are selected by id or, if no snapshot has that id, by name.
impl Disk {
    /// The image's snapshots. Errors: `Unsupported` for a disk that is not qcow2, `Corrupt`, `Io`.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let step = "listing snapshots";
        self.image(step)?.snapshots().map_err(|e| self.failed(step, e))
    }

    /// Takes a snapshot of the disk, durably. Requests of other threads wait meanwhile. Errors: `Unsupported`
    /// with an external data file, `NoSpace`, `ReadOnly`, `Corrupt`, `Poisoned`, `Io`.
    pub fn create_snapshot(&self, name: &str) -> Result<Snapshot> {
        let step = || format!("taking snapshot '{}'", name.escape_debug());
        let mut new = NewSnapshot::default();
        new.name = name.into();
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        new.date_seconds = u32::try_from(since_1970.as_secs()).unwrap_or(u32::MAX);
        new.date_nanoseconds = since_1970.subsec_nanos();
        self.changed(create(self.image(&step())?, &new), step)
    }

    /// Opens the snapshot as a separate read-only disk; this disk stays usable. No snapshot can be deleted
    /// while it is open, and the image stays locked until both disks are closed. Errors: `NotFound`,
    /// `Unsupported`, `Corrupt`, `Io`.
    pub fn open_snapshot(&self, name: &str) -> Result<Self> {
        let token = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        let mut snapshot = Self::snapshot_in(self.path(), self.source.clone(), &self.options, name)?;
        snapshot.snapshot_of = Some(Arc::clone(&token));
        Ok(snapshot)
    }

    /// Reverts the disk to the snapshot, including its size. Data written since then is lost; the snapshot
    /// remains. Errors: `NotFound`; `Unsupported` with persistent bitmaps or an external data file;
    /// `NoSpace`, `ReadOnly`, `Corrupt`, `Poisoned`, `Io`.
    pub fn apply_snapshot(&self, name: &str) -> Result<()> {
        let step = || format!("applying snapshot '{}'", name.escape_debug());
        self.changed(apply(self.image(&step())?, &SnapshotName::Any(name.to_owned())), step)
    }

    /// Deletes a snapshot and frees the clusters that only it used. Errors: `NotFound`; `InUse` while a
    /// snapshot of this disk is [open](Self::open_snapshot); `NoSpace`, `ReadOnly`, `Corrupt`, `Poisoned`,
    /// `Io`.
    pub fn delete_snapshot(&self, name: &str) -> Result<()> {
        let step = || format!("deleting snapshot '{}'", name.escape_debug());
        // Held until the deletion is done, so that no other thread opens the snapshot meanwhile.
        let token = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        if Arc::strong_count(&token) > 1 {
            let reason = step() + ": a snapshot of this disk is open";
            return Err(Error::new(ErrorKind::InUse, self.path(), reason));
        }
        self.changed(delete(self.image(&step())?, &SnapshotName::Any(name.to_owned())), step)
    }
}
