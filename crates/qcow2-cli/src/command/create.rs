//! `create`: a new image.

use crate::args::{Arguments, ImageArgs, Objects, Opt};
use crate::exit;
use crate::failure::Failure;
use crate::files::open_files;
use crate::newimage::{announcement, format_of, make, print_options, set_backing, target_of};
use crate::numbers::{SIGNED, parse_argument};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{KeptBacking, KeyValues, NewOptions, new_image_format, open_backing};
use qcow2_core::ImageFormat;
use qcow2_terminal::Interrupts;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let Some(request) = parse(session, args)? else {
        return Ok(exit::SUCCESS);
    };
    let about = |failure: Failure| failure.about(&request.filename);
    let format = new_image_format(&request.format).map_err(|failure| about(failure.into()))?;
    let target = target_of(&request.filename, &format).map_err(about)?;
    let (options, _kept) = settle(&request, &format).map_err(about)?;
    if !request.quiet {
        session.print(&format!("{}\n", announcement(&options, &request.filename)))?;
    }
    let interrupts = Interrupts::install();
    let made = make(session, &target, &options, &request.objects, &interrupts);
    made.map_err(|failure| about(persona::created(failure)))?;
    interrupts.end_files(true);
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
    let format = format_of(session, format, filename.as_deref().unwrap_or_default())?;
    if list.asks_help() {
        print_options(session, &new_image_format(&format)?, filename.as_deref())?;
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
fn settle(request: &Request, format: &ImageFormat) -> Result<(NewOptions, Option<KeptBacking>), Failure> {
    let mut options = NewOptions::parse(format, &request.list)?;
    match (request.size, options.number("size")) {
        (Some(_), Some(_)) => return Err(Failure::new("The image size must be specified only once")),
        (Some(size), None) => options.set_number("size", size),
        _ => {}
    }
    set_backing(&mut options, &request.backing, &request.backing_format)?;
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
        return Err(without_format().hint(format!("Detected format of {}.", opened.format.name())));
    }
    Ok((opened.disk.size().checked_next_multiple_of(512), kept.with(opened)))
}
