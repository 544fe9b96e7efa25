//! `resize`: a longer or a shorter disk.

use crate::args::{Arguments, ImageArgs, Opt};
use crate::exit;
use crate::failure::Failure;
use crate::open::{close, open_to_change, read_name};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::read_size;
use qcow2_core::Preallocation;
use qcow2_ops::resize::{NewSize, ResizeOptions};
use qcow2_terminal::Interrupts;
use qcow2_terminal::Meter;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let name = read_name(session, &request.filename, &request.image)?;
    let mut how = request.image.options();
    how.resizes = true;
    let disk = open_to_change(session, &name, &how)?.disk;
    let interrupts = Interrupts::install();
    interrupts.hold();
    let meter = Meter::unasked(session, &interrupts);
    let resized = qcow2_ops::resize(&*disk, &request.options, &meter);
    let closed = close(&*disk);
    interrupts.die_if_asked();
    let preallocation = request.options.preallocation;
    resized.map_err(|error| persona::not_resized(session.program(), &error, preallocation, &*disk))?;
    closed.map_err(|error| Failure::new(format!("Could not resize image: {error}")))?;
    if !request.quiet {
        session.print("Image resized.\n")?;
    }
    Ok(exit::SUCCESS)
}

struct Request {
    quiet: bool,
    image: ImageArgs,
    options: ResizeOptions,
    filename: String,
}

impl Request {
    fn parse(session: &Session, args: Arguments) -> Result<Self, Failure> {
        let mut args = args.with_signed_number();
        let (mut image, mut quiet, mut shrink) = (ImageArgs::default(), false, false);
        let mut preallocation = Preallocation::Off;
        let verb = args.verb();
        while let Some(given) = args.next(session)? {
            match given.opt {
                Opt::Quiet => quiet = true,
                Opt::Shrink => shrink = true,
                Opt::Preallocation => {
                    let no_such = || Failure::new(format!("Invalid preallocation mode '{}'", given.value));
                    preallocation = Preallocation::from_name(&given.value).ok_or_else(no_such)?;
                }
                opt => image.take(opt, given.value)?,
            }
        }
        let operands = args.into_operands();
        let [filename, size] = match <[String; 2]>::try_from(operands) {
            Ok(operands) => operands,
            Err(operands) if operands.len() > 2 => {
                return Err(Failure::usage(verb.name, "Extra argument(s) in command line"));
            }
            Err(_) => return Err(Failure::usage(verb.name, "Expecting image file name and size")),
        };
        let mut options = ResizeOptions::new(parse_size(&size)?);
        options.shrink = shrink;
        options.preallocation = preallocation;
        image.check()?;
        Ok(Self { quiet, image, options, filename })
    }
}

fn parse_size(text: &str) -> Result<NewSize, Failure> {
    let read = |text: &str| read_size("size", text).map_err(Failure::from);
    match text.strip_prefix('+') {
        Some(change) => read(change).map(NewSize::Plus),
        None => match text.strip_prefix('-') {
            Some(change) => read(change).map(NewSize::Minus),
            None => read(text).map(NewSize::Exactly),
        },
    }
}
