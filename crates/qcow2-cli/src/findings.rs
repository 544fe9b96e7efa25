//! What a check finds, told on standard error.

use crate::persona;
use crate::session::Session;
use qcow2_blockdev::Warning;
use qcow2_core::ResolvedSource;
use qcow2_image::Threads;
use qcow2_ops::Silent;
use qcow2_ops::check::{CheckOptions, CheckReport, Finding, Found, check};
use qcow2_ops::repair::is_refcount;
use qcow2_report::check as render;
use std::sync::atomic::{AtomicU64, Ordering};

/// Prints a finding, as repaired or not.
pub(crate) fn say(session: &Session, found: &Found, fixed: bool) {
    let line = render::finding(&found.finding, session.program());
    let line = match line.strip_prefix("Leaked ").or_else(|| line.strip_prefix("ERROR ")) {
        Some(rest) if fixed => format!("Repairing {rest}"),
        _ => line,
    };
    let times = found.times.min(1 << 32);
    let left = (MAX_LINES as u64).saturating_sub(SAID.fetch_add(times, Ordering::Relaxed));
    (0..times.min(left)).for_each(|_| say_lines(session, &line));
    if (1..times).contains(&left) {
        session.complain("... and more");
    }
}

/// A finding has names only with their line feeds escaped.
fn say_lines(session: &Session, finding: &str) {
    finding.lines().for_each(|line| session.complain(line));
}

/// Prints the findings, one a line; a damaged image may have any number of them.
pub(crate) fn complain(session: &Session, report: &CheckReport, wanted: &dyn Fn(&Finding) -> bool) {
    let findings = report.findings.iter().filter(|found| wanted(&found.finding));
    let lines = findings.flat_map(|found| (0..found.times).map(move |_| found));
    let say = |found: &Found| say_lines(session, &render::finding(&found.finding, session.program()));
    lines.take(MAX_LINES).for_each(say);
    let all = report.findings.iter().map(|found| found.times).fold(report.omitted, u64::saturating_add);
    if all > MAX_LINES as u64 {
        session.complain(&format!("... and {} more", all - MAX_LINES as u64));
    }
}

/// Says what opening the image in `source` for changes is about to do: `warning`, and for one that was not
/// closed cleanly what is put right. Disk: reads all tables of such an image.
pub(crate) fn tell_of_change(session: &Session, warning: &Warning, source: &ResolvedSource) {
    match warning {
        Warning::NotClosedCleanly => tell_of_recovery(session, source),
        Warning::GuessedRaw(_) => {
            persona::warning(warning).iter().for_each(|line| session.complain(line));
        }
        _ => session.warn_lines(&persona::warning(warning)),
    }
}

fn tell_of_recovery(session: &Session, source: &ResolvedSource) {
    // Nothing is changed yet, so a signal may end the program here. What goes wrong is told by the one who
    // opens the image.
    let Ok(report) = check(&*source.storage, &CheckOptions::default(), &Threads::per_core(), &Silent) else {
        return;
    };
    complain(session, &report, &|_| true);
    let fixed = report.findings.iter().filter(|found| is_refcount(&found.finding));
    fixed.for_each(|found| say(session, found, true));
}

/// How many findings are printed, and of those of repairs how many were: a damaged table that is used a
/// thousand times has each of its findings a thousand times.
const MAX_LINES: usize = 10_000;
static SAID: AtomicU64 = AtomicU64::new(0);
