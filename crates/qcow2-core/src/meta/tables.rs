//! All writes of tables to the image file, and the checks before metadata is overwritten or freed.
//!
//! Invariant I5: no write of data or of a table overwrites metadata of another kind, and no metadata is freed
//! because something else points to it. Each check runs twice: early, so that a procedure fails before
//! anything has changed, and again in the write itself.

use super::file::ImageFile;
use super::guard::{Guard, Hit};
use super::header::HeaderStore;
use super::known::known_metadata;
use super::overlap::OverlapChecks;
use super::page::DirtyRun;
use super::pending::Unlinked;
use super::run::ClusterRun;
use crate::damage::Damage;
use crate::error::{Error, ErrorKind, Result};
use crate::invariant;
use crate::port::storage::ZeroMode;
use ::alloc::format;
use ::alloc::sync::Arc;
use ::alloc::vec;
use qcow2_format::HostOffset;
use qcow2_format::bytes::table_bytes;

/// Zeroes written at a time, in bytes.
const MAX_PIECE: u64 = 64 << 10;

/// The clusters that tables occupy, and the only way in which tables other than the header are written.
pub(crate) struct Tables {
    file: Arc<ImageFile>,
    header: Arc<HeaderStore>,
    guard: Guard,
    /// The caller's choice of kinds.
    checks: OverlapChecks,
}

impl Tables {
    /// `guard`: the metadata clusters at the time of the open. `checks`: the kinds that guest data must not
    /// overwrite.
    pub(crate) fn new(
        file: Arc<ImageFile>,
        header: Arc<HeaderStore>,
        guard: Guard,
        checks: OverlapChecks,
    ) -> Self {
        Self { file, header, guard, checks }
    }

    /// The files of the image.
    pub(crate) fn file(&self) -> &Arc<ImageFile> {
        &self.file
    }

    /// The header.
    pub(crate) fn header(&self) -> &Arc<HeaderStore> {
        &self.header
    }

    /// The map of clusters that hold metadata.
    pub(crate) fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Rebuilds the map of metadata clusters from the tables on disk. `l1`, `refcount_table`: the present raw
    /// entries.
    pub(crate) fn learn(&self, l1: &[u64], refcount_table: &[u64]) -> Result<()> {
        let header = self.header.current();
        self.guard.replace(known_metadata(self.file.storage(), &header, (l1, refcount_table), self.checks)?);
        debug_assert!(
            self.guard.kinds_at(0).contains(OverlapChecks::MAIN_HEADER),
            "the header's cluster is not in the metadata map"
        );
        Ok(())
    }

    /// The clusters of a table of `kinds` with `len` bytes at `offset`, a multiple of the cluster size.
    pub(crate) fn run_of(&self, kinds: OverlapChecks, offset: HostOffset, len: u64) -> Unlinked {
        Unlinked::table(self.file.geometry(), kinds, offset, len)
    }

    /// Refuses a write of guest data that would overwrite metadata: the L2 entry that points there is
    /// damaged. Marks the image corrupt. Errors: also `InvalidOption` if tables that the caller has chosen to
    /// protect are not known.
    pub(crate) fn check_data_place(&self, offset: HostOffset, len: u64) -> Result<()> {
        if self.file.has_data_file() {
            return Ok(());
        }
        self.check_known()?;
        match self.guard.hit_by_data(ClusterRun::touched(self.file.geometry(), offset, len)) {
            None => Ok(()),
            Some(hit) => Err(self.refused(hit, |cluster, kind| {
                format!("guest data is mapped to host cluster {cluster}, which holds {kind}")
            })),
        }
    }

    /// Refuses a table of `kinds` that would overwrite other metadata, and marks the image corrupt. Called
    /// before anything depends on the table, and again by [`write`](Self::write).
    pub(crate) fn check_place(&self, kinds: OverlapChecks, offset: HostOffset, len: u64) -> Result<()> {
        self.check_known()?;
        match self.guard.hit_by(kinds, ClusterRun::touched(self.file.geometry(), offset, len)) {
            None => Ok(()),
            Some(hit) => {
                let new = kinds.text();
                let refused = self.refused(hit, |cluster, there| {
                    format!("{new} at {offset} would overwrite host cluster {cluster}, which holds {there}")
                });
                Err(refused.at_host(offset))
            }
        }
    }

