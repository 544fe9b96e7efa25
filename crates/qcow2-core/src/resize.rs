//! Changes the size of the disk.
//!
//! Order on disk when growing: a larger L1 table and its refcounts, barrier, the header's pointer to it,
//! barrier; entries and data that make the new area read as zeroes, barrier; the size last. Shrinking
//! deallocates clusters, and then the L2 tables that map nothing any more, before the size changes; after
//! that the file is truncated behind its last cluster in use. A crash leaves the old size or the new one, and
//! new bytes read as zeroes either way.

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::meta::overlap::OverlapChecks;
use crate::meta::pending::Unlinked;
use crate::port::event::Event;
use crate::sync::atomic::Ordering;
use crate::sync::write;
use crate::write::plan::ZeroKind;
use ::alloc::format;
use core::ops::ControlFlow;
use qcow2_format::HeaderField;
use qcow2_format::bytes::table_bytes;
use qcow2_format::feature::AutoclearFeatures;
use qcow2_format::limit::MAX_L1_TABLE_SIZE;
use qcow2_format::{GuestOffset, GuestRange};

/// Clusters that are deallocated between two calls of `go_on`. Origin: ours, less than a second of work if
/// all are allocated. A hostile file of a few MB can map so many clusters that shrinking it takes hours.
const SHRINK_CLUSTERS: u64 = 1 << 18;

impl Image {
    /// Makes the disk `size` bytes long, a multiple of 512. New bytes read as zeroes, even if the backing
    /// file is longer or the disk was longer before.
    ///
    /// Disk: in the order above; an external data file gets exactly `size` bytes. Errors: `InvalidOption`
    /// for a size that is no multiple of 512 or needs a larger L1 table than allowed, and for 0 bytes of a
    /// disk with bitmaps; `Unsupported` for a version 2 image with snapshots; `NoSpace`; `Storage`, before
    /// anything is written if the data file is a device of another length. Spec: "Header", "Cluster
    /// mapping".
    pub(crate) fn change_size(&self, size: u64) -> Result<()> {
        self.resize_while(size, &mut || ControlFlow::Continue(()))
    }

    /// [`resize`](Image::resize) that the caller can stop while the disk shrinks, from the end downwards:
    /// `go_on` is called every 2^18 clusters. Errors: `Stopped`: the disk has a size between the old and the
    /// new one; otherwise as `resize`.
    pub fn resize_while(&self, size: u64, go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Result<()> {
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        let old = self.size();
        if !size.is_multiple_of(512) {
            return Err(invalid(format!("new size {size} is not a multiple of 512")));
        }
        let header = self.header();
        if header.nb_snapshots > 0 && !self.file.l2_format().zero_flag {
            let message = "a version 2 image with snapshots cannot be resized";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if let Some(data) = self.file.data_file()
            && !data.limits().growable()
        {
            // Changes nothing: a raw data file may be longer than its disk, any other has its length.
            match header.features.autoclear.contains(AutoclearFeatures::RAW_DATA_FILE) {
                true => data.fit(size)?,
                false => data.set_len(size)?,
            }
        }
        self.begin_resize_of_bitmaps(size)?;
        self.begin_change()?;
        let wanted = size;
        let size = if size < old { self.shrink(old, size, go_on)? } else { size };
        if size > old {
            self.grow(old, size)?;
        }
        debug_assert_eq!(self.size(), size, "the size in memory is not the one for the header");
        self.header.update(&[HeaderField::Size(size)])?;
        if let Some(data) = self.file.data_file()
            && data.limits().growable()
        {
            data.set_len(size)?;
        }
        self.resize_bitmaps(size)?;
        if size < old {
            self.cut_tail()?;
        }
        match size == wanted {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::Stopped, format!("resizing was stopped at {size} bytes"))),
        }
    }

    fn grow(&self, old: u64, size: u64) -> Result<()> {
        self.cover_with_l1(size)?;
        self.size.store(size, Ordering::Release);
        // The size in memory changes first, because `zero_range` needs ranges inside the disk; on disk it
        // changes last, so that a crash in between leaves the old size.
        let result = self.zero_new_area(old, size).and_then(|()| self.flusher.flush());
        if result.is_err() {
            self.size.store(old, Ordering::Release);
        }
        result
    }

