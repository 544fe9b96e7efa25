//! What a machine sees: a disk of a given size.

use super::storage::ZeroMode;
use crate::error::Result;
use alloc::sync::Arc;
use core::any::Any;
use qcow2_format::{GuestOffset, GuestRange, HostOffset};

/// How one layer stores a run of guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentState {
    /// Not allocated in this layer: the bytes come from the layer below, or are zeroes without one (or past
    /// its end).
    Unallocated,
    /// The bytes are zeroes. `host`: the place assigned to them all the same (a preallocated zero cluster).
    Zero {
        /// Where the run would be stored, if a place is assigned.
        host: Option<HostOffset>,
    },
    /// The bytes are stored as they are. `host`: where, in the file that holds this layer's data; `None`
    /// where the stored bytes are not the guest's (encrypted).
    Data {
        /// Where the run is stored.
        host: Option<HostOffset>,
    },
    /// The bytes are stored compressed.
    Compressed,
}

/// A run of guest bytes with one state; where there is a host offset, it runs on with the guest offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskExtent {
    /// Bytes in the run, at least 1.
    pub len: u64,
    /// How this layer stores them.
    pub state: ExtentState,
}

/// A disk as a machine sees it: a qcow2 image, a raw file, zeroes. Any number of threads may use it at once.
///
/// Ranges must lie inside `size()`; any alignment is allowed. Errors: `OutOfRange` for a range past the end,
/// `ReadOnly` for a change to a disk opened for reading, `Storage`, `Corrupt`, `Poisoned` after a failed
/// metadata write.
pub trait GuestDisk: Send + Sync {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes from `offset` on, through all layers below.
    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()>;

    /// Writes `buf` from `offset` on. Durable after the next [`flush`](Self::flush).
    ///
    /// Where the storage is full (`Storage`, [`NoSpace`](crate::StorageErrorKind::NoSpace) below) a first
    /// part may be written and nothing else is lost: a qcow2 image goes on, and the same write succeeds when
    /// there is room.
    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()>;

    /// Writes each part at its offset, in any order if they do not overlap. A qcow2 image does it in fewer
    /// and longer writes to its file where the parts ascend and have their clusters to themselves. Errors: as
    /// of [`write_at`](Self::write_at) for one of the parts; any of them may be written then.
    fn write_parts(&self, parts: &[(GuestOffset, &[u8])]) -> Result<()> {
        parts.iter().try_for_each(|(offset, buf)| self.write_at(*offset, buf))
    }

    /// Makes `range` read as zeroes.
    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()>;

    /// Says that the content of `range` no longer matters; whole clusters of it then read as zeroes (or,
    /// where that cannot be recorded, as before).
    fn discard(&self, range: GuestRange) -> Result<()>;

    /// Returns when every change whose call returned before this one is durable.
    fn flush(&self) -> Result<()>;

    /// How this layer alone stores the bytes from `range.start()` on: a run of at most `range.len()` bytes,
    /// as long as is cheap to find out. `range` must not be empty.
    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent>;

    /// The layer below, whose bytes show through where this one has none allocated.
    fn backing(&self) -> Option<&Arc<dyn GuestDisk>> {
        None
    }

    /// Bytes that are best changed together (the cluster size), a power of two; 0 where it makes no
    /// difference.
    fn cluster_size(&self) -> u64 {
        0
    }

    /// Bytes that can be unallocated or zero on their own (the subcluster size), a power of two.
    fn zero_granularity(&self) -> u64 {
        512
    }

    /// The disk itself, for callers that know kinds of disks: `disk.as_image()` and `disk.as_raw()` downcast
    /// it. A wrapper through which the inner disk may be used directly returns the inner disk's. The default:
    /// `None`, a disk of no known kind.
    fn as_any(&self) -> Option<&dyn Any> {
        None
    }

    /// Makes the disk `size` bytes. Errors: `Unsupported` where this kind of disk cannot.
    fn resize(&self, size: u64) -> Result<()>;
}