    /// Writes a part of a table of `kinds` to the image file. All tables except the header are written
    /// through this method. Errors: `Corrupt` if it would overwrite other metadata, before anything is
    /// written; `Storage`, `NoSpace`.
    pub(crate) fn write(&self, kinds: OverlapChecks, offset: HostOffset, bytes: &[u8]) -> Result<()> {
        invariant::may_write(self.file.is_writable());
        invariant::table_words(offset, bytes.len());
        self.check_place(kinds, offset, bytes.len() as u64)?;
        Ok(self.file.storage().write_at(offset, bytes)?)
    }

    /// [`write`](Self::write) for raw entries.
    pub(crate) fn write_words(&self, kinds: OverlapChecks, at: HostOffset, words: &[u64]) -> Result<()> {
        self.write(kinds, at, &table_bytes(words.iter().copied()))
    }

    /// [`write`](Self::write) for runs of sectors.
    pub(crate) fn write_runs(&self, kind: OverlapChecks, runs: &[DirtyRun]) -> Result<()> {
        runs.iter().try_for_each(|run| self.write(kind, run.offset, &run.bytes))
    }

    /// Zeroes the cluster of a new table inside the file. It stays allocated in the storage, for the reason
    /// in [`write_empty`](Self::write_empty).
    pub(crate) fn zero(&self, kind: OverlapChecks, table: HostOffset) -> Result<()> {
        let size = self.file.geometry().cluster_size();
        self.check_place(kind, table, size)?;
        Ok(self.file.storage().write_zeroes(table, size, ZeroMode::KeepAllocated)?)
    }

    /// Writes the zeroes of a new table of one cluster at the end of the file, although it would read as
    /// zeroes without that: it then has space in the storage before anything depends on it. So a full disk
    /// fails the request that needs the table, and not a flush, which would have to be repeated until there
    /// is space. It writes instead of reserving, so that the file system places the table next to the data
    /// around it.
    pub(crate) fn write_empty(&self, kind: OverlapChecks, table: HostOffset) -> Result<()> {
        debug_assert!(self.file.geometry().is_aligned(table.value()), "an empty table at {table}");
        let size = self.file.geometry().cluster_size();
        let zeroes = vec![0; size.min(MAX_PIECE) as usize];
        for at in (0..size).step_by(zeroes.len()) {
            self.write(kind, HostOffset::new(table.value() + at), &zeroes)?;
        }
        Ok(())
    }

    /// Refuses every write where tables that the caller wants protected cannot be found.
    fn check_known(&self) -> Result<()> {
        if !self.guard.lacks_chosen() {
            return Ok(());
        }
        let message =
            "a snapshot's l1 table is damaged: its l2 tables, which are to be protected, are unknown";
        Err(Error::new(ErrorKind::InvalidOption, message))
    }

    /// Refuses to allocate clusters that hold metadata although their refcount is 0. `header`: the damage if
    /// the first of them is the header's, `None` for that of any other.
    pub(crate) fn check_unused(&self, run: ClusterRun, header: Option<Damage>) -> Result<()> {
        let Some(hit) = self.guard.hit_by(OverlapChecks::NONE, run) else { return Ok(()) };
        let (cluster, kind) = (hit.cluster, hit.kinds.text());
        let error = Error::corrupt(format!("host cluster {cluster} holds {kind} but its refcount is 0"));
        let damage = header.filter(|_| run.first() == 0).unwrap_or_else(|| self.overlap(hit));
        Err(self.header.marked(error.with_damage(damage)))
    }

    /// Refuses to free clusters that hold other metadata than `run.kinds`. Called before a procedure unlinks
    /// them, so that it fails before anything has changed.
    pub(crate) fn check_owner(&self, run: Unlinked) -> Result<()> {
        match self.guard.hit_by(run.kinds, run.clusters) {
            None => Ok(()),
            Some(hit) => Err(self.refused(hit, |cluster, kind| {
                let freed = run.kinds.text();
                format!("{freed} in host cluster {cluster} cannot be freed: the cluster holds {kind}")
            })),
        }
    }

    /// Marks the image corrupt. `message`: of the cluster and the kind of metadata in it.
    fn refused(&self, hit: Hit, message: impl Fn(u64, &str) -> ::alloc::string::String) -> Error {
        let error = Error::corrupt(message(hit.cluster, hit.kinds.text()));
        self.header.marked(error.with_damage(self.overlap(hit)))
    }

    fn overlap(&self, hit: Hit) -> Damage {
        let offset = HostOffset::new(self.file.geometry().bytes_of(hit.cluster));
        Damage::Overlap { offset, kinds: hit.kinds }
    }

    /// True if a cluster of `run` holds other metadata than `run.kinds`.
    pub(crate) fn is_guarded(&self, run: Unlinked) -> bool {
        self.guard.hit_by(run.kinds, run.clusters).is_some()
    }
}
