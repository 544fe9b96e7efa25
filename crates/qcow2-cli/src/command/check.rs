//! `check`: references against refcounts; repairs on request.

use crate::args::{Arguments, ImageArgs, Opt, OutputFormat, parse_cache};
use crate::exit;
use crate::failure::Failure;
use crate::findings::{complain, say};
use crate::open::{complain_of_guess, read_name};
use crate::persona;
use crate::policy::policy;
use crate::session::Session;
use qcow2_blockdev::{Follow, ImageName, open_below, open_bytes, open_layers};
use qcow2_core::format::header::CryptMethod;
use qcow2_core::walk::SnapshotFault;
use qcow2_core::{EncryptedLayer, ImageFormat, Keyring, Layers, ResolvedSource, Storage};
use qcow2_image::Threads;
use qcow2_io::CacheMode;
use qcow2_ops::ErrorKind;
use qcow2_ops::check::{CheckReport, Finding, Found};
use qcow2_ops::repair::{
    Outcome, RepairMode, Repaired, check_and_repair, is_copied_flag, is_refcount, rehearse,
};
use qcow2_report::check::Fixed;
use qcow2_report::{check as render, json};
use qcow2_terminal::Interrupts;
use qcow2_terminal::Meter;
use std::cell::Cell;
use std::sync::Arc;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let (report, repaired) = check(session, &request)?;
    if report.incomplete && repaired.is_none() {
        complain(session, &report, &|_| true);
        return Err(Failure::new(format!("Check failed: {}", why_incomplete(&report))));
    }
    let fixed = match &repaired {
        Some(repaired) => tell(session, &request, &report, repaired)?,
        None => {
            complain(session, &report, &|_| true);
            Fixed::default()
        }
    };
    let changes = repaired.as_ref().filter(|_| request.dry_run).map(|repaired| repaired.changes(&report));
    let before = report.clone();
    let after = repaired.and_then(|repaired| repaired.after).unwrap_or(report);
    let text = match request.output {
        _ if request.quiet => String::new(),
        OutputFormat::Human => render::to_text(&after) + &render::changes_text(changes.as_deref()),
        OutputFormat::Json => {
            let told = render::to_json(&after, &fixed, &request.filename, "qcow2");
            json::pretty(&render::with_changes(told, changes))
        }
    };
    // A dry run leaves the image as it is.
    let left = if request.dry_run { &before } else { &after };
    let code = match (left.check_errors, left.corruptions, left.leaks) {
        (0, 0, 0) => exit::SUCCESS,
        (0, 0, _) => exit::CHECK_LEAKS,
        (0, _, _) => exit::CHECK_CORRUPT,
        _ => exit::FAILURE,
    };
    // A lost text says less than what was found: that stays the exit code.
    let lost = if code == exit::SUCCESS { exit::FAILURE } else { code };
    session.print(&text).map_err(|failure| failure.with_code(lost))?;
    if code == exit::FAILURE { Err(Failure::new("Check failed")) } else { Ok(code) }
}

/// Says what was found, what became of it, and what is found then.
fn tell(
    session: &Session,
    request: &Request,
    report: &CheckReport,
    repaired: &Repaired,
) -> Result<Fixed, Failure> {
    if let (Some(counted), Some(after)) = (&repaired.counted, &repaired.after) {
        tell_mended(session, report, counted, after);
        return summary(session, request, repaired);
    }
    let touched = repaired.after.is_some() || !repaired.copied.is_empty();
    complain(session, report, &|finding| !touched || !is_copied_flag(finding));
    if !touched {
        return Ok(Fixed::default());
    }
    for found in report.findings.iter().filter(|found| is_refcount(&found.finding)) {
        let fixed = match found.finding {
            Finding::Refcount { stored, references, .. } => {
                stored > references || request.repair == Some(RepairMode::All)
            }
            _ => false,
        };
        say(session, found, fixed);
    }
    repaired.copied.iter().for_each(|found| say(session, found, repaired.copied_fixed));
    summary(session, request, repaired)
}

/// Says what was wrong with entries of tables, then with the refcounts, and what of it is repaired.
fn tell_mended(session: &Session, report: &CheckReport, counted: &CheckReport, after: &CheckReport) {
    let of_entries = |finding: &Finding| !is_refcount(finding) && !is_copied_flag(finding);
    for found in report.findings.iter().filter(|found| of_entries(&found.finding)) {
        say(session, found, !after.findings.contains(found));
    }
    complain(session, counted, &is_refcount);
    let rest = [is_refcount, is_copied_flag];
    for wanted in rest {
        let fixed = |found: &&Found| wanted(&found.finding) && !after.findings.contains(found);
        counted.findings.iter().filter(fixed).for_each(|found| say(session, found, true));
    }
}

/// The numbers, and what is found now.
fn summary(session: &Session, request: &Request, repaired: &Repaired) -> Result<Fixed, Failure> {
    let (leaks, corruptions) = (repaired.leaks_fixed, repaired.corruptions_fixed);
    if let Some(after) = &repaired.after {
        if request.output == OutputFormat::Human && !request.quiet {
            session.print(&format!(
                "The following inconsistencies {}:\n\n    {leaks} leaked clusters\n    \
                 {corruptions} corruptions\n\nDouble checking the fixed image now...\n",
                if request.dry_run { "would be repaired" } else { "were found and repaired" }
            ))?;
        }
        complain(session, after, &|_| true);
    }
    Ok(Fixed { leaks, corruptions })
}

