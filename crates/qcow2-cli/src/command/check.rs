//! `check`: references against refcounts. Reports only.

use crate::args::{Arguments, ImageArgs, Opt, OutputFormat, parse_cache};
use crate::exit;
use crate::failure::Failure;
use crate::imagename::ImageName;
use crate::interrupt::Interrupts;
use crate::open::{OpenAs, open_below, open_file};
use crate::progress::Meter;
use crate::render::{check as render, json, qemu_text};
use crate::session::Session;
use crate::threads::Threads;
use qcow2_core::ImageFormat;
use qcow2_core::walk::SnapshotFault;
use qcow2_io::CacheMode;
use qcow2_ops::ErrorKind;
use qcow2_ops::check::{CheckOptions, CheckReport, Finding, Found};

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let report = check(session, &request)?;
    let wrong = report.corruptions + report.leaks + report.check_errors;
    complain(session, &report);
    if report.incomplete {
        return Err(Failure::new(format!("Check failed: {}", why_incomplete(&report))));
    }
    match request.output {
        _ if request.quiet && request.output == OutputFormat::Human => {}
        OutputFormat::Human => session.print(&render::to_text(&report))?,
        OutputFormat::Json => {
            session.print(&json::pretty(&render::to_json(&report, &request.filename, "qcow2")))?;
        }
    }
    if request.repair && wrong > 0 {
        return Err(Failure::new("Repairing images is not supported yet; nothing was changed"));
    }
    match (report.check_errors, report.corruptions, report.leaks) {
        (0, 0, 0) => Ok(exit::SUCCESS),
        (0, 0, _) => Ok(exit::CHECK_LEAKS),
        (0, _, _) => Ok(exit::CHECK_CORRUPT),
        _ => Err(Failure::new("Check failed")),
    }
}

/// Prints the findings, one a line; a damaged image may have any number of them.
fn complain(session: &Session, report: &CheckReport) {
    let times = |found: &Found| usize::try_from(found.times).unwrap_or(usize::MAX);
    let lines = report.findings.iter().flat_map(|found| std::iter::repeat_n(found, times(found)));
    for found in lines.take(MAX_LINES) {
        session.complain(&render::finding(&found.finding, session.program()));
    }
    let all = report.findings.iter().map(|found| found.times).fold(report.omitted, u64::saturating_add);
    if all > MAX_LINES as u64 {
        session.complain(&format!("... and {} more", all - MAX_LINES as u64));
    }
}

#[derive(Debug, Default)]
struct Request {
    image: ImageArgs,
    output: OutputFormat,
    cache: CacheMode,
    repair: bool,
    quiet: bool,
    filename: String,
}

impl Request {
    fn parse(session: &Session, mut args: Arguments) -> Result<Self, Failure> {
        let mut request = Self::default();
        let mut cache = None;
        let verb = args.verb();
        while let Some(given) = args.next(session)? {
            match given.opt {
                Opt::Format => request.image.format = Some(given.value),
                Opt::ImageOpts => request.image.image_opts = true,
                Opt::ForceShare => request.image.force_share = true,
                Opt::Output => request.output = OutputFormat::parse(verb, &given.value)?,
                Opt::Quiet => request.quiet = true,
                Opt::Cache => cache = Some(given.value),
                Opt::Repair if given.value == "leaks" || given.value == "all" => request.repair = true,
                Opt::Repair => {
                    let text = format!("--repair (-r) expects 'leaks' or 'all' not '{}'", given.value);
                    return Err(Failure::usage(verb, text));
                }
                Opt::Object => request.image.objects.add(&given.value)?,
                _ => {}
            }
        }
        request.filename = args.into_one_operand("Expecting one image file name")?;
        if let Some(text) = cache {
            request.cache = parse_cache("source cache", &text)?;
        }
        request.image.check()?;
        Ok(request)
    }
}

fn check(session: &Session, request: &Request) -> Result<CheckReport, Failure> {
    let name = ImageName::parse(&request.filename, &request.image)?;
    if request.repair && request.image.force_share {
        let reason = "force-share=on can only be used with read-only images";
        return Err(Failure::could_not_open(&name.typed, reason));
    }
    let how = OpenAs { cache: request.cache, ..OpenAs::READ };
    let source = open_file(&name, &request.image, how)?;
    if source.format != ImageFormat::Qcow2 {
        let failure = Failure::new("This image format does not support checks");
        return Err(failure.with_code(exit::CHECK_UNSUPPORTED));
    }
    open_below(&name, &source, how)?;
    let interrupts = Interrupts::default();
    let meter = Meter::new(session, &interrupts, false, 0);
    let options = CheckOptions::default();
    qcow2_ops::check::check(&*source.storage, &options, &Threads::per_core(), &meter).map_err(|error| match (
        error.kind(),
        error.core_error(),
    ) {
        (ErrorKind::Metadata, Some(engine)) => qemu_text::open_failure(&name.typed, "", engine),
        _ => Failure::new(format!("Check failed: {}", qemu_text::chain(&error))),
    })
}

/// The system's text that QEMU has for a snapshot table that cannot be read.
fn why_incomplete(report: &CheckReport) -> &'static str {
    let misplaced = |finding: &Finding| matches!(finding, Finding::Snapshot(SnapshotFault::Misplaced { .. }));
    match report.findings.iter().any(|found| misplaced(&found.finding)) {
        true => "Invalid argument",
        false => "File too large",
    }
}

/// How many findings are printed.
const MAX_LINES: usize = 10_000;
