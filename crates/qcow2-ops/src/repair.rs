//! Repairs the findings of a check: refcounts, copied flags, and the dirty and corrupt bits.

use crate::CallerError;
use crate::check::{CheckOptions, CheckReport, Finding, Found, check};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::mend::{self, Fix};
use crate::port::Reopen;
use crate::progress::Progress;
use qcow2_core::{GuestDisk, Image, Storage};
use std::sync::Arc;

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepairMode {
    /// Refcounts that are too high, and copied flags if all refcounts are right afterwards.
    Leaks,
    /// All refcounts and copied flags.
    All,
}

/// The result of a repair.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Repaired {
    /// Number of refcounts lowered to the number of references.
    pub leaks_fixed: u64,
    /// Number of refcounts raised and copied flags corrected.
    pub corruptions_fixed: u64,
    /// Copied flags that were wrong after the refcounts had been repaired.
    pub copied: Vec<Found>,
    /// True if those flags were repaired.
    pub copied_fixed: bool,
    /// The changes to damaged tables; a limited number is listed.
    pub fixes: Vec<Fix>,
    /// If tables were damaged: the result of a check after their entries were repaired.
    pub counted: Option<CheckReport>,
    /// The result of a check after the repair; `None` if nothing changed.
    pub after: Option<CheckReport>,
}

/// True if `finding` is a refcount that differs from the number of references.
pub fn is_refcount(finding: &Finding) -> bool {
    matches!(finding, Finding::Refcount { .. })
}

/// True if `finding` is a wrong copied flag.
pub fn is_copied_flag(finding: &Finding) -> bool {
    matches!(finding, Finding::L1Copied { .. } | Finding::L2Copied { .. })
}

/// True if repairing leaks alone is refused: an allocated cluster has refcount 0, or the refcount table must
/// be rebuilt.
pub fn needs_all(report: &CheckReport) -> bool {
    let is = |finding: &Finding| matches!(finding, Finding::Refcount { stored: 0, references: 1.., .. });
    report.needs_rebuild || report.findings.iter().any(|found| is(&found.finding))
}

/// The result of a check with an optional repair.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checked {
    /// The findings before the repair.
    pub report: CheckReport,
    /// What the repair did.
    pub repair: Outcome,
}

/// How far an image was repaired.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// No repair was requested, or the check was incomplete.
    Untouched,
    /// Only leaks were to be repaired, which is not enough: see [`needs_all`].
    NeedsAll,
    /// The image was repaired as far as possible.
    Repaired(Box<Repaired>),
}

