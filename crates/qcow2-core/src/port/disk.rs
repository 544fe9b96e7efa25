//! The port for guest disks: what a machine sees.

use super::storage::ZeroMode;
use crate::error::Result;
use alloc::sync::Arc;
use core::any::Any;
use qcow2_format::{GuestOffset, GuestRange, HostOffset};

/// How one layer stores a run of guest bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentState {
    /// Not allocated in this layer: the bytes come from the backing file, or are zeroes without one and past
    /// its end.
    Unallocated,
    /// The bytes are zeroes.
    Zero {
        /// The host offset, if clusters are allocated all the same (preallocated zero clusters).
        host: Option<HostOffset>,
    },
    /// The bytes are stored uncompressed.
    Data {
        /// The host offset, in the file that holds this layer's data; `None` if the data is encrypted.
        host: Option<HostOffset>,
    },
    /// The bytes are stored compressed.
    Compressed,
}

/// A run of guest bytes with one state. If the state has a host offset, the whole run is contiguous in the
/// file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskExtent {
    /// Bytes in the run, at least 1.
    pub len: u64,
    /// How this layer stores them.
    pub state: ExtentState,
}

/// A disk as a machine sees it: a qcow2 image, a raw file, a null device. Any number of threads may use it
/// concurrently.
///
/// Ranges must lie inside `size()`; any alignment is allowed. Errors: `OutOfRange` for a range past the end,
/// `ReadOnly` for a change to a disk opened for reading, `NoSpace`, `Storage`, `Corrupt`, `Poisoned` after a
/// failed metadata write.
pub trait GuestDisk: Send + Sync {
    /// The size of the disk in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes at `offset`; unallocated bytes come from the backing chain.
    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()>;

    /// Writes `buf` at `offset`. Durable after the next [`flush`](Self::flush).
    ///
    /// If the storage is full (`NoSpace`) a first part may be written. A qcow2 image stays usable, and the
    /// same write succeeds once there is space.
    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()>;

    /// Writes each part at its offset, in any order if they do not overlap. A qcow2 image needs fewer and
    /// longer writes to its file if the parts ascend and no two touch the same cluster. Errors: as
    /// [`write_at`](Self::write_at); any of the parts may be written then.
    fn write_parts(&self, parts: &[(GuestOffset, &[u8])]) -> Result<()> {
        parts.iter().try_for_each(|(offset, buf)| self.write_at(*offset, buf))
    }

    /// Makes `range` read as zeroes.
    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()>;

    /// Discards `range`: its content no longer matters. Whole clusters read as zeroes afterwards, or as
    /// before if the disk cannot record that.
    fn discard(&self, range: GuestRange) -> Result<()>;

    /// Makes all changes durable whose calls returned before this one.
    fn flush(&self) -> Result<()>;

    /// How this layer alone stores the bytes at `range.start()`: a run of 1 to `range.len()` bytes. The run
    /// may be shorter than possible if finding its end is expensive. `range` must not be empty.
    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent>;

    /// How many disks have nothing at `range.start()`, this one first and then one backing file after the
    /// other, and for how many bytes, at most `range.len()`, none of them has anything. For whoever walks a
    /// chain: it may leave these disks out. They may be more, 0 the least. Default: 0, for all of the range.
    fn layers_without(&self, range: GuestRange) -> (usize, u64) {
        (0, range.len())
    }

    /// The backing file, which unallocated bytes are read from.
    fn backing(&self) -> Option<&Arc<dyn GuestDisk>> {
        None
    }

    /// The preferred unit of changes in bytes (the cluster size), a power of two; 0 if there is none.
    fn cluster_size(&self) -> u64 {
        0
    }

    /// The smallest unit in bytes that can be unallocated or zero (the subcluster size), a power of two.
    fn zero_granularity(&self) -> u64 {
        512
    }

    /// The disk itself, for downcasts: `disk.as_image()` and `disk.as_raw()` use it. A wrapper that callers
    /// may bypass returns the inner disk's. Default: `None`, a disk of no known kind.
    fn as_any(&self) -> Option<&dyn Any> {
        None
    }

    /// The disk that this one shows, if all it does is treat requests in a way of its own: how bytes are
    /// stored is known of that one. Default: `None`.
    fn filtered(&self) -> Option<&Arc<dyn GuestDisk>> {
        None
    }

    /// Makes the disk `size` bytes long. Errors: `Unsupported` if this kind of disk has a fixed size.
    fn resize(&self, size: u64) -> Result<()>;
}

impl dyn GuestDisk + '_ {
    /// The disk behind all filters; itself, if it is none.
    pub fn unfiltered(&self) -> &(dyn GuestDisk + '_) {
        let mut disk = self;
        while let Some(inner) = disk.filtered() {
            disk = &**inner;
        }
        disk
    }
}
