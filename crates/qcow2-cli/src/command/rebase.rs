//! `rebase`: another backing file, and the same disk all the same; or, unsafe, another name for it.

use crate::args::{Arguments, ImageArgs, Opt, parse_cache};
use crate::exit;
use crate::failure::Failure;
use crate::open::{open_to_change, read_name};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{BackingFile, OpenFailure};
use qcow2_core::format::FormatErrorKind;
use qcow2_core::{Layers, find_cause};
use qcow2_image::Threads;
use qcow2_ops::rebase::Refusal;
use qcow2_ops::{Chain, ErrorKind, RebaseOptions};
use qcow2_terminal::Interrupts;
use qcow2_terminal::Meter;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let interrupts = Interrupts::install();
    let meter = Meter::new(session, &interrupts, request.progress && !request.quiet, false);
    meter.finish(rebase(session, &request, &meter)).map(|()| exit::SUCCESS)
}

#[derive(Debug, Default)]
struct Request {
    image: ImageArgs,
    cache: Option<String>,
    backing_cache: Option<String>,
    /// Empty: none.
    backing: Option<String>,
    backing_format: Option<String>,
    unsafe_mode: bool,
    compress: bool,
    progress: bool,
    quiet: bool,
    filename: String,
}

impl Request {
    fn parse(session: &Session, mut args: Arguments) -> Result<Self, Failure> {
        let mut request = Self::default();
        let verb = args.verb();
        while let Some(given) = args.next(session)? {
            match given.opt {
                Opt::Cache => request.cache = Some(given.value),
                Opt::BackingCache => request.backing_cache = Some(given.value),
                Opt::Backing => request.backing = Some(given.value),
                Opt::BackingFormat => request.backing_format = Some(given.value),
                Opt::BackingUnsafe => request.unsafe_mode = true,
                Opt::Compress => request.compress = true,
                Opt::Progress => request.progress = true,
                Opt::Quiet => request.quiet = true,
                opt => request.image.take(opt, given.value)?,
            }
        }
        request.filename = args.into_one_operand("Expecting one image file name")?;
        if request.backing.is_none() && !request.unsafe_mode {
            return Err(Failure::usage(verb.name, "Must specify backing file (-b) or use unsafe mode (-u)"));
        }
        Ok(request)
    }

    /// The new backing file, if there is to be one.
    fn new_backing(&self) -> Option<&str> {
        self.backing.as_deref().filter(|name| !name.is_empty())
    }
}

fn rebase(session: &Session, request: &Request, meter: &Meter) -> Result<(), Failure> {
    let cache = parse_cache("cache", request.cache.as_deref())?;
    let backing_cache = parse_cache("source cache", request.backing_cache.as_deref())?;
    request.image.check()?;
    let name = read_name(session, &request.filename, &request.image)?;
    let layers = if request.unsafe_mode { Layers::NoBacking } else { Layers::Follow };
    let how = request.image.options().with_cache(cache).with_layers(layers);
    let top = Chain::from(&open_to_change(session, &name, &how)?);
    let mut options = RebaseOptions::default().with_name_only(request.unsafe_mode);
    options.compress = request.compress;
    options.backing_file = request.new_backing().map(str::to_owned);
    options.backing_format.clone_from(&request.backing_format);
    let format = request.backing_format.clone();
    let below = ImageArgs { format, image_opts: false, ..request.image.clone() };
    let new = BackingFile {
        overlay: name.path().unwrap_or_default(),
        name: request.new_backing().unwrap_or_default(),
        naming: below.naming(),
        how: below.options().with_cache(backing_cache),
    };
    let rebased = qcow2_ops::rebase(top, &new, &options, &Threads::per_core(), meter);
    rebased.map(|_| ()).map_err(|error| failure(error, request))
}

fn not_changed(request: &Request, reason: &str) -> Failure {
    let name = request.backing.as_deref().unwrap_or("(null)");
    Failure::new(format!("Could not change the backing file to '{name}': {reason}"))
}

fn failure(error: qcow2_ops::Error, request: &Request) -> Failure {
    let error = match error.caller_error::<OpenFailure>() {
        Ok(failure) => {
            let backing = request.backing.as_deref().unwrap_or_default();
            let words = format!("Could not open new backing file '{backing}': ");
            return Failure::from(failure).without_name().after_words(&words);
        }
        Err(error) => error,
    };
    if let Some(refusal) = find_cause::<Refusal>(&error) {
        return refused(refusal, request);
    }
    match (error.kind(), error.core_error()) {
        (ErrorKind::Metadata | ErrorKind::InvalidOption, Some(engine)) => {
            not_changed(request, &reason(engine))
        }
        (ErrorKind::Close, Some(engine)) => {
            Failure::new(format!("Could not rebase the image: {}", persona::cause(engine)))
        }
        (ErrorKind::Extents, Some(engine)) => {
            Failure::new(format!("error while reading image metadata: {}", persona::cause(engine)))
        }
        (ErrorKind::Write, Some(engine)) => {
            Failure::new(format!("Error while writing to COW image: {}", persona::cause(engine)))
        }
        _ => persona::procedure(&error),
    }
}

fn refused(refusal: &Refusal, request: &Request) -> Failure {
    match refusal {
        Refusal::Compression => Failure::new("Compression not supported for this file format"),
        Refusal::UnknownFormat(format) => Failure::new(format!("Invalid format name: '{format}'")),
        Refusal::FormatMissing => not_changed(request, "backing format must be specified"),
        Refusal::NotAnImage => not_changed(request, "Operation not supported"),
        Refusal::RawDataFile => not_changed(request, "Invalid argument"),
        other => Failure::new(persona::capitalized(&other.to_string())),
    }
}

/// Why a name was not recorded.
fn reason(error: &qcow2_core::Error) -> String {
    match error.format_error().map(|error| error.kind()) {
        Some(FormatErrorKind::HeaderFull { .. }) => "No space left in the file header".to_owned(),
        Some(FormatErrorKind::BackingNameTooLong(_)) => "Invalid argument".to_owned(),
        _ => persona::cause(error),
    }
}
