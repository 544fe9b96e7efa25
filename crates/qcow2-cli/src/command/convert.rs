//! `convert`: sources, one after the other, into a new image or an existing one.

mod request;
mod stream;
mod target;

use crate::args::Arguments;
use crate::exit;
use crate::failure::Failure;
use crate::open::{close, read_name, warn_of_missing_end};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{ImageName, OpenedDisk, Sharing, open, open_snapshot};
use qcow2_core::GuestDisk;
use qcow2_core::format::Version;
use qcow2_image::Threads;
use qcow2_io::os_error_text;
use qcow2_ops::{CopyReport, converted_size, snapshot::SnapshotName};
use qcow2_terminal::Interrupts;
use qcow2_terminal::Meter;
use request::Request;
pub(crate) use request::parse_snapshot;
use std::sync::Arc;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let Some(request) = Request::parse(session, args)? else {
        return Ok(exit::SUCCESS);
    };
    if stream::is_asked_for(session, &request) {
        return stream::run(session, request);
    }
    let interrupts = Interrupts::install();
    let wanted = request.shown.progress && !request.shown.quiet;
    let meter = Meter::new(session, &interrupts, wanted, request.shown.json_progress);
    let converted = convert(session, &request, &interrupts, &meter);
    interrupts.end_files(converted.is_ok());
    meter.finish(converted).map(|()| exit::SUCCESS)
}

fn convert(
    session: &Session,
    request: &Request,
    interrupts: &Interrupts,
    meter: &Meter,
) -> Result<(), Failure> {
    let sources = open_sources(session, request)?;
    sources.iter().for_each(|source| warn_of_missing_end(session, source));
    let disks: Vec<Arc<dyn GuestDisk>> = sources.iter().map(|source| Arc::clone(&source.disk)).collect();
    let size = converted_size(&disks).map_err(|error| Failure::new(persona::chain(&error)))?;
    let target = target::open(session, request, &sources, size, interrupts)?;
    if target.size() < size {
        return Err(Failure::new("output file is smaller than input file"));
    }
    let options = request.options(target.backing().is_some())?;
    let workers = request.copy.workers.map_or_else(Threads::per_core, Threads::new);
    let report = qcow2_ops::convert(&disks, &*target, &options, &workers, meter)
        .map_err(|e| persona::procedure(&e))?;
    interrupts.stop_watching();
    warn_of_losses(session, request, &report);
    copy_bitmaps(session, request, &disks, &*target)?;
    finish(&*target)
}

fn open_sources(session: &Session, request: &Request) -> Result<Vec<OpenedDisk>, Failure> {
    let source = &request.source;
    let how = source.args.options().with_cache(source.cache).with_sharing(Sharing::Alone);
    let read = |typed: &String| read_name(session, typed, &request.source.args);
    if let (Some(wanted), [only]) = (&request.source.snapshot, &request.source.names[..]) {
        return Ok(vec![open_snapshot(&read(only)?, &how, |all| wanted.position(all))?]);
    }
    let open = |typed: &String| -> Result<_, Failure> { Ok(open(&read(typed)?, &how)?) };
    let mut sources = request.source.names.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    match &request.source.snapshot {
        None => Ok(sources),
        Some(SnapshotName::Any(_)) => Err(Failure::new("No support for concatenating multiple snapshot")),
        // One that is named by what it must have is looked for in the first source, when all are open.
        Some(wanted) => {
            let first = ImageName::parse(&request.source.names[0], &request.source.args.naming())?;
            sources[0] = open_snapshot(&first, &how, |all| wanted.position(all))?;
            Ok(sources)
        }
    }
}

/// Makes all durable, as far as the cache mode wants it, and leaves the target clean.
pub(super) fn finish(target: &dyn GuestDisk) -> Result<(), Failure> {
    close(target).map_err(|reason| Failure::new(format!("error while closing the target: {reason}")))
}

/// The bitmaps of the one source go along, where that is wanted.
fn copy_bitmaps(
    session: &Session,
    request: &Request,
    sources: &[Arc<dyn GuestDisk>],
    target: &dyn GuestDisk,
) -> Result<(), Failure> {
    let source = sources.first().and_then(|source| source.as_image()).filter(|_| request.copy.bitmaps);
    let Some(source) = source else { return Ok(()) };
    let target = target.as_image().filter(|image| image.header().version >= Version::V3);
    let target = target.ok_or_else(|| Failure::new("Format driver 'qcow2' does not support bitmaps"))?;
    let skipped = qcow2_ops::bitmap::copy_bitmaps(source, target, request.copy.skip_broken_bitmaps);
    let skipped = skipped.map_err(|error| match error.core_error() {
        Some(engine) => Failure::new(format!("{error}: {}", persona::capitalized(&persona::cause(engine)))),
        None => Failure::new(persona::chain(&error)),
    })?;
    skipped.iter().for_each(|name| session.warn(&format!("Skipping inconsistent bitmap '{name}'")));
    Ok(())
}

fn warn_of_losses(session: &Session, request: &Request, report: &CopyReport) {
    let words = |code: Option<i32>| os_error_text(code.unwrap_or(IO_ERROR));
    if !request.shown.quiet {
        report.tell_losses(session.is_drop_in(), &words, &mut |text| session.warn(text));
    }
}

/// Of damaged tables.
const IO_ERROR: i32 = 5;
