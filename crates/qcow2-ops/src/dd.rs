//! Copies a byte range of a disk to the start of another.

use crate::convert::has_old_bytes;
use crate::copy::{CopyPlan, CopyReport, copy};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::pipeline::Order;
use crate::progress::Progress;
use crate::source::{Below, Content, SECTOR, Source};
use qcow2_core::{
    DiskExtent, Error as CoreError, ErrorKind as CoreErrorKind, ExtentState, GuestDisk, GuestOffset,
    GuestRange, ZeroMode,
};
use std::ops::Range;
use std::sync::Arc;

/// The range, in blocks as `dd` counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DdOptions {
    /// Block size in bytes, at least 1.
    pub block_size: u64,
    /// End of the range in blocks from the start of the disk, skipped blocks included; `None`: the end of the
    /// disk.
    pub count: Option<u64>,
    /// Number of blocks skipped at the start.
    pub skip: u64,
}

impl Default for DdOptions {
    fn default() -> Self {
        Self { block_size: 512, count: None, skip: 0 }
    }
}

impl DdOptions {
    /// With blocks of this many bytes.
    #[must_use]
    pub fn with_block_size(self, block_size: u64) -> Self {
        Self { block_size, ..self }
    }

    /// With an end in blocks from the start of the disk; `None`: that of the disk.
    #[must_use]
    pub fn with_count(self, count: Option<u64>) -> Self {
        Self { count, ..self }
    }

    /// With this many blocks skipped at the start.
    #[must_use]
    pub fn with_skip(self, skip: u64) -> Self {
        Self { skip, ..self }
    }
}

/// The bytes selected by `options` on a disk of `size` bytes, rounded up to a multiple of 512. `None` if the
/// range would start past the end of the disk or past `count`.
pub fn dd_range(size: u64, options: &DdOptions) -> Option<Range<u64>> {
    let size = size.checked_next_multiple_of(SECTOR)?;
    let start = options.skip.saturating_mul(options.block_size);
    let end = options.count.map_or(size, |count| count.saturating_mul(options.block_size).min(size));
    (start <= end).then_some(start..end)
}

/// Writes `range` of `source` (see [`dd_range`]) to the start of `target`, which is new and at least as
/// large. Ranges known to be zero are not written, except to the bytes of a device or a server. Disk and
/// memory: as [`convert`](crate::convert()). Errors: `InvalidOption` for a target that is
/// too small; `Extents`, `Read`, `Write`, `Stopped`.
pub fn dd(
    source: &Arc<dyn GuestDisk>,
    range: Range<u64>,
    target: &dyn GuestDisk,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    if range.end - range.start > target.size() {
        let message = format!("{} bytes do not fit into {}", range.end - range.start, target.size());
        return Err(Error::new(ErrorKind::InvalidOption, message));
    }
    let inner = Source::new(std::slice::from_ref(source))?;
    let part: Arc<dyn GuestDisk> = Arc::new(Part { inner, range });
    let source = Source::new(std::slice::from_ref(&part))?;
    let plan = CopyPlan {
        source: &source,
        target,
        sparse_size: 4096,
        zero_from: (!has_old_bytes(target)).then_some(0),
        below: Below::Nothing,
        copied_anyway: Vec::new(),
        target_layers: None,
        compress: None,
        offload: false,
        order: if target.cluster_size() == 0 { Order::Any } else { Order::Claimed },
        salvage: false,
    };
    copy(&plan, executor, progress)
}

/// A read-only byte range of a disk.
struct Part {
    inner: Source,
    range: Range<u64>,
}

impl GuestDisk for Part {
    fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> qcow2_core::Result<()> {
        self.inner.read_at(self.range.start + offset.value(), buf)
    }

    fn extent_at(&self, range: GuestRange) -> qcow2_core::Result<DiskExtent> {
        let at = self.range.start + range.start().value();
        let run = self.inner.content_at(at, range.len(), Below::Nothing).map_err(|error| {
            CoreError::new(CoreErrorKind::Storage, "reading the block status of a part of the disk")
                .with_source(error)
        })?;
        let state = match run.content {
            Content::Data => ExtentState::Data { host: None },
            Content::Zero | Content::Backing => ExtentState::Zero { host: None },
        };
        Ok(DiskExtent { len: run.len, state })
    }

    fn cluster_size(&self) -> u64 {
        self.inner.cluster_size()
    }

    fn write_at(&self, _offset: GuestOffset, _buf: &[u8]) -> qcow2_core::Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _range: GuestRange, _mode: ZeroMode) -> qcow2_core::Result<()> {
        Err(read_only())
    }

    fn discard(&self, _range: GuestRange) -> qcow2_core::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> qcow2_core::Result<()> {
        Ok(())
    }

    fn resize(&self, _size: u64) -> qcow2_core::Result<()> {
        Err(read_only())
    }
}

fn read_only() -> CoreError {
    CoreError::new(CoreErrorKind::ReadOnly, "a part of a disk is read-only")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;
    use crate::testing::{TestDisk, Threads};

    #[test]
    fn ranges_match_qemu_img_dd() {
        let range = |size, block_size, count, skip| dd_range(size, &DdOptions { block_size, count, skip });
        assert_eq!(range(1000, 512, None, 0), Some(0..1024));
        assert_eq!(range(10_000, 4096, Some(2), 1), Some(4096..8192));
        assert_eq!(range(10_000, 4096, Some(1), 2), None);
        assert_eq!(range(10_000, 1000, None, 10), Some(10_000..10_240));
        assert_eq!(range(10_000, 1024, None, 10), Some(10_240..10_240));
        assert_eq!(range(10_000, 1024, None, 11), None);
        assert_eq!(range(10_000, 1 << 20, Some(u64::MAX), u64::MAX), None);
    }

    #[test]
    fn range_is_copied_to_the_start_of_the_target() {
        let disk = TestDisk::mixed((3 << 20) + 5, 300_000, 11);
        let mut content = disk.content();
        content.resize(content.len().next_multiple_of(512), 0);
        let disk: Arc<dyn GuestDisk> = Arc::new(disk);
        for (block_size, count, skip) in
            [(512, None, 0), (999, Some(2000), 17), (4096, None, 300), (65536, Some(9), 9)]
        {
            let range = dd_range(disk.size(), &DdOptions { block_size, count, skip }).unwrap();
            let len = range.end - range.start;
            for cluster_size in [0, 65536] {
                let target = TestDisk::empty(len.next_multiple_of(512), cluster_size);
                dd(&disk, range.clone(), &target, &Threads(3), &Silent).unwrap();
                assert!(
                    target.content()[..len as usize] == content[range.start as usize..range.end as usize]
                );
            }
        }
    }
}