    /// Zeroes everything past the old end that could show through: the rest of the last cluster, the rest of
    /// a longer backing file, and clusters of a VM state.
    fn zero_new_area(&self, old: u64, size: u64) -> Result<()> {
        let geometry = self.file.geometry();
        let cluster_end = geometry.align_up(old).unwrap_or(old).min(size);
        let backing_end = self.backing.as_ref().map_or(0, |backing| backing.size());
        let first = geometry.l1_entries_for(old);
        let left_over = (first..geometry.l1_entries_for(size)).rev().find(|&i| self.mapping().is_mapped(i));
        let left_end = left_over.map_or(0, |index| (index + 1).saturating_mul(geometry.l2_coverage()));
        let end =
            if self.backing_unopened { size } else { cluster_end.max(backing_end).max(left_end).min(size) };
        self.zero_range(between(old, end), ZeroKind::Unmap)
    }

    /// Makes the L1 table long enough for `size` guest bytes. The caller holds the structure lock for
    /// writing.
    pub(crate) fn cover_with_l1(&self, size: u64) -> Result<()> {
        let needed = self.file.geometry().l1_entries_for(size);
        if needed > MAX_L1_TABLE_SIZE / 8 {
            return Err(invalid(format!(
                "size {size} needs {needed} l1 entries, allowed are {}",
                MAX_L1_TABLE_SIZE / 8
            )));
        }
        if needed > self.mapping().l1_len() { self.move_l1(needed) } else { Ok(()) }
    }

    /// Moves the L1 table to new clusters, with `entries` entries.
    fn move_l1(&self, entries: u64) -> Result<()> {
        // The new table is written with all links that are in memory: what they point to, and its refcounts,
        // must be durable first (I1, I2).
        self.flusher.flush()?;
        let (old_offset, mut table) = self.mapping().l1_contents();
        let old_run = self.tables.run_of(OverlapChecks::ACTIVE_L1, old_offset, table.len() as u64 * 8);
        self.refcounts.check_freeable(old_run)?;
        assert!(entries > table.len() as u64, "an l1 table of {entries} entries or more is moved to grow");
        table.resize(entries as usize, 0);
        let clusters = self.file.geometry().clusters_for(entries * 8);
        let place = self.refcounts.allocate_with_space(OverlapChecks::ACTIVE_L1, clusters)?;
        let bytes = table_bytes(table.iter().copied());
        self.file.event(Event::L1GrowWriteTable);
        let written = self.tables.write(OverlapChecks::ACTIVE_L1, place.offset, &bytes);
        if let Err(error) = written.and_then(|()| self.flusher.flush()) {
            // Nothing leads to the new table yet.
            self.refcounts.unlink(Unlinked { clusters: place.run, kinds: OverlapChecks::ACTIVE_L1 });
            return Err(error);
        }
        self.file.event(Event::L1GrowActivateTable);
        self.header.update(&[HeaderField::L1 { entries: entries as u32, offset: place.offset }])?;
        self.mapping().replace_l1(place.offset, table);
        self.refcounts.unlink(old_run);
        Ok(())
    }

    /// Deallocates the clusters past the new end. (If the disk grows again, growing hides the backing file
    /// there.) Returns the new size, which is larger than `size` if `go_on` has stopped the work.
    fn shrink(&self, old: u64, size: u64, go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Result<u64> {
        let geometry = self.file.geometry();
        let start = geometry.align_up(size).unwrap_or(old);
        let piece = SHRINK_CLUSTERS * geometry.cluster_size();
        // Of a table that goes as a whole, what it maps behind the end of the disk goes too.
        let tables = geometry.l1_entries_for(size)..geometry.l1_entries_for(old);
        let tables_end = tables.end.saturating_mul(geometry.l2_coverage());
        let (mut end, mut size) = (if tables.is_empty() { old } else { tables_end.max(old) }, size);
        let wanted = size;
        while start < end {
            if go_on().is_break() {
                size = end.min(old);
                break;
            }
            // Pieces start at multiples of their length, so that the rest always ends with a cluster.
            let first = ((end - 1) / piece * piece).max(start);
            assert!(first < end, "shrinking makes no progress at {end:#x}");
            self.forget_clusters(between(first, end))?;
            self.flusher.flush_if_pressed()?;
            end = first;
        }
        // The size last: after a failed flush the image has the size in the header, and takes changes.
        self.flusher.settle()?;
        if size == wanted && self.mapping().drop_tables(tables)? {
            self.flusher.settle()?;
        }
        self.size.store(size, Ordering::Release);
        Ok(size)
    }
}

fn invalid(message: ::alloc::string::String) -> Error {
    Error::new(ErrorKind::InvalidOption, message)
}

fn between(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
}
