//! Gives the end of the file back that nothing uses any more.
//!
//! Order on disk: the refcount table without the blocks that count nothing, barrier; the file gets shorter. A
//! crash leaves a file that is longer than it needs to be.

use crate::error::Result;
use crate::image::Image;
use crate::meta::overlap::OverlapChecks;
use crate::meta::run::ClusterRun;
use crate::port::storage::StorageErrorKind;
use ::alloc::vec;
use qcow2_format::HostOffset;

/// Bytes that are read at most to learn that the end of the file is zeroes. Origin: ours; what is discarded
/// is a hole, but for the rest of a block of the file system.
const MAX_READ: u64 = 16 << 20;
const PIECE: u64 = 64 << 10;

impl Image {
    /// Makes the file as short as its clusters allow. Clusters that count as free and have bytes other than
    /// zero stay: on a damaged image an entry may lead there. The caller holds the structure lock for
    /// writing. Errors: `Storage`, `NoSpace`, `Corrupt`.
    pub(crate) fn cut_tail(&self) -> Result<()> {
        if !self.file.storage().limits().growable() {
            return Ok(());
        }
        self.flusher.settle()?;
        loop {
            let dropped = self.refcounts.drop_last_blocks()?;
            if dropped.is_empty() {
                break;
            }
            self.flusher.settle()?;
            self.refcounts.forget_blocks(&dropped)?;
        }
        let Some(first) = self.refcounts.counted_end()? else { return Ok(()) };
        let (start, len) = (self.file.geometry().bytes_of(first), self.file.storage().len()?);
        if start >= len {
            return Ok(());
        }
        let tail = ClusterRun::touched(self.file.geometry(), HostOffset::new(start), len - start);
        let guarded = self.tables.guard().hit_by(OverlapChecks::NONE, tail).is_some();
        if guarded || !self.is_zero(start, len)? { Ok(()) } else { self.cut_after(first) }
    }

    /// True if the bytes of the file from `at` to `end` are zero, as far as little is read to know it.
    fn is_zero(&self, mut at: u64, end: u64) -> Result<bool> {
        let (mut left, mut bytes) = (MAX_READ, vec![0; PIECE as usize]);
        while at < end {
            let extent = self.file.storage().extent_at(HostOffset::new(at), end - at)?;
            let len = extent.len.min(end - at);
            if !extent.data {
                at += len;
                continue;
            }
            let piece = len.min(PIECE);
            let bytes = &mut bytes[..piece as usize];
            self.file.storage().read_padded(HostOffset::new(at), bytes)?;
            if piece > left || bytes.iter().any(|&byte| byte != 0) {
                return Ok(false);
            }
            left -= piece;
            at += piece;
        }
        Ok(true)
    }

    /// Truncates the file after its first `clusters` clusters, if the storage can do that.
    pub(crate) fn cut_after(&self, clusters: u64) -> Result<()> {
        let end = self.file.geometry().bytes_of(clusters);
        if self.file.storage().len()? <= end {
            return Ok(());
        }
        match self.file.storage().set_len(end) {
            Err(error) if !matches!(error.kind(), StorageErrorKind::FixedLength(_)) => Err(error.into()),
            _ => Ok(()),
        }
    }
}
