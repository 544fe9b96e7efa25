//! Repairs of damaged tables: planned in memory, judged there by the check, and then written.
//!
//! What a repair may do is narrow. It keeps everything that can be read as it reads. An entry that cannot be
//! read is changed only where its meaning is proved from two sides: by what the entry itself says, and by
//! refcounts and the rest of the image. Everything else stays, and so does every cluster that may belong to
//! it. Refcounts and copied flags follow from the references, and are written anew beside the old ones.
//!
//! | order on disk | what |
//! |---|---|
//! | 1 | the mark of damage, version 3: no writer takes the image before the repair has ended |
//! | 2 | new tables, in clusters that nothing uses; barrier |
//! | 3 | entries of the tables that stay; barrier |
//! | 4 | the header: new tables, and without the mark where nothing is wrong any more; barrier |
//!
//! A power cut leaves an image that reads as before, which the next repair finishes.

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
use draft::Draft;
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
    /// The first byte of the clusters that nothing uses.
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

/// Plans the repair of the image in `storage`, in which a check found `report`. Nothing is written. `None`
/// where nothing can be made better. Disk: reads all tables several times. Memory: what changes, at most
/// [`MAX_CHANGED`], and what [`check`] takes.
///
/// Errors: `Metadata` where the header is not accepted or the storage fails; `Unsupported` where the repair
/// needs more space than the device has, or a wider refcount; `Stopped`.
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
    let end = match storage.limits().growable {
        // One more: a reference may reach into the cluster that the file ends in.
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
            judge(&job)?
        }
    };
    if job.end > end {
        job.draft.set_len(job.end * geometry.cluster_size()).map_err(job::storage)?;
    }
    if after.incomplete || (bad(&after) >= bad(report) && bad(report) > 0) {
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
    /// What changes, and how many changes are not listed.
    pub fn fixes(&self) -> (&[Fix], u64) {
        (&self.fixes, self.omitted)
    }

    /// What a check finds once the entries are mended, and refcounts and copied flags are not.
    pub fn counted(&self) -> &CheckReport {
        &self.counted
    }

    /// What a check finds afterwards.
    pub fn after(&self) -> &CheckReport {
        &self.after
    }

    /// Writes the repair. Disk: in the order that the module's page gives. Errors: `Write` with the
    /// storage's; the image reads as before then.
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
        // Read before the mark is written: what the draft did not change it reads from the image.
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
        if self.base.limits().growable && self.base.len()? < end {
            self.base.set_len(end)?;
        }
        write(SECTOR_LEN as u64..self.fresh)?;
        // Written even where the draft did not change it: the mark of the first step has to go.
        self.base.write_at(HostOffset::default(), &last)?;
        self.base.flush()
    }
}
