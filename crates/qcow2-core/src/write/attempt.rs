//! Pins and writes in place that never wait, for one thread that keeps many requests in flight.
//!
//! Such a thread must not wait for a lock: somebody who waits to change the whole image waits for the pins of
//! this very thread. And it should not wait for a table to be read, while requests whose tables are in memory
//! could go on. So everything here says `None` where it would have to wait. The caller then gives the request
//! to a thread that may, or first finishes what it has in flight.

use super::drive::Pin;
use crate::error::Result;
use crate::image::Image;
use crate::inflight::{Claim, Operation, touched_clusters};
use crate::meta::page::SECTOR_SIZE;
use crate::port::disk::DiskExtent;
use crate::read::resolve::Place;
use crate::sync::{RwLockReadGuard, try_read};
use qcow2_format::{GuestRange, HostOffset};

/// The right to write the bytes of a guest range where they lie. There is nothing to commit: drop it when the
/// bytes are written. Until then the clusters stay where they are.
pub struct InPlace<'a> {
    host: HostOffset,
    // Dropped in this order.
    _claim: Claim<'a>,
    _operation: Operation<'a>,
    _structure: RwLockReadGuard<'a, ()>,
}

impl InPlace<'_> {
    /// Where the first byte goes, in the [data storage](Image::data_storage); the others follow.
    pub fn host(&self) -> HostOffset {
        self.host
    }
}

impl Image {
    /// [`pin`](Self::pin) without waiting: `None` if the whole image is being changed, or somebody waits to
    /// change it. A thread may hold any number of these pins.
    pub fn try_pin(&self) -> Option<Pin<'_>> {
        let structure = try_read(&self.structure)?;
        Some(Pin::new(self, structure, self.flusher.enter()))
    }

    /// A write of all of `range` (not empty, inside the disk) where it lies. `None` if that would have to
    /// wait for a table, for another request, or for a change of the whole image; and if the bytes are not
    /// stored in one piece, in clusters of this image alone, inside the file. An image's first change is
    /// never such a one. Disk: nothing is read or written.
    ///
    /// A thread may hold any number of these, and calls no other method of the image meanwhile, but those
    /// that do not wait.
    ///
    /// Errors: `OutOfRange`, `ReadOnly`, `Poisoned`, `Corrupt`.
    pub fn try_write_in_place(&self, range: GuestRange) -> Result<Option<InPlace<'_>>> {
        let range = self.check_change(range.start(), range.len())?;
        if !self.crypt.is_plain() || range.is_empty() {
            return Ok(None);
        }
        let Some(structure) = try_read(&self.structure) else { return Ok(None) };
        // Under the lock: before, the image could be closed.
        self.file.check_writable()?;
        if !self.header.is_changing() {
            return Ok(None);
        }
        let operation = self.flusher.enter();
        let Some(mut claim) = self.mapping().try_share(range.start(), range.len()) else { return Ok(None) };
        // Looked up under the claim: only then the mapping cannot change.
        let Some(run) = self.mapping().cached_lookup(range.start(), range.len())? else { return Ok(None) };
        let Place::Data { host, copied: true } = run.place else { return Ok(None) };
        let end = host.value().saturating_add(run.len).next_multiple_of(SECTOR_SIZE);
        if run.len < range.len() || self.file.data()?.len()? < end {
            return Ok(None);
        }
        self.tables.check_data_place(host, run.len)?;
        self.bitmaps.mark(range);
        claim.narrow(touched_clusters(self.file.geometry(), range.start(), run.len));
        Ok(Some(InPlace { host, _claim: claim, _operation: operation, _structure: structure }))
    }
}

impl Pin<'_> {
    /// [`extent_at`](Self::extent_at) in what is in memory: `None` if a table would have to be read.
    pub fn cached_extent_at(&self, range: GuestRange) -> Result<Option<DiskExtent>> {
        let image = self.image();
        image.check_range(range.start(), range.len())?;
        // An image that takes no changes reads past the cache of tables.
        let run = match image.indexed_run(range) {
            None => image.mapping().cached_lookup(range.start(), range.len())?,
            known => known,
        };
        Ok(run.map(|run| image.extent_from(run)))
    }
}
