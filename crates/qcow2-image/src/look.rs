//! Describes, checks, repairs and compares images.

use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::threads::Threads;
use qcow2_core::{Image, Layers, ResolvedSource};
use qcow2_ops::check::{CheckOptions, CheckReport};
use qcow2_ops::compare::{CompareOptions, Comparison};
use qcow2_ops::info::InfoReport;
use qcow2_ops::repair::{RepairMode, Repaired};
use qcow2_ops::{Executor, Silent};
use std::path::Path;

/// Describes the image at `path`: sizes, features, snapshots, bitmaps, and the files it names, none of which
/// is opened. Safe for untrusted images. The format is probed; an unknown file is raw. Errors: `NotFound`,
/// `PermissionDenied`, `InUse`, `NotAnImage`, `Corrupt`, `Unsupported`, `Io`.
pub fn info(path: impl AsRef<Path>) -> Result<InfoReport> {
    let path = path.as_ref();
    let source = Disk::options().probe_format().open_file(path)?;
    qcow2_ops::info(&*source.storage, &source.format)
        .map_err(|e| Error::from_cause(path, "reading the image's properties", e))
}

/// Checks the qcow2 image at `path` with all processors: every reference against the refcounts, every entry's
/// validity. Never writes, and opens no file that the image names. Faults of the image are in the report.
/// Errors: as [`info`].
pub fn check(path: impl AsRef<Path>) -> Result<CheckReport> {
    let path = path.as_ref();
    let source = Disk::options().open_file(path)?;
    checked(&source, path, &Threads::per_core())
}

/// Checks the qcow2 image at `path` and repairs its refcounts and copied flags. If tables are damaged,
/// nothing is changed: their references cannot be trusted. Returns the findings before the repair and what
/// was repaired. Errors: as [`check`]; `NoSpace`.
pub fn repair(path: impl AsRef<Path>) -> Result<(CheckReport, Repaired)> {
    let path = path.as_ref();
    let (options, threads) = (Disk::options().writable(), Threads::per_core());
    let source = options.open_file(path)?;
    let report = checked(&source, path, &threads)?;
    let mut how = options.engine().with_layers(Layers::TopOnly);
    // Metadata is not encrypted, so no key is needed.
    (how.for_repair, how.metadata_only) = (true, true);
    let failed = |cause| Error::from_cause(path, "repairing the image", cause);
    let image = Image::open(source, &how).map_err(failed)?;
    let repaired = qcow2_ops::repair::repair(&image, &report, RepairMode::All, &threads, &Silent);
    let closed = image.close();
    let repaired = repaired.map_err(|e| Error::from_cause(path, "repairing the image", e))?;
    closed.map_err(failed)?;
    Ok((report, repaired))
}

fn checked(source: &ResolvedSource, path: &Path, threads: &dyn Executor) -> Result<CheckReport> {
    qcow2_ops::check(&*source.storage, &CheckOptions::default(), threads, &Silent)
        .map_err(|e| Error::from_cause(path, "checking the image", e))
}

impl Disk {
    /// Compares the guest content of this disk and `other`, whatever their formats; a shorter disk counts as
    /// followed by zeroes. Uses all processors. Errors: those of reading either.
    pub fn compare(&self, other: &Self) -> Result<Comparison> {
        let mut options = CompareOptions::default();
        options.names = [self, other].map(|disk| disk.path().display().to_string());
        let disks = [self.as_guest_disk(), other.as_guest_disk()];
        let report = qcow2_ops::compare(disks, &options, &Threads::per_core(), &Silent);
        report.map(|report| report.result).map_err(|e| self.failed("comparing disks", e))
    }

    /// CRC-32 of the guest content; the same for every image with that content. Uses all processors. Errors:
    /// those of reading.
    pub fn checksum(&self) -> Result<u32> {
        let sum = qcow2_ops::checksum(self.as_guest_disk(), &Threads::per_core(), &Silent);
        sum.map(|sum| sum.crc32).map_err(|e| self.failed("computing the checksum", e))
    }
}
