//! Prepare, move, commit for callers that move the bytes themselves: an io_uring loop, a VMM.
//!
//! The engine says where bytes are and where they go; it never sees them. The pieces of a prepared write may
//! be written in any order and at the same time; `commit` comes after the last one has been written.

use super::prepare::{Edge, Prepared};
use crate::error::Result;
use crate::image::Image;
use crate::inflight::Operation;
use crate::port::disk::DiskExtent;
use crate::port::storage::ZeroMode;
use crate::sync::{RwLockReadGuard, read};
use qcow2_format::{GuestOffset, GuestRange, HostOffset};

/// Keeps every mapping that was looked up through it valid: no cluster that an extent named is used for
/// anything else before the pin is dropped. Drop it as soon as the bytes are read; freed space waits for it.
pub struct Pin<'a> {
    image: &'a Image,
    _structure: RwLockReadGuard<'a, ()>,
    _operation: Operation<'a>,
}

/// A place for a first part of a guest write. Dropped without [`commit`](Self::commit), nothing has happened.
pub struct WriteTicket<'a> {
    image: &'a Image,
    range: GuestRange,
    prepared: Prepared<'a>,
    _structure: RwLockReadGuard<'a, ()>,
    _operation: Operation<'a>,
}

/// Something to be written before the commit, at a place in the [data storage](Image::data_storage).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Piece<'a> {
    /// The caller's own bytes, the whole of [`WriteTicket::range`].
    Guest {
        /// Where they go.
        host: HostOffset,
    },
    /// Bytes that have to stand beside the caller's (copied from where they were).
    Bytes {
        /// Where they go.
        host: HostOffset,
        /// What they are.
        bytes: &'a [u8],
    },
    /// Zeroes.
    Zeroes {
        /// Where they go.
        host: HostOffset,
        /// How many bytes.
        len: u64,
    },
}

impl Image {
    /// Starts reading the data plane directly. Not to be held while the same thread asks the image for
    /// anything else.
    pub fn pin(&self) -> Pin<'_> {
        Pin { image: self, _structure: read(&self.structure), _operation: self.flusher.enter() }
    }

    /// Finds a place for a first part of a write to `range` (not empty, inside the disk). Disk: may read L2
    /// tables and the bytes around the write; a new L2 table may be written; the data storage grows to the
    /// end of the pieces, so that its length is right even where they are written through another file
    /// descriptor. Waits while somebody else changes the mapping of the same clusters, and changes of it wait
    /// until the ticket is committed or dropped: a thread must not hold a ticket while it prepares another
    /// write to one of its clusters, or zeroes or discards one, and threads that hold several at once take
    /// them in ascending order of guest offsets.
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
        assert!(prepared.len > 0 && prepared.len <= range.len(), "a ticket for other bytes than asked for");
        self.grow_to_pieces(&prepared)?;
        let range =
            GuestRange::between(range.start(), GuestOffset::new(range.start().value() + prepared.len));
        Ok(WriteTicket { image: self, range, prepared, _structure: structure, _operation: operation })
    }

    /// Grows the storage to the end of the pieces before anybody writes them. The caller may write through a
    /// file descriptor of its own, which a storage that caches its length does not notice: its next `set_len`
    /// would truncate the data, and clusters past the cached end that were used and freed would be taken for
    /// a hole.
    fn grow_to_pieces(&self, prepared: &Prepared<'_>) -> Result<()> {
        let data = self.file.data()?;
        let place = |edge: &Edge| match edge {
            Edge::Bytes { host, bytes } => (host.value(), host.value() + bytes.len() as u64),
            Edge::Zeroes { host, len } => (host.value(), host.value() + len),
        };
        let own = (prepared.host.value(), prepared.host.value() + prepared.len);
        let (start, end) = prepared.edges.iter().map(place).fold(own, |a, b| (a.0.min(b.0), a.1.max(b.1)));
        let len = data.len()?;
        if end <= len || !data.limits().growable {
            return Ok(());
        }
        // The range is claimed for this write, and past the end it holds nothing yet: zeroing destroys no
        // data.
        let start = start.max(len);
        Ok(data.write_zeroes(HostOffset::new(start), end - start, ZeroMode::MayUnmap)?)
    }
}

impl Pin<'_> {
    /// Where the bytes from `range.start()` on are in this layer; see
    /// [`GuestDisk::extent_at`](crate::GuestDisk::extent_at). Host offsets are places in the [data
    /// storage](Image::data_storage).
    pub fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        self.image.check_range(range.start(), range.len())?;
        self.image.extent_of(range)
    }
}

impl WriteTicket<'_> {
    /// The part of the request that this ticket is for: it begins where the request did.
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

    /// Whether the commit changes the mapping. If not, the bytes go where they already are.
    pub fn changes_mapping(&self) -> bool {
        self.prepared.changes_mapping()
    }

    /// Makes the written bytes visible. Durable after the next [`flush`](crate::GuestDisk::flush), which
    /// makes the data storage durable first: all pieces must have reached it.
    pub fn commit(self) -> Result<()> {
        let Self { image, prepared, _structure, _operation, .. } = self;
        prepared.commit()?;
        drop(_operation);
        drop(_structure);
        image.flusher.flush_if_pressed()
    }
}