/// Checks the image in `storage` and, with a `mode`, repairs it. `open`: opens that image for repair
/// (`OpenOptions::for_repair`), without its data and backing files. Disk: reads all tables; repairs as
/// [`repair`] does and closes the image.
///
/// Errors: as [`check`] and [`repair`]; `Open` with the caller's error; `Write` if closing fails.
pub fn check_and_repair(
    storage: &dyn Storage,
    mode: Option<RepairMode>,
    open: &dyn Reopen,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<Checked> {
    let report = check(storage, &CheckOptions::default(), executor, progress)?;
    let Some(mode) = mode.filter(|&mode| mode == RepairMode::All || !report.incomplete) else {
        return Ok(Checked { report, repair: Outcome::Untouched });
    };
    if mode == RepairMode::Leaks && needs_all(&report) {
        return Ok(Checked { report, repair: Outcome::NeedsAll });
    }
    if mode == RepairMode::Leaks {
        let repair = Outcome::Repaired(Box::new(repair_in_place(&report, mode, open, executor, progress)?));
        return Ok(Checked { report, repair });
    }
    let mut done = None;
    if is_sound(&report) && has_refcounts(storage)? {
        match repair_in_place(&report, mode, open, executor, progress) {
            // The engine refuses tables that overlap. The repair below separates them.
            Err(error) if is_damage(&error) => {}
            Err(error) => return Err(error),
            Ok(repaired) if repaired.after.as_ref().is_some_and(is_damaged) => done = Some(repaired),
            Ok(repaired) => return Ok(Checked { report, repair: Outcome::Repaired(Box::new(repaired)) }),
        }
    }
    // A repair may uncover damage that only the next one can see.
    for _ in 0..MAX_PLANS {
        let now = done.as_ref().and_then(|done| done.after.as_ref()).unwrap_or(&report);
        if !is_damaged(now) && now.leaks == 0 && done.is_some() {
            break;
        }
        let Some(plan) = mend::plan(storage, now, executor, progress)? else { break };
        let next = mended(&report, plan)?;
        done = Some(match done {
            Some(done) if done.counted.is_some() => together(done, next),
            _ => next,
        });
    }
    Ok(Checked { report, repair: done.map_or(Outcome::Untouched, |done| Outcome::Repaired(Box::new(done))) })
}

/// Does what [`check_and_repair`] does, and writes nothing: changes stay in memory, at most
/// [`MAX_CHANGED`](mend::MAX_CHANGED) bytes of them, and are dropped. `open`: opens the image in the storage
/// that it is given for repair. What is returned is what a repair would return.
///
/// Errors: as [`check_and_repair`].
pub fn rehearse(
    storage: Arc<dyn Storage>,
    mode: RepairMode,
    open: &dyn Fn(Arc<dyn Storage>) -> std::result::Result<Arc<dyn GuestDisk>, CallerError>,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<Checked> {
    let draft = mend::Draft::shared(storage)
        .map_err(|e| Error::new(ErrorKind::Metadata, "checking the image").with_source(e))?;
    let draft = Arc::new(draft) as Arc<dyn Storage>;
    check_and_repair(&*draft, Some(mode), &|| open(Arc::clone(&draft)), executor, progress)
}

impl Repaired {
    /// What changed, in words. `report`: what the check found before.
    pub fn changes(&self, report: &CheckReport) -> Vec<String> {
        if !self.fixes.is_empty() {
            return self.fixes.iter().map(ToString::to_string).collect();
        }
        let after = self.after.as_ref();
        let gone = |found: &&Found| after.is_some_and(|after| !after.findings.contains(found));
        let counts = report.findings.iter().filter(gone).filter_map(|found| match found.finding {
            Finding::Refcount { cluster, stored, references } => {
                Some(format!("refcount of cluster {cluster}: {stored} becomes {references}"))
            }
            _ => None,
        });
        let flags = self.copied.len();
        let flags = (self.copied_fixed && flags > 0).then(|| format!("{flags} copied flags"));
        counts.chain(flags).collect()
    }
}

/// Limit for the number of repairs in a row.
const MAX_PLANS: usize = 4;

/// Combines the results of two consecutive repairs.
fn together(first: Repaired, second: Repaired) -> Repaired {
    let mut fixes = first.fixes;
    fixes.extend(second.fixes);
    Repaired {
        leaks_fixed: first.leaks_fixed.saturating_add(second.leaks_fixed),
        corruptions_fixed: first.corruptions_fixed.max(second.corruptions_fixed),
        fixes,
        ..second
    }
}

/// True if the image has a refcount table. Without one it cannot be opened.
fn has_refcounts(storage: &dyn Storage) -> Result<bool> {
    let header = qcow2_core::walk::read_header(storage)
        .map_err(|e| Error::new(ErrorKind::Metadata, "repairing the image").with_source(e))?;
    Ok(header.refcount_table_clusters > 0)
}

fn is_damaged(report: &CheckReport) -> bool {
    report.corruptions > 0 || report.check_errors > 0
}

/// True if only refcounts and copied flags are wrong, which the engine corrects in place.
fn is_sound(report: &CheckReport) -> bool {
    let others = |found: &Found| !is_refcount(&found.finding) && !is_copied_flag(&found.finding);
    report.check_errors == 0
        && !report.incomplete
        && !report.findings.iter().any(others)
        && report.omitted == 0
}

fn is_damage(error: &Error) -> bool {
    error.core_error().is_some_and(|error| error.kind() == qcow2_core::ErrorKind::Corrupt)
}

fn mended(report: &CheckReport, plan: mend::Plan<'_>) -> Result<Repaired> {
    let (fixes, counted) = (plan.fixes().0.to_vec(), plan.counted().clone());
    let after = plan.apply()?;
    let bad = |report: &CheckReport| report.corruptions.saturating_add(report.check_errors);
    let others = |report: &CheckReport| {
        let others = |found: &&Found| !is_refcount(&found.finding) && !is_copied_flag(&found.finding);
        report.findings.iter().filter(others).map(|found| found.times).sum::<u64>()
    };
    let entries = others(report).saturating_sub(others(&counted));
    Ok(Repaired {
        leaks_fixed: counted.leaks.saturating_sub(after.leaks),
        corruptions_fixed: entries.saturating_add(bad(&counted).saturating_sub(bad(&after))),
        copied: Vec::new(),
        copied_fixed: false,
        fixes,
        counted: Some(counted),
        after: Some(after),
    })
}

fn repair_in_place(
    report: &CheckReport,
    mode: RepairMode,
    open: &dyn Reopen,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<Repaired> {
    let disk = open
        .reopen()
        .map_err(|e| Error::new(ErrorKind::Open, "opening the image for repair").with_boxed_source(e))?;
    let image = disk
        .as_image()
        .ok_or_else(|| Error::new(ErrorKind::Unsupported, "only a qcow2 image can be repaired"))?;
    let repaired = repair(image, report, mode, executor, progress);
    // Close after an error too: what has been repaired is correct.
    let closed = image.flush().and_then(|()| image.close());
    let repaired = repaired?;
    closed.map_err(|e| Error::new(ErrorKind::Write, "closing the repaired image").with_source(e))?;
    Ok(repaired)
}

/// Repairs `image`, which was opened for repair, by the `report` of a check. If any finding is not a refcount
/// or a copied flag, nothing is changed: references that come from damaged tables cannot be trusted. The
/// dirty and corrupt bits are cleared once no error is left. Disk: see [`Image::repair_refcounts`],
/// [`Image::repair_copied_flags`], [`Image::clear_damage_marks`]; all tables are read again.
///
/// Errors: `Unsupported` for repairing leaks if [`needs_all`]; `Write` with the engine's error; as [`check`],
/// which may stop the repair between two steps.
pub fn repair(
    image: &Image,
    report: &CheckReport,
    mode: RepairMode,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<Repaired> {
    let mut done = Repaired {
        leaks_fixed: 0,
        corruptions_fixed: 0,
        copied: Vec::new(),
        copied_fixed: false,
        fixes: Vec::new(),
        counted: None,
        after: None,
    };
    if !is_sound(report) {
        return Ok(done);
    }
    if mode == RepairMode::Leaks && needs_all(report) {
        let message = "an allocated cluster has refcount 0; leak-only repair is not enough";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let failed = |e| Error::new(ErrorKind::Write, "repairing the image").with_source(e);
    let again = || check(&**image.storage(), &CheckOptions::default(), executor, progress);
    let count = |report: &CheckReport, wanted: &dyn Fn(&Finding) -> bool| -> u64 {
        report.findings.iter().filter(|found| wanted(&found.finding)).map(|found| found.times).sum()
    };
    let low = |finding: &Finding| match finding {
        Finding::Refcount { stored, references, .. } => stored < references,
        _ => false,
    };
    let mut now = report.clone();
    if count(report, &is_refcount) > 0 {
        image.repair_refcounts(mode == RepairMode::Leaks).map_err(failed)?;
        now = again()?;
        done.leaks_fixed = report.leaks.saturating_sub(now.leaks);
        done.corruptions_fixed = count(report, &low).saturating_sub(count(&now, &low));
    }
    done.copied = now.findings.iter().filter(|found| is_copied_flag(&found.finding)).cloned().collect();
    let exact = count(&now, &is_refcount) == 0;
    if progress.should_stop() {
        return Err(Error::new(ErrorKind::Stopped, "repair was stopped"));
    }
    if exact && !done.copied.is_empty() {
        image.repair_copied_flags().map_err(failed)?;
        (done.copied_fixed, done.corruptions_fixed) =
            (true, done.corruptions_fixed + count(&now, &is_copied_flag));
        now = again()?;
    }
    if now.corruptions == 0 && now.check_errors == 0 {
        image.clear_damage_marks().map_err(failed)?;
    }
    done.after = (done.leaks_fixed + done.corruptions_fixed > 0).then_some(now);
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Inline;
    use crate::progress::Silent;
    use qcow2_core::{ImageFormat, NoResolver, OpenOptions, ResolvedSource, Storage};
    use qcow2_format::feature::IncompatibleFeatures;
    use qcow2_testkit::builder::{Builder, Built, Cluster};
    use std::sync::Arc;

    const CLUSTER: u64 = 65_536;

    fn leak(image: &mut Built) {
        let end = image.bytes.len() as u64;
        image.patch(end + CLUSTER - 1, &[0]).set_refcount(end / CLUSTER, 1);
    }

    /// A second guest cluster maps to the host cluster of the first, whose refcount stays 1.
    fn low(image: &mut Built) {
        let (entry, second) = (image.read_u64(image.l2_entry(0)), image.l2_entry(2));
        image.patch_u64(second, entry);
    }

    fn wrong_flag(image: &mut Built) {
        let (at, copied) = (image.l2_entry(0), 1 << 63);
        let entry = image.read_u64(at);
        image.patch_u64(at, entry & !copied);
    }

    /// A reserved bit in an L2 entry, which repairing refcounts does not change.
    fn damaged_entry(image: &mut Built) {
        let at = image.l2_entry(1);
        let entry = image.read_u64(at);
        image.patch_u64(at, entry | 1 << 60);
    }

    /// Repairs an image that is marked dirty and corrupt, after damaging it with `spoil`. `marked`: the bits
    /// must still be set afterwards.
    #[track_caller]
    fn check(spoil: &[fn(&mut Built)], mode: RepairMode, marked: bool) {
        let data = |byte| Cluster::Data(vec![byte; CLUSTER as usize]);
        let mut builder = Builder::new(16, 1 << 20).cluster(0, data(1)).cluster(1, data(2));
        let marks = [IncompatibleFeatures::CORRUPT, IncompatibleFeatures::DIRTY];
        marks.into_iter().for_each(|mark| builder.header_mut().features.incompatible.set(mark, true));
        let mut image = builder.build();
        spoil.iter().for_each(|spoil| spoil(&mut image));
        let storage: Arc<dyn Storage> = Arc::new(image.storage());
        let report = check_image(&storage);
        let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
        let source = ResolvedSource { storage, format, name: "image".into(), id: None, resolver };
        let mut options = OpenOptions::default();
        (options.writable, options.for_repair) = (true, true);
        let image = Image::open(source, &options).unwrap();
        repair(&image, &report, mode, &Inline, &Silent).unwrap();
        image.close().unwrap();
        let left = check_image(image.storage());
        let header = image.header();
        assert_eq!((header.is_corrupt(), header.is_dirty()), (marked, marked), "{left:?}");
        assert_eq!(left.corruptions + left.check_errors > 0, marked, "{left:?}");
    }

    fn check_image(storage: &Arc<dyn Storage>) -> CheckReport {
        crate::check::check(&**storage, &CheckOptions::default(), &Inline, &Silent).unwrap()
    }

    #[test]
    fn damage_marks_are_cleared_with_the_last_corruption() {
        for mode in [RepairMode::Leaks, RepairMode::All] {
            check(&[], mode, false);
            check(&[leak], mode, false);
            check(&[wrong_flag], mode, false);
            check(&[leak, wrong_flag], mode, false);
            check(&[damaged_entry], mode, true);
            check(&[leak, damaged_entry], mode, true);
        }
        check(&[low], RepairMode::All, false);
        check(&[leak, low], RepairMode::All, false);
        // A refcount that is too low is not a leak, so a leak-only repair keeps it.
        check(&[low], RepairMode::Leaks, true);
        check(&[leak, low], RepairMode::Leaks, true);
    }
}
