//! Prepare, move, commit for callers that do the data I/O themselves: an io_uring loop, a VMM.
//!
//! The engine gives host offsets and never sees the guest's bytes. The caller may write the pieces of a
//! prepared write in any order and concurrently, and calls `commit` after the last one has been written.

use super::prepare::{Edge, Prepared};
use crate::error::Result;
use crate::image::Image;
use crate::inflight::Operation;
use crate::port::disk::DiskExtent;
use crate::port::storage::ZeroMode;
use crate::sync::{RwLockReadGuard, read};
use qcow2_format::{GuestOffset, GuestRange, HostOffset};

/// Keeps the host offsets valid that are looked up through it: none of their clusters is freed before the pin
/// is dropped. Drop it as soon as the bytes are read: unlinked clusters cannot be freed while it is held.
pub struct Pin<'a> {
    image: &'a Image,
    _structure: RwLockReadGuard<'a, ()>,
    _operation: Operation<'a>,
}

/// A prepared write of a first part of a range. Holds the claim on its guest clusters. Dropping it without
/// [`commit`](Self::commit) frees the reserved clusters and leaves the mapping as it was.
pub struct WriteTicket<'a> {
    image: &'a Image,
    range: GuestRange,
    prepared: Prepared<'a>,
    _structure: RwLockReadGuard<'a, ()>,
    _operation: Operation<'a>,
}

/// A piece to write to the [data storage](Image::data_storage) before the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Piece<'a> {
    /// The caller's own bytes, the whole of [`WriteTicket::range`].
    Guest {
        /// The host offset to write to.
        host: HostOffset,
    },
    /// A copy-on-write edge: bytes of the same clusters from their old host offset.
    Bytes {
        /// The host offset to write to.
        host: HostOffset,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// A copy-on-write edge of zeroes.
    Zeroes {
        /// The host offset to write to.
        host: HostOffset,
        /// Length in bytes.
        len: u64,
    },
}

impl Image {
    /// Starts a read by the caller's own I/O. The thread must not call other methods of the image while it
    /// holds the pin: changes of the whole image wait for the pin, and a second request behind them
    /// deadlocks.
    pub fn pin(&self) -> Pin<'_> {
        Pin::new(self, read(&self.structure), self.flusher.enter())
    }

    /// Prepares a write of a first part of `range` (not empty, inside the disk): reserves host clusters and
    /// collects the copy-on-write edges. Disk: may read L2 tables and the bytes around the write; may write a
    /// new L2 table; grows the data storage to the end of the pieces, so that its length is right even if the
    /// caller writes through another file descriptor.
    ///
    /// Waits for claims of other requests on the same clusters, and other requests wait until this ticket is
    /// committed or dropped. So a thread that holds a ticket must not prepare another write to one of its
    /// clusters, nor zero or discard one. A thread that holds several tickets must take them in ascending
    /// order of guest offsets.
    ///
    /// Errors: as [`GuestDisk::write_at`](crate::GuestDisk::write_at).
    pub fn prepare_write(&self, range: GuestRange) -> Result<WriteTicket<'_>> {
        let range = self.check_change(range.start(), range.len())?;
        self.crypt.check_plain("bytes of an encrypted image cannot be moved by the caller")?;
        let structure = read(&self.structure);
        let operation = self.flusher.enter();
        self.begin_change()?;
        self.bitmaps.mark(range);
        let prepared = self.prepare(range.start(), range.len())?;
        assert!(prepared.len > 0 && prepared.len <= range.len(), "a ticket for a wrong length");
        self.grow_to_pieces(&prepared)?;
        let range =
            GuestRange::between(range.start(), GuestOffset::new(range.start().value() + prepared.len));
        Ok(WriteTicket { image: self, range, prepared, _structure: structure, _operation: operation })
    }

    /// Grows the storage to the end of the pieces before the caller writes them. The caller may use a file
    /// descriptor of its own, and a storage that caches its length would not notice: its next `set_len` would
    /// truncate the data, and it would take clusters past the cached end for a hole even after they were used
    /// and freed.
    fn grow_to_pieces(&self, prepared: &Prepared<'_>) -> Result<()> {
        let data = self.file.data()?;
        let place = |edge: &Edge| match edge {
            Edge::Bytes { host, bytes } => (host.value(), host.value() + bytes.len() as u64),
            Edge::Zeroes { host, len } => (host.value(), host.value() + len),
        };
        let own = (prepared.host.value(), prepared.host.value() + prepared.len);
        let (start, end) = prepared.edges.iter().map(place).fold(own, |a, b| (a.0.min(b.0), a.1.max(b.1)));
        let len = data.len()?;
        if end <= len || !data.limits().growable() {
            return Ok(());
        }
        // The range is reserved for this write and lies past the end of the file, so zeroing destroys no
        // data.
        let start = start.max(len);
        Ok(data.write_zeroes(HostOffset::new(start), end - start, ZeroMode::MayUnmap)?)
    }
}

impl<'a> Pin<'a> {
    pub(super) fn new(
        image: &'a Image,
        structure: RwLockReadGuard<'a, ()>,
        operation: Operation<'a>,
    ) -> Self {
        Self { image, _structure: structure, _operation: operation }
    }

    pub(super) fn image(&self) -> &'a Image {
        self.image
    }

    /// How this layer stores the bytes at `range.start()`; see
    /// [`GuestDisk::extent_at`](crate::GuestDisk::extent_at). Host offsets are offsets in the [data
    /// storage](Image::data_storage).
    pub fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        self.image.check_range(range.start(), range.len())?;
        self.image.extent_of(range)
    }
}

impl WriteTicket<'_> {
    /// The part of the requested range that this ticket covers; it starts at the same offset.
    pub fn range(&self) -> GuestRange {
        self.range
    }

    /// Everything that must be written before the commit.
    pub fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let own = core::iter::once(Piece::Guest { host: self.prepared.host });
        own.chain(self.prepared.edges.iter().map(|edge| match edge {
            Edge::Bytes { host, bytes } => Piece::Bytes { host: *host, bytes },
            Edge::Zeroes { host, len } => Piece::Zeroes { host: *host, len: *len },
        }))
    }

    /// True if the commit changes the mapping; false if the write goes in place.
    pub fn changes_mapping(&self) -> bool {
        self.prepared.changes_mapping()
    }

    /// Makes the written bytes visible to readers. All pieces must have been written to the data storage.
    /// Durable after the next [`flush`](crate::GuestDisk::flush), which flushes the data storage before the
    /// mapping.
    pub fn commit(self) -> Result<()> {
        let Self { image, prepared, _structure, _operation, .. } = self;
        prepared.commit()?;
        drop(_operation);
        drop(_structure);
        image.flusher.flush_if_pressed()
    }
}
