//! `rebase`: another backing file, and the same disk all the same; or, unsafe, another name for it.

use crate::args::{Arguments, ImageArgs, Opt, parse_cache};
use crate::exit;
use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::open::{close, open_to_change, read_name};
use crate::persona;
use crate::progress::Meter;
use crate::session::Session;
use qcow2_blockdev::{ImageName, LayerFiles, OpenedDisk, is_known_driver, locate_backing, open};
use qcow2_core::format::{AutoclearFeatures, FormatErrorKind};
use qcow2_core::{BackingName, Layers};
use qcow2_image::Threads;
use qcow2_io::CacheMode;
use qcow2_ops::{ErrorKind, RebaseOptions};
use std::path::PathBuf;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let interrupts = Interrupts::install();
    let meter = Meter::new(session, &interrupts, request.progress && !request.quiet, PROGRESS_STEP);
    let rebased = rebase(session, &request, &meter);
    if rebased.is_ok() {
        meter.complete_again();
    }
    meter.end();
    interrupts.die_if_asked();
    rebased.map(|()| exit::SUCCESS)
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
                Opt::Format => request.image.format = Some(given.value),
                Opt::ImageOpts => request.image.image_opts = true,
                Opt::ForceShare => request.image.force_share = true,
                Opt::Cache => request.cache = Some(given.value),
                Opt::BackingCache => request.backing_cache = Some(given.value),
                Opt::Backing => request.backing = Some(given.value),
                Opt::BackingFormat => request.backing_format = Some(given.value),
                Opt::BackingUnsafe => request.unsafe_mode = true,
                Opt::Compress => request.compress = true,
                Opt::Progress => request.progress = true,
                Opt::Quiet => request.quiet = true,
                Opt::Object => request.image.objects.add(&given.value)?,
                _ => {}
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
    let cache = read_cache("cache", &request.cache)?;
    let backing_cache = read_cache("source cache", &request.backing_cache)?;
    request.image.check()?;
    let name = read_name(session, &request.filename, &request.image)?;
    let layers = if request.unsafe_mode { Layers::NoBacking } else { Layers::Follow };
    let how = request.image.options().with_cache(cache).with_layers(layers);
    let top = open_to_change(session, &name, &how)?;
    if request.compress && top.disk.as_image().is_none() {
        return Err(Failure::new("Compression not supported for this file format"));
    }
    if let Some(format) = request.backing_format.as_deref().filter(|format| !is_known_driver(format)) {
        return Err(Failure::new(format!("Invalid format name: '{format}'")));
    }
    // What can have no backing file is not written to. It goes before the new backing file comes, which it
    // may be.
    let top = Some(top).filter(|top| top.disk.as_image().is_some());
    let new = match request.new_backing().filter(|_| !request.unsafe_mode) {
        Some(backing) => Some(open_new(request, &name, backing, backing_cache)?),
        None => None,
    };
    if request.new_backing().is_some() && request.backing_format.is_none() {
        return Err(not_changed(request, "backing format must be specified"));
    }
    let Some((top, image)) = top.as_ref().and_then(|top| Some((top, top.disk.as_image()?))) else {
        return Err(not_changed(request, "Operation not supported"));
    };
    let raw_data = image.header().autoclear_features.contains(AutoclearFeatures::RAW_DATA_FILE);
    if raw_data && request.new_backing().is_some() {
        return Err(not_changed(request, "Invalid argument"));
    }
    if !request.unsafe_mode {
        let mut options = RebaseOptions::default();
        options.compress = request.compress;
        options.shared = new.as_ref().and_then(|new| shared_layer(&top.files[1..], &new.files));
        let new = new.as_ref().map(|new| &new.disk);
        let copied = qcow2_ops::rebase(image, new, &options, &Threads::per_core(), meter);
        if let Err(error) = copied {
            // What was copied is right with the old backing file too.
            let _ = close(&*top.disk);
            return Err(failure(&error));
        }
    }
    let backing = request
        .new_backing()
        .map(|name| BackingName { name: name.to_owned(), format: request.backing_format.clone() });
    image.change_backing(backing.as_ref()).map_err(|error| {
        let reason = match error.format_error().map(|error| error.kind()) {
            Some(FormatErrorKind::HeaderFull { .. }) => "No space left in the file header".to_owned(),
            Some(FormatErrorKind::BackingNameTooLong(_)) => "Invalid argument".to_owned(),
            _ => persona::cause(&error),
        };
        not_changed(request, &reason)
    })?;
    close(&*top.disk).map_err(|reason| Failure::new(format!("Could not rebase the image: {reason}")))
}

fn read_cache(what: &str, text: &Option<String>) -> Result<CacheMode, Failure> {
    text.as_ref().map_or(Ok(CacheMode::default()), |text| parse_cache(what, text))
}

/// Opens the new backing file with its chain; its name is relative to the image's place.
fn open_new(
    request: &Request,
    name: &ImageName,
    backing: &str,
    cache: CacheMode,
) -> Result<OpenedDisk, Failure> {
    let format = request.backing_format.as_deref();
    let image_opts = false;
    let args = ImageArgs { format: format.map(str::to_owned), image_opts, ..request.image.clone() };
    let located = locate_backing(name.path().unwrap_or_default(), backing);
    let how = args.options().with_cache(cache);
    let opened = ImageName::parse(&located, &args.naming()).and_then(|name| open(&name, &how));
    opened.map_err(|failure| {
        Failure::from(failure)
            .without_name()
            .after_words(&format!("Could not open new backing file '{backing}': "))
    })
}

/// The first layer of the old chain that the new one has too, by its number in both.
fn shared_layer(old: &[LayerFiles], new: &[LayerFiles]) -> Option<(u32, u32)> {
    let place = |layer: &LayerFiles| -> Option<(PathBuf, bool)> {
        Some((PathBuf::from(&layer.image).canonicalize().ok()?, layer.raw))
    };
    let new: Vec<_> = new.iter().map(place).collect();
    (0..).zip(old).find_map(|(depth, layer)| {
        let wanted = Some(place(layer)?);
        let at = new.iter().position(|place| *place == wanted)?;
        Some((depth, u32::try_from(at).ok()?))
    })
}

fn not_changed(request: &Request, reason: &str) -> Failure {
    let name = request.backing.as_deref().unwrap_or("(null)");
    Failure::new(format!("Could not change the backing file to '{name}': {reason}"))
}

fn failure(error: &qcow2_ops::Error) -> Failure {
    if error.kind() == ErrorKind::Stopped {
        return Failure::silent(exit::FAILURE);
    }
    match error.core_error() {
        Some(engine) if error.kind() == ErrorKind::Extents => {
            Failure::new(format!("error while reading image metadata: {}", persona::cause(engine)))
        }
        Some(engine) if error.kind() == ErrorKind::Write => {
            Failure::new(format!("Error while writing to COW image: {}", persona::cause(engine)))
        }
        Some(engine) => Failure::new(format!("{error}: {}", persona::cause(engine))),
        None => Failure::new(persona::chain(error)),
    }
}

/// Hundredths of a percent between two outputs.
const PROGRESS_STEP: u64 = 100;
