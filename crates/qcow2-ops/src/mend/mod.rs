//! Repairs damaged tables: planned in memory, checked there, and only then written.
//!
//! A repair is conservative. Whatever can be read keeps its content. An entry that cannot be read is changed
//! only if two sources agree on its meaning: the entry itself, and the refcounts with the rest of the image.
//! All other entries stay as they are, and so does every cluster that they may refer to. Refcounts and copied
//! flags are derived from the references and written to new clusters, beside the old ones.
//!
//! | order on disk | what |
//! |---|---|
//! | 1 | version 3: the corrupt bit, so that nobody writes to the image before the repair is complete |
//! | 2 | new tables, in unused clusters; barrier |
//! | 3 | changed entries of existing tables; barrier |
//! | 4 | the header: offsets of the new tables, and without the corrupt bit if no error is left; barrier |
//!
//! After a power cut the image reads as before; the next repair completes it.

mod draft;
mod fix;
mod job;
mod mapping;
mod orphans;
mod refcounts;
mod snapshots;

pub use draft::MAX_CHANGED;
pub use fix::Fix;

use crate::check::{CheckOptions, CheckReport, check};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::progress::Progress;
pub(crate) use draft::Draft;
use job::{Job, failed};
use qcow2_core::{HostOffset, Storage, StorageError};
use qcow2_format::feature::IncompatibleFeatures;
use qcow2_format::header::{HeaderField, SECTOR_LEN};
use qcow2_format::{Header, Version};
use std::collections::BTreeSet;

/// A repair that is ready to be written.
pub struct Plan<'a> {
    base: &'a dyn Storage,
    draft: Draft<'a>,
    header: Header,
    /// Offset of the first cluster that the image does not use; new tables start there.
    fresh: u64,
    fixes: Vec<Fix>,
    omitted: u64,
    counted: CheckReport,
    after: CheckReport,
}

impl std::fmt::Debug for Plan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan").field("fixes", &self.fixes).field("after", &self.after).finish_non_exhaustive()
    }
}

/// Plans the repair of the image in `storage`, for which a check returned `report`. Writes nothing. `None` if
/// no repair would leave fewer errors. Disk: reads all tables several times. Memory: the changed pages, at
/// most [`MAX_CHANGED`], and that of [`check`].
///
/// Errors: `Metadata` if the header is invalid or the storage fails; `Unsupported` if the repair needs more
/// space than the device has, or a larger refcount than the image's width allows; `Stopped`.
pub fn plan<'a>(
    storage: &'a dyn Storage,
    report: &CheckReport,
    executor: &'a dyn Executor,
    progress: &'a dyn Progress,
) -> Result<Option<Plan<'a>>> {
    let header = qcow2_core::walk::read_header(storage).map_err(failed)?;
    let format = header.l2_format().map_err(failed)?;
    let geometry = format.geometry;
    let len = storage.len().map_err(job::storage)?;
    let end = match storage.limits().growable() {
        // One more: a reference may reach into the cluster after the last one.
        true => geometry.clusters_for(len) + 1,
        false => geometry.clusters_for(report.image_end_offset.min(len)),
    };
    let mut job = Job {
        draft: Draft::new(storage).map_err(job::storage)?,
        base: storage,
        header,
        format,
        executor,
        progress,
        fixes: Vec::new(),
        omitted: 0,
        tables_missing: false,
        kept: BTreeSet::new(),
        replaced: 0..0,
        end,
        taken: Vec::new(),
    };
    job.mend_snapshots()?;
    job.mend_bitmaps()?;
    job.mend_mapping()?;
    let judge = |job: &Job<'_>| check(&job.draft, &CheckOptions::default(), executor, progress);
    let bad = |report: &CheckReport| report.corruptions.saturating_add(report.check_errors);
    let counted = judge(&job)?;
    let after = match bad(&counted) + counted.leaks {
        0 if !counted.incomplete => counted.clone(),
        _ => {
            job.mend_refcounts()?;
            let after = judge(&job)?;
            match bad(&after) == 0 && after.leaks > 0 {
                // Nothing is damaged any more, so no entry is left that could mean what was kept for it.
                true => {
                    (job.tables_missing, job.kept) = (false, BTreeSet::new());
                    job.mend_refcounts()?;
                    judge(&job)?
                }
                false => after,
            }
        }
    };
    if job.end > end {
        job.draft.set_len(job.end * geometry.cluster_size()).map_err(job::storage)?;
    }
    if after.incomplete || (bad(&after) >= bad(report) && bad(report) > 0) || job.is_taken_twice()? {
        return Ok(None);
    }
    if bad(&after) == 0 && job.header.version >= Version::V3 {
        let marks = job.header.features.incompatible;
        let clear = marks.with(IncompatibleFeatures::DIRTY, false).with(IncompatibleFeatures::CORRUPT, false);
        if clear != marks {
            job.set_header(&[HeaderField::Incompatible(clear)])?;
            job.fixed(Fix::Marks);
        }
    }
    let Job { draft, header, fixes, omitted, .. } = job;
    let fresh = end * geometry.cluster_size();
    Ok(Some(Plan { base: storage, draft, header, fresh, fixes, omitted, counted, after }))
}

impl Plan<'_> {
    /// The changes, and the number of changes that are not listed.
    pub fn fixes(&self) -> (&[Fix], u64) {
        (&self.fixes, self.omitted)
    }

    /// The result of a check after the entries are repaired, but before refcounts and copied flags are.
    pub fn counted(&self) -> &CheckReport {
        &self.counted
    }

    /// The result of a check after the whole repair.
    pub fn after(&self) -> &CheckReport {
        &self.after
    }

    /// Writes the repair, in the order of the table on the module's page. Errors: `Write` with the storage's
    /// error; the image then reads as before.
    pub fn apply(self) -> Result<CheckReport> {
        self.write().map_err(|e| {
            Error::new(ErrorKind::Write, "repairing the image").with_source(qcow2_core::Error::from(e))
        })?;
        Ok(self.after)
    }

    fn write(&self) -> Result<(), StorageError> {
        let write = |range: std::ops::Range<u64>| {
            self.draft.changed(range, |at, bytes| self.base.write_at(at, bytes))?;
            self.base.flush()
        };
        // Read both before the corrupt bit is written: the draft reads unchanged pages from the image.
        let mut last = [0; SECTOR_LEN];
        self.draft.read_padded(HostOffset::default(), &mut last)?;
        let mut old = [0; SECTOR_LEN];
        self.base.read_padded(HostOffset::default(), &mut old)?;
        let mut marked = Header::clone(&self.header);
        if marked.version >= Version::V3 {
            let mut sector = old;
            let features = marked.features.incompatible.with(IncompatibleFeatures::CORRUPT, true);
            HeaderField::Incompatible(features).apply(&mut marked, &mut sector);
            self.base.write_at(HostOffset::default(), &sector)?;
            self.base.flush()?;
        }
        let end = self.draft.len()?;
        if end > self.fresh {
            write(self.fresh..end)?;
        }
        if self.base.limits().growable() && self.base.len()? < end {
            self.base.set_len(end)?;
        }
        write(SECTOR_LEN as u64..self.fresh)?;
        // Written even if the draft did not change it, because the first step set the corrupt bit.
        self.base.write_at(HostOffset::default(), &last)?;
        self.base.flush()
    }
}
