//! Tables on their way to the image file, and the questions that come before anything is written over or
//! freed.
//!
//! Invariant I5: no write of data or of a table lands on metadata of another kind, and no metadata is freed
//! because something else points at it. Each question is asked twice: before anything depends on the answer,
//! so that a procedure fails while nothing has changed, and by the write itself.

use super::file::ImageFile;
use super::guard::{Guard, Hit};
use super::header::HeaderStore;
use super::known::known_metadata;
use super::overlap::OverlapChecks;
use super::page::DirtyRun;
use super::pending::Unlinked;
use super::run::ClusterRun;
use crate::error::Result;
use crate::invariant;
use crate::port::storage::ZeroMode;
use ::alloc::format;
use ::alloc::sync::Arc;
use ::alloc::vec;
use qcow2_format::HostOffset;
use qcow2_format::bytes::table_bytes;

/// The most zeroes that are written at once.
const MAX_PIECE: u64 = 64 << 10;

/// Where tables are and may go, and the one way in which each of them but the header is written.
pub(crate) struct Tables {
    file: Arc<ImageFile>,
    header: Arc<HeaderStore>,
    guard: Guard,
    /// As the caller chose them.
    checks: OverlapChecks,
}

impl Tables {
    /// `guard` knows what the image held when it was opened; `checks` is what guest data may not be written
    /// over.
    pub(crate) fn new(
        file: Arc<ImageFile>,
        header: Arc<HeaderStore>,
        guard: Guard,
        checks: OverlapChecks,
    ) -> Self {
        Self { file, header, guard, checks }
    }

    /// The files that the tables are in.
    pub(crate) fn file(&self) -> &Arc<ImageFile> {
        &self.file
    }

    /// The header that leads to them.
    pub(crate) fn header(&self) -> &Arc<HeaderStore> {
        &self.header
    }

    /// Which clusters hold metadata.
    pub(crate) fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Learns again which clusters hold metadata, from what is on disk: the raw entries of the L1 table and
    /// of the refcount table are the present ones.
    pub(crate) fn learn(&self, l1: &[u64], refcount_table: &[u64]) -> Result<()> {
        let header = self.header.current();
        self.guard.replace(known_metadata(self.file.storage(), &header, (l1, refcount_table), self.checks)?);
        debug_assert!(self.guard.kinds_at(0).contains(OverlapChecks::MAIN_HEADER), "the header is forgotten");
        Ok(())
    }

    /// The clusters of a table of `kinds` with `len` bytes at `offset`, a multiple of the cluster size.
    pub(crate) fn run_of(&self, kinds: OverlapChecks, offset: HostOffset, len: u64) -> Unlinked {
        Unlinked::table(self.file.geometry(), kinds, offset, len)
    }

    /// Refuses guest data that would land on metadata: the mapping that leads there is damaged.
    pub(crate) fn check_data_place(&self, offset: HostOffset, len: u64) -> Result<()> {
        if self.file.has_data_file() {
            return Ok(());
        }
        match self.guard.hit_by_data(ClusterRun::touched(self.file.geometry(), offset, len)) {
            None => Ok(()),
            Some(Hit { cluster, kinds }) => Err(self.header.mark_corrupt(format!(
                "guest data is mapped to host cluster {cluster}, which holds {}",
                kinds.text()
            ))),
        }
    }

    /// Refuses a table of `kinds` that would land on other metadata. Asked before anything depends on the
    /// table, and again by [`write`](Self::write).
    pub(crate) fn check_place(&self, kinds: OverlapChecks, offset: HostOffset, len: u64) -> Result<()> {
        match self.guard.hit_by(kinds, ClusterRun::touched(self.file.geometry(), offset, len)) {
            None => Ok(()),
            Some(Hit { cluster, kinds: other }) => {
                let (new, there) = (kinds.text(), other.text());
                let message = format!("{new} at {offset} takes host cluster {cluster}, which holds {there}");
                Err(self.header.mark_corrupt(message).at_host(offset))
            }
        }
    }

    /// Writes a piece of a table of `kinds` to the image file: the one way for every table but the header.
    /// Errors: `Corrupt` where other metadata is in the way, nothing having been written; `Storage`,
    /// `NoSpace`.
    pub(crate) fn write(&self, kinds: OverlapChecks, offset: HostOffset, bytes: &[u8]) -> Result<()> {
        invariant::may_write(self.file.is_writable());
        invariant::table_words(offset, bytes.len());
        self.check_place(kinds, offset, bytes.len() as u64)?;
        Ok(self.file.storage().write_at(offset, bytes)?)
    }

    /// [`write`](Self::write) of entries that are still numbers.
    pub(crate) fn write_words(&self, kinds: OverlapChecks, at: HostOffset, words: &[u64]) -> Result<()> {
        self.write(kinds, at, &table_bytes(words.iter().copied()))
    }

    /// Writes sectors of tables of one kind.
    pub(crate) fn write_runs(&self, kind: OverlapChecks, runs: &[DirtyRun]) -> Result<()> {
        runs.iter().try_for_each(|run| self.write(kind, run.offset, &run.bytes))
    }

    /// Empties the cluster of a new table inside the file; it keeps its space on the disk, for the reason in
    /// [`write_empty`](Self::write_empty).
    pub(crate) fn zero(&self, kind: OverlapChecks, table: HostOffset) -> Result<()> {
        let size = self.file.geometry().cluster_size();
        self.check_place(kind, table, size)?;
        Ok(self.file.storage().write_zeroes(table, size, ZeroMode::KeepAllocated)?)
    }

    /// Writes the zeroes of a new table of one cluster at the end of the file, though it reads as zeroes
    /// without: it then has space on the disk before anything depends on it. So a full disk fails the request
    /// that needs the table, which can be repeated when there is room, and not a flush, after which the image
    /// would be poisoned. Written, not reserved, so that the file system puts it between the data around it.
    pub(crate) fn write_empty(&self, kind: OverlapChecks, table: HostOffset) -> Result<()> {
        debug_assert!(self.file.geometry().is_aligned(table.value()), "an empty table at {table}");
        let size = self.file.geometry().cluster_size();
        let zeroes = vec![0; size.min(MAX_PIECE) as usize];
        for at in (0..size).step_by(zeroes.len()) {
            self.write(kind, HostOffset::new(table.value() + at), &zeroes)?;
        }
        Ok(())
    }

    /// Refuses to hand out clusters that hold metadata although nobody counts them.
    pub(crate) fn check_unused(&self, run: ClusterRun) -> Result<()> {
        match self.guard.hit_by(OverlapChecks::NONE, run) {
            None => Ok(()),
            Some(Hit { cluster, kinds }) => Err(self.header.mark_corrupt(format!(
                "host cluster {cluster} holds {} but its refcount is 0",
                kinds.text()
            ))),
        }
    }

    /// Refuses to give up clusters that hold other metadata than `run.kinds`. Asked before a
    /// procedure unlinks them, so that it fails while nothing has changed.
    pub(crate) fn check_owner(&self, run: Unlinked) -> Result<()> {
        match self.guard.hit_by(run.kinds, run.clusters) {
            None => Ok(()),
            Some(Hit { cluster, kinds }) => Err(self.header.mark_corrupt(format!(
                "{} is said to be in host cluster {cluster}, which holds {}",
                run.kinds.text(),
                kinds.text()
            ))),
        }
    }

    /// Whether one of the clusters of `run` holds other metadata than what was referred to.
    pub(crate) fn is_guarded(&self, run: Unlinked) -> bool {
        self.guard.hit_by(run.kinds, run.clusters).is_some()
    }
}
