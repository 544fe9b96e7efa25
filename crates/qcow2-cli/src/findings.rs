//! What a check finds, told on standard error.

use crate::render::{check as render, qemu_text};
use crate::session::Session;
use crate::threads::Threads;
use qcow2_core::bitmap::{check_bitmaps, read_bitmaps};
use qcow2_core::format::Header;
use qcow2_core::format::bitmap::Bitmap;
use qcow2_core::walk::read_header;
use qcow2_core::{ErrorKind, ImageFormat, ResolvedSource, Storage};
use qcow2_ops::Silent;
use qcow2_ops::check::{CheckOptions, CheckReport, Finding, Found, check};
use qcow2_ops::repair::is_refcount;

/// Prints a finding, as repaired or not.
pub(crate) fn say(session: &Session, found: &Found, fixed: bool) {
    let line = render::finding(&found.finding, session.program());
    let line = match line.strip_prefix("Leaked ").or_else(|| line.strip_prefix("ERROR ")) {
        Some(rest) if fixed => format!("Repairing {rest}"),
        _ => line,
    };
    (0..found.times.min(MAX_LINES as u64)).for_each(|_| session.complain(&line));
}

/// Prints the findings, one a line; a damaged image may have any number of them.
pub(crate) fn complain(session: &Session, report: &CheckReport, wanted: &dyn Fn(&Finding) -> bool) {
    let times = |found: &Found| usize::try_from(found.times).unwrap_or(usize::MAX);
    let findings = report.findings.iter().filter(|found| wanted(&found.finding));
    let lines = findings.flat_map(|found| std::iter::repeat_n(found, times(found)));
    for found in lines.take(MAX_LINES) {
        session.complain(&render::finding(&found.finding, session.program()));
    }
    let all = report.findings.iter().map(|found| found.times).fold(report.omitted, u64::saturating_add);
    if all > MAX_LINES as u64 {
        session.complain(&format!("... and {} more", all - MAX_LINES as u64));
    }
}

/// Says what opening the image in `source` for changes is about to put right, the refcounts of one that was
/// not closed cleanly, and which bitmaps its first change loses. Disk: reads the tables of bitmaps, and all
/// tables of such an image.
pub(crate) fn tell_of_recovery(session: &Session, source: &ResolvedSource) {
    if source.format != ImageFormat::Qcow2 {
        return;
    }
    let Ok(header) = read_header(&*source.storage) else { return };
    bitmaps_to_lose(&*source.storage, &header).iter().for_each(|text| session.warn(text));
    if !header.is_dirty() || header.is_corrupt() {
        return;
    }
    // Nothing is changed yet, so a signal may end the program here. What goes wrong is told by the one who
    // opens the image.
    let Ok(report) = check(&*source.storage, &CheckOptions::default(), &Threads::per_core(), &Silent) else {
        return;
    };
    complain(session, &report, &|_| true);
    report
        .findings
        .iter()
        .filter(|found| is_refcount(&found.finding))
        .for_each(|found| say(session, found, true));
}

/// What is said of an image of which the first change loses the bitmaps, because they are damaged. Disk:
/// reads their tables.
pub(crate) fn bitmaps_to_lose(storage: &dyn Storage, header: &Header) -> Option<String> {
    let records = |bitmaps: Vec<Bitmap>| bitmaps.iter().any(|bitmap| bitmap.auto && !bitmap.in_use);
    if !read_bitmaps(storage, header).map_or(true, records) {
        return None;
    }
    // Those that are merely too large refuse the change, and a failing device is told when it is used.
    let damage = check_bitmaps(storage, header).err().filter(|error| error.kind() == ErrorKind::Corrupt)?;
    Some(format!("bitmaps are damaged, and lost when the disk is changed: {}", qemu_text::chain(&damage)))
}

/// How many findings are printed.
const MAX_LINES: usize = 10_000;
