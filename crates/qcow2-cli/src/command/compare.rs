//! `compare`: do two images hold the same bytes?

use crate::args::{Arguments, ImageArgs, Objects, Opt, parse_cache};
use crate::exit;
use crate::failure::Failure;
use crate::open::{read_name, warn_of_missing_end};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{OpenedDisk, open};
use qcow2_image::Threads;
use qcow2_ops::compare::{CompareOptions, CompareReport, Comparison};
use qcow2_ops::{Error, ErrorKind, Progress};
use qcow2_terminal::Interrupts;
use qcow2_terminal::{Meter, PERCENT};

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let interrupts = Interrupts::install();
    let wanted = request.progress && !request.quiet;
    let meter = Meter::new(session, &interrupts, wanted, request.json_progress).in_steps_of(PROGRESS_STEP);
    let opened = request.open(session).map_err(|failure| failure.with_code(exit::COMPARE_OPEN));
    let [a, b] = opened.inspect_err(|_| meter.end())?;
    [&a, &b].into_iter().for_each(|opened| warn_of_missing_end(session, opened));
    let mut options = CompareOptions::default();
    options.strict = request.strict;
    options.names = request.filenames.clone();
    let shown = Shown { meter: &meter, session, at_once: wanted };
    let compared = qcow2_ops::compare([&a.disk, &b.disk], &options, &Threads::per_core(), &shown);
    if let Ok(CompareReport { result: Comparison::Identical, .. }) = &compared {
        meter.complete();
    }
    // Progress is printed at once. Else a pipe gets all at the end, as from qemu-img: after an error.
    let later = !request.quiet && !wanted;
    let looked_past = later && compared.as_ref().is_err_and(Error::sizes_differ);
    let done = compared.map_err(|error| failure(&error)).and_then(|report| {
        let (text, code) = verdict(&report, later);
        if !request.quiet {
            // A lost text must not say of the same content that it differs.
            let lost = if code == exit::SUCCESS { exit::COMPARE_OPEN } else { code };
            session.print(&text).map_err(|failure| failure.with_code(lost))?;
        }
        Ok(code)
    });
    meter.end();
    interrupts.die_if_asked();
    done.or_else(|failure| {
        session.report(&failure);
        looked_past.then(|| session.print(MISMATCH)).transpose()?;
        Err(Failure::silent(failure.code()))
    })
}

/// The progress of a comparison, with a word where the smaller disk ends.
struct Shown<'a> {
    meter: &'a Meter,
    session: &'a Session,
    at_once: bool,
}

impl Progress for Shown<'_> {
    fn set_total(&self, bytes: u64) {
        self.meter.set_total(bytes);
    }

    fn advance(&self, bytes: u64) {
        self.meter.advance(bytes);
    }

    fn should_stop(&self) -> bool {
        self.meter.should_stop()
    }

    fn smaller_ended(&self) {
        // A reader that is gone is noticed when it does not get the result.
        let _ = self.at_once.then(|| self.session.print(MISMATCH));
    }
}

#[derive(Debug, Default)]
struct Request {
    format: Option<String>,
    second_format: Option<String>,
    image_opts: bool,
    objects: Objects,
    force_share: bool,
    cache: Option<String>,
    strict: bool,
    progress: bool,
    json_progress: bool,
    quiet: bool,
    filenames: [String; 2],
}

impl Request {
    fn parse(session: &Session, mut args: Arguments) -> Result<Self, Failure> {
        let mut request = Self::default();
        let verb = args.verb();
        while let Some(given) = args.next(session)? {
            match given.opt {
                Opt::Format => request.format = Some(given.value),
                Opt::FormatOfSecond => request.second_format = Some(given.value),
                Opt::ImageOpts => request.image_opts = true,
                Opt::ForceShare => request.force_share = true,
                Opt::Cache => request.cache = Some(given.value),
                Opt::Strict => request.strict = true,
                Opt::Progress => request.progress = true,
                Opt::JsonProgress => request.json_progress = true,
                Opt::Quiet => request.quiet = true,
                Opt::Object => {
                    request.objects.add(&given.value).map_err(|f| f.with_code(exit::COMPARE_OPEN))?;
                }
                _ => {}
            }
        }
        let filenames = <[String; 2]>::try_from(args.into_operands());
        request.filenames =
            filenames.map_err(|_| Failure::usage(verb.name, "Expecting two image file names"))?;
        Ok(request)
    }

    fn open(&self, session: &Session) -> Result<[OpenedDisk; 2], Failure> {
        let cache = parse_cache("source cache", self.cache.as_deref())?;
        let opened = |filename: &str, format: &Option<String>| -> Result<_, Failure> {
            let (image_opts, force_share) = (self.image_opts, self.force_share);
            let objects = self.objects.clone();
            let args = ImageArgs { format: format.clone(), image_opts, force_share, objects };
            args.check()?;
            let name = read_name(session, filename, &args)?;
            Ok(open(&name, &args.options().with_cache(cache))?)
        };
        Ok([opened(&self.filenames[0], &self.format)?, opened(&self.filenames[1], &self.second_format)?])
    }
}

/// What is printed, and the exit code. `warn`: different sizes were not mentioned before.
fn verdict(report: &CompareReport, warn: bool) -> (String, u8) {
    let warning = if report.sizes_differ && warn { MISMATCH } else { "" };
    let (text, code) = match report.result {
        Comparison::Identical => ("Images are identical.".to_owned(), exit::SUCCESS),
        Comparison::Content { offset } => (format!("Content mismatch at offset {offset}!"), exit::FAILURE),
        Comparison::Size => ("Strict mode: Image size mismatch!".to_owned(), exit::FAILURE),
        Comparison::State { offset } => {
            (format!("Strict mode: Offset {offset} block status mismatch!"), exit::FAILURE)
        }
        other => (format!("{other:?}"), exit::FAILURE),
    };
    (format!("{warning}{text}\n"), code)
}

fn failure(error: &Error) -> Failure {
    let code = match error.kind() {
        ErrorKind::Stopped => return Failure::silent(exit::FAILURE),
        ErrorKind::Extents => exit::COMPARE_EXTENTS,
        ErrorKind::Read => exit::COMPARE_READ,
        _ => exit::COMPARE_OPEN,
    };
    let text = match error.core_error() {
        Some(_) if error.kind() == ErrorKind::Extents => {
            format!("Sector allocation test failed for {}", error.disk().unwrap_or_default())
        }
        Some(engine) => {
            format!("{}: {}", persona::capitalized(&error.to_string()), persona::cause(engine))
        }
        None => persona::chain(error),
    };
    Failure::new(text).with_code(code)
}

/// Not an error: the rest of the larger disk is compared with zeroes.
const MISMATCH: &str = "Warning: Image size mismatch!\n";
/// Between two outputs.
const PROGRESS_STEP: u64 = 2 * PERCENT;