#[derive(Debug, Default)]
struct Request {
    image: ImageArgs,
    output: OutputFormat,
    cache: CacheMode,
    repair: Option<RepairMode>,
    dry_run: bool,
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
                Opt::Output => request.output = OutputFormat::parse(verb, &given.value)?,
                Opt::Quiet => request.quiet = true,
                Opt::Cache => cache = Some(given.value),
                Opt::Repair if given.value == "leaks" => request.repair = Some(RepairMode::Leaks),
                Opt::Repair if given.value == "all" => request.repair = Some(RepairMode::All),
                Opt::DryRun => request.dry_run = true,
                Opt::Repair => {
                    let text = format!("--repair (-r) expects 'leaks' or 'all' not '{}'", given.value);
                    return Err(Failure::usage(verb.name, text));
                }
                opt => request.image.take(opt, given.value)?,
            }
        }
        request.filename = args.into_one_operand("Expecting one image file name")?;
        request.cache = parse_cache("source cache", cache.as_deref())?;
        request.image.check()?;
        if request.dry_run && request.repair.is_none() {
            return Err(Failure::usage(verb.name, "--dry-run needs --repair (-r)"));
        }
        Ok(request)
    }
}

/// Asks for the key of an encrypted image, as QEMU does, though its tables can be read without.
fn unlock(name: &ImageName, source: &ResolvedSource) -> Result<(), Failure> {
    let Ok(header) = qcow2_core::walk::read_header(&*source.storage) else {
        // What is wrong with it is told by the check.
        return Ok(());
    };
    if header.crypt_method == CryptMethod::None {
        return Ok(());
    }
    let luks = header.extensions.luks;
    let layer = EncryptedLayer::new((0, &*source.name), header.crypt_method, luks, &*source.storage);
    let unlocked = name.keys.unlock(&layer).map(|_| ());
    unlocked.map_err(|error| Failure::could_not_open(&name.typed, &persona::unlock(&error)))
}

fn check(session: &Session, request: &Request) -> Result<(CheckReport, Option<Repaired>), Failure> {
    let name = read_name(session, &request.filename, &request.image)?;
    if request.repair.is_some() && !request.dry_run && request.image.force_share {
        return Err(Failure::could_not_open(&name.typed, persona::SHARED_AND_WRITABLE));
    }
    let reading = request.image.options().with_cache(request.cache);
    let mut how = reading.clone();
    how.writable = request.repair.is_some() && !request.dry_run;
    let source = open_bytes(&name, &how)?.source;
    if how.writable {
        complain_of_guess(session, &name, &source.format);
    }
    if source.format != ImageFormat::Qcow2 {
        open_layers(&name, source, &reading, 0)?;
        let failure = Failure::new("This image format does not support checks");
        return Err(failure.with_code(exit::CHECK_UNSUPPORTED));
    }
    unlock(&name, &source)?;
    // A check reads no other file. qemu-img opens the chain, and fails without; a repair must not change a
    // data file that is the image itself.
    let as_qemu_img = session.is_drop_in() && policy().follow == Follow::All;
    if as_qemu_img || request.repair.is_some() {
        let layers = if as_qemu_img { Layers::Follow } else { Layers::NoBacking };
        open_below(&name, &source, &reading.clone().with_layers(layers))?;
    }
    let interrupts = Interrupts::install();
    let meter = Meter::unasked(session, &interrupts);
    let workers = Threads::per_core();
    let failed = |error: qcow2_ops::Error| match (error.kind(), error.core_error()) {
        (ErrorKind::Open, _) => error.caller_error().unwrap_or_else(|e| Failure::new(persona::chain(&e))),
        (ErrorKind::Write, Some(engine)) => Failure::new(format!("Check failed: {}", persona::cause(engine))),
        (ErrorKind::Stopped, _) => {
            interrupts.die_if_asked();
            Failure::silent(exit::FAILURE)
        }
        (ErrorKind::Metadata, Some(engine)) => persona::engine_failure(&name.typed, engine),
        _ => Failure::new(format!("Check failed: {}", persona::chain(&error))),
    };
    let storage = Arc::clone(&source.storage);
    let source = Cell::new(Some(source));
    let mut how = how.top_only();
    (how.for_repair, how.writable) = (true, request.repair.is_some());
    let open = |storage: Option<Arc<dyn Storage>>| {
        let mut source = source.take().ok_or_else(|| Failure::new("the image is opened for repair once"))?;
        source.storage = storage.unwrap_or(source.storage);
        Ok(open_layers(&name, source, &how, 0).map_err(Failure::from)?.disk)
    };
    let checked = match request.repair.filter(|_| request.dry_run) {
        Some(mode) => rehearse(storage, mode, &|draft| open(Some(draft)), &workers, &meter),
        None => check_and_repair(&*storage, request.repair, &|| open(None), &workers, &meter),
    };
    let checked = checked.map_err(failed)?;
    match checked.repair {
        Outcome::Repaired(repaired) => Ok((checked.report, Some(*repaired))),
        Outcome::NeedsAll => {
            complain(session, &checked.report, &|finding| !is_copied_flag(finding));
            session.complain("ERROR need to rebuild refcount structures");
            Err(Failure::new("Check failed: Input/output error"))
        }
        _ => Ok((checked.report, None)),
    }
}

/// The system's text that QEMU has for a snapshot table that cannot be read.
fn why_incomplete(report: &CheckReport) -> &'static str {
    let misplaced = |finding: &Finding| matches!(finding, Finding::Snapshot(SnapshotFault::Misplaced { .. }));
    match report.findings.iter().any(|found| misplaced(&found.finding)) {
        true => "Invalid argument",
        false => "File too large",
    }
}
