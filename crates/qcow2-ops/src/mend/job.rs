//! The state that all steps of a repair share.

use super::draft::Draft;
use super::fix::Fix;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::progress::Progress;
use qcow2_core::walk::Walk;
use qcow2_core::{HostOffset, Storage};
use qcow2_format::header::{HeaderField, SECTOR_LEN};
use qcow2_format::l2::L2Format;
use qcow2_format::{Header, bytes};
use std::collections::BTreeSet;
use std::ops::Range;

/// Number of fixes that are listed; all are counted.
const MAX_LISTED: usize = 10_000;

/// A repair in progress: the draft, its header, and what the steps have found out.
pub(super) struct Job<'a> {
    pub(super) draft: Draft<'a>,
    pub(super) base: &'a dyn Storage,
    pub(super) header: Header,
    pub(super) format: L2Format,
    pub(super) executor: &'a dyn Executor,
    pub(super) progress: &'a dyn Progress,
    pub(super) fixes: Vec<Fix>,
    pub(super) omitted: u64,
    /// True if a table could not be found or read. Clusters without references may then be mapped by it, so
    /// they keep a refcount.
    pub(super) tables_missing: bool,
    /// Clusters that an ambiguous entry may refer to. They keep a refcount.
    pub(super) kept: BTreeSet<u64>,
    /// Clusters of the snapshot table that was replaced: counted still, referred to no more, and no table.
    pub(super) replaced: Range<u64>,
    /// The first cluster after all used ones; new tables are allocated from here on.
    pub(super) end: u64,
    /// Runs of clusters that were allocated for new tables, with the references that each cluster should have
    /// besides those of the refcount structure.
    pub(super) taken: Vec<(Range<u64>, u64)>,
}

impl Job<'_> {
    pub(super) fn fixed(&mut self, fix: Fix) {
        match self.fixes.len() < MAX_LISTED {
            true => self.fixes.push(fix),
            false => self.omitted += 1,
        }
    }

    /// Sets header fields in the draft and in `header`.
    pub(super) fn set_header(&mut self, fields: &[HeaderField]) -> Result<()> {
        let mut sector = [0; SECTOR_LEN];
        self.draft.read_padded(HostOffset::default(), &mut sector).map_err(storage)?;
        fields.iter().for_each(|field| field.apply(&mut self.header, &mut sector));
        self.draft.write_at(HostOffset::default(), &sector).map_err(storage)
    }

    pub(super) fn word(&self, at: HostOffset) -> Result<u64> {
        let mut word = [0; 8];
        self.draft.read_padded(at, &mut word).map_err(storage)?;
        Ok(bytes::read_u64(&word, 0).unwrap_or(0))
    }

    /// The bytes of the table of one cluster at `table`; none if all of it is a hole, as the tables of a
    /// small file may be by the thousand.
    pub(super) fn table(&self, table: HostOffset) -> Result<Vec<u8>> {
        let size = self.format.geometry.cluster_size();
        let left = self.draft.len().map_err(storage)?.saturating_sub(table.value()).min(size);
        if left == 0 {
            return Ok(Vec::new());
        }
        let extent = self.draft.extent_at(table, left).map_err(storage)?;
        if !extent.data && extent.len >= left {
            return Ok(Vec::new());
        }
        let mut content = vec![0; size as usize];
        self.draft.read_padded(table, &mut content).map_err(storage)?;
        Ok(content)
    }

    pub(super) fn set_words(&self, at: HostOffset, words: &[u64]) -> Result<()> {
        self.draft.write_at(at, &bytes::table_bytes(words.iter().copied())).map_err(storage)
    }

    /// Allocates `count` clusters after all others, to be referred to `times` times each, not counting the
    /// refcount structure. Returns the first. Errors: `Unsupported` if the storage
    /// cannot grow that far.
    pub(super) fn take(&mut self, count: u64, times: u64) -> Result<u64> {
        let (first, end) = (self.end, self.end.saturating_add(count));
        let len = end.saturating_mul(self.format.geometry.cluster_size());
        if !self.base.limits().growable() && len > self.base.len().map_err(storage)? {
            let text =
                format!("a repair needs {count} free clusters behind the image, and the device ends there");
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        self.end = end;
        self.taken.push((first..end, times));
        Ok(first)
    }

    /// Calls `work` with a walk over the draft. `header` may differ from the draft's, for example to leave a
    /// table out.
    pub(super) fn walk<T>(&self, header: &Header, work: impl FnOnce(&Walk<'_>) -> Result<T>) -> Result<T> {
        let walk = Walk::new(&self.draft, header).map_err(failed)?;
        work(&walk)
    }
}

pub(super) fn storage(error: qcow2_core::StorageError) -> Error {
    failed(qcow2_core::Error::from(error))
}

pub(super) fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::new(ErrorKind::Metadata, "planning the repair").with_source(error)
}
