//! `create`: a new image.

use crate::args::{Arguments, ImageArgs, Objects, Opt};
use crate::exit;
use crate::failure::Failure;
use crate::files::open_files;
use crate::imageopts::{ImageOptions, TargetFormat, print_options};
use crate::interrupt::Interrupts;
use crate::newimage;
use crate::numbers::{SIGNED, parse_argument};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{KeptBacking, KeyValues, NewTarget, open_backing};
use qcow2_core::ImageFormat;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let Some(request) = parse(session, args)? else {
        return Ok(exit::SUCCESS);
    };
    let about = |failure: Failure| failure.about(&request.filename);
    TargetFormat::parse(&request.format).map_err(about)?;
    let target = match NewTarget::parse(&request.filename) {
        Err(reason) if !request.filename.is_empty() => {
            return Err(about(Failure::new(persona::in_one_line(&reason))));
        }
        target => target.unwrap_or(NewTarget::File(String::new())),
    };
    let (options, _kept) = settle(&request).map_err(about)?;
    if !request.quiet {
        session.print(&format!("{}\n", options.announcement(&request.filename)))?;
    }
    let interrupts = Interrupts::install();
    let made = newimage::make(session, &target, &options, &interrupts);
    match made {
        Ok(()) => interrupts.finish_files(),
        Err(not_made) => {
            interrupts.discard_files();
            return Err(about(not_made.in_short(options.format())));
        }
    }
    Ok(exit::SUCCESS)
}

struct Request {
    quiet: bool,
    format: String,
    filename: String,
    size: Option<u64>,
    list: KeyValues,
    backing: Option<String>,
    backing_format: Option<String>,
    open_backing: bool,
    objects: Objects,
}

/// `None`: help was asked for and given.
fn parse(session: &Session, mut args: Arguments) -> Result<Option<Request>, Failure> {
    let (mut quiet, mut open_backing, mut format) = (false, true, None);
    let (mut backing, mut backing_format, mut texts) = (None, None, Vec::new());
    let mut objects = Objects::default();
    let verb = args.verb();
    while let Some(given) = args.next(session)? {
        match given.opt {
            Opt::Quiet => quiet = true,
            Opt::Format => format = Some(given.value),
            Opt::Backing => backing = Some(given.value),
            Opt::BackingFormat => backing_format = Some(given.value),
            Opt::BackingUnsafe => open_backing = false,
            Opt::Options => texts.push(KeyValues::checked(given.value)?),
            Opt::Object => objects.add(&given.value)?,
            _ => {}
        }
    }
    let list = KeyValues::parse_image_options(&texts);
    let mut operands = args.into_operands().into_iter();
    let filename = operands.next();
    let format = match format {
        Some(format) => format,
        None => newimage::format_of_name(session, filename.as_deref().unwrap_or_default())
            .map_err(|failure| failure.about(filename.as_deref().unwrap_or_default()))?
            .to_owned(),
    };
    if list.asks_help() {
        print_options(session, TargetFormat::parse(&format)?, filename.is_some())?;
        return Ok(None);
    }
    let filename = filename.ok_or_else(|| Failure::usage(verb.name, "Expecting image file name"))?;
    let size = operands.next().map(|text| parse_argument("image size", &text, SIGNED)).transpose()?;
    if let Some(extra) = operands.next() {
        return Err(Failure::usage(verb.name, format!("Unexpected argument: {extra}")));
    }
    Ok(Some(Request { quiet, format, filename, size, list, backing, backing_format, open_backing, objects }))
}

/// The options with everything that comes from elsewhere: the size operand, `-b`, `-F`, the backing file's
/// size. And the backing file, where there is to be one.
fn settle(request: &Request) -> Result<(ImageOptions, Option<KeptBacking>), Failure> {
    let format = TargetFormat::parse(&request.format)?;
    let mut options = ImageOptions::parse(format, &request.list)?;
    options.set_objects(&request.objects);
    match (request.size, options.number("size")) {
        (Some(_), Some(_)) => return Err(Failure::new("The image size must be specified only once")),
        (Some(size), None) => options.set_number("size", size),
        _ => {}
    }
    let layered = |what: &str, value: &Option<String>| match value {
        Some(_) if !format.is_layered() => {
            Err(Failure::new(format!("Backing {what} not supported for file format '{}'", format.name())))
        }
        _ => Ok(()),
    };
    layered("file", &request.backing)?;
    layered("file format", &request.backing_format)?;
    if let Some(backing) = &request.backing {
        options.set_text("backing_file", backing);
    }
    if let Some(backing_format) = &request.backing_format {
        options.set_text("backing_fmt", backing_format);
    }
    let mut kept = None;
    if let Some(backing) = options.text("backing_file") {
        let (found, files) = look_at_backing(request, backing, options.text("backing_fmt"))?;
        kept = Some(files);
        if let Some(size) = found.filter(|_| options.number("size").is_none()) {
            options.set_number("size", size);
        }
    }
    match options.number("size") {
        Some(_) => Ok((options, kept)),
        None => Err(Failure::new("Image creation needs a size parameter")),
    }
}

/// Opens the backing file with its chain and returns its size; `None` where it is not to be opened.
fn look_at_backing(
    request: &Request,
    name: &str,
    format: Option<&str>,
) -> Result<(Option<u64>, KeptBacking), Failure> {
    if name.is_empty() {
        return Err(Failure::new("Expected backing file name, got empty string"));
    }
    if name == request.filename {
        let text = "Error: Trying to create an image with the same filename as the backing file";
        return Err(Failure::new(text));
    }
    let without_format = || Failure::new("Backing file specified without backing format");
    let kept = KeptBacking::unopened(open_files(), &request.filename, name);
    if !request.open_backing {
        return if format.is_some() { Ok((None, kept)) } else { Err(without_format()) };
    }
    let (format_name, objects) = (format.map(str::to_owned), request.objects.clone());
    let args = ImageArgs { format: format_name, objects, ..ImageArgs::default() };
    let opened = open_backing(&request.filename, name, &args.naming(), &args.options())
        .map_err(|failure| Failure::from(failure).without_name().hint("Could not open backing image."))?;
    if format.is_none() {
        let detected = match opened.format {
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Luks => "luks",
            _ => "raw",
        };
        return Err(without_format().hint(format!("Detected format of {detected}.")));
    }
    Ok((opened.disk.size().checked_next_multiple_of(512), kept.with(opened)))
}
