//! `dd`: a part of an image as a new image.

use crate::args::{Arguments, ImageArgs, Opt};
use crate::exit;
use crate::failure::Failure;
use crate::imagename::{Driver, ImageName, NewTarget, new_target};
use crate::imageopts::{ImageOptions, TargetFormat};
use crate::interrupt::Interrupts;
use crate::newimage;
use crate::numbers::{SIGNED, parse_argument, parse_count};
use crate::open::{OpenAs, close, open_image, warn_of_missing_end};
use crate::optlist::OptList;
use crate::progress::Meter;
use crate::render::qemu_text;
use crate::session::Session;
use crate::threads::Threads;
use qcow2_ops::ErrorKind;
use qcow2_ops::dd::{DdOptions, dd, dd_range};

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let interrupts = Interrupts::install();
    let copied = copy(session, &request, &interrupts);
    match &copied {
        Ok(()) => interrupts.finish_files(),
        Err(_) => interrupts.discard_files(),
    }
    interrupts.die_if_asked();
    copied.map(|()| exit::SUCCESS)
}

#[derive(Debug)]
struct Request {
    image: ImageArgs,
    target_format: String,
    options: DdOptions,
    input: String,
    output: String,
}

impl Request {
    fn parse(session: &Session, mut args: Arguments) -> Result<Self, Failure> {
        let mut image = ImageArgs::default();
        let mut target_format = None;
        while let Some(given) = args.next(session)? {
            match given.opt {
                Opt::Format => image.format = Some(given.value),
                Opt::ImageOpts => image.image_opts = true,
                Opt::ForceShare => image.force_share = true,
                Opt::TargetFormat => target_format = Some(given.value),
                Opt::Object => image.objects.add(&given.value)?,
                _ => {}
            }
        }
        let (mut input, mut output, mut options) = (None, None, DdOptions::default());
        for operand in args.into_operands() {
            let (key, value) = match operand.split_once('=') {
                Some((key, value)) => (key, value),
                None => (&*operand, ""),
            };
            match key {
                "bs" => options.block_size = parse_argument("bs", value, 1..=i32::MAX as u64)?,
                "count" => options.count = Some(parse_count("count", value, SIGNED)?),
                "skip" => options.skip = parse_count("skip", value, SIGNED)?,
                "if" => input = Some(value.to_owned()),
                "of" => output = Some(value.to_owned()),
                _ => return Err(Failure::new(format!("unrecognized operand {key}"))),
            }
        }
        match (input, output) {
            (Some(input), Some(output)) => {
                image.check()?;
                let target_format = match target_format {
                    Some(format) => format,
                    None => newimage::format_of_name(session, &output)
                        .map_err(|failure| failure.about(&output))?
                        .to_owned(),
                };
                Ok(Self { image, target_format, options, input, output })
            }
            _ => Err(Failure::new("Must specify both input and output files")),
        }
    }
}

fn copy(session: &Session, request: &Request, interrupts: &Interrupts) -> Result<(), Failure> {
    let name = ImageName::read(session, &request.input, &request.image)?;
    let opened = open_image(&name, &request.image, OpenAs::READ)?;
    warn_of_missing_end(session, &opened);
    let source = opened.disk;
    let format =
        TargetFormat::parse(&request.target_format).map_err(|_| Failure::new("Unknown file format"))?;
    let wanted = dd_range(source.size(), &request.options);
    let range = wanted.clone().unwrap_or(0..0);
    let mut options = ImageOptions::parse(format, &OptList::default())?;
    options.set_number("size", range.end - range.start);
    let about = |failure: Failure| failure.about("error while creating output image").about(&request.output);
    let made = match new_target(&request.output) {
        Err(reason) if !request.output.is_empty() => return Err(about(Failure::new(reason))),
        target => target.unwrap_or(NewTarget::File(String::new())),
    };
    newimage::make(session, &made, &options, interrupts).map_err(|not_made| about(not_made.into()))?;
    let args = ImageArgs { format: Some(format.name().to_owned()), ..ImageArgs::default() };
    let driver = match format {
        TargetFormat::Raw => Driver::Raw,
        TargetFormat::Qcow2 => Driver::Qcow2,
        TargetFormat::Luks => Driver::Luks,
    };
    let target = ImageName::on(&request.output, made, driver, None, &args.objects);
    let target = open_image(&target, &args, OpenAs { writable: true, ..OpenAs::READ })?.disk;
    if wanted.is_none() {
        let text = format!("{}: {}: cannot skip to specified offset", session.program(), request.input);
        session.complain(&text);
    }
    let meter = Meter::unasked(session, interrupts);
    dd(&source, range, &*target, &Threads::per_core(), &meter).map_err(|error| failure(&error))?;
    interrupts.stop_watching();
    close(&*target).map_err(|reason| Failure::new(format!("error while closing the target: {reason}")))
}

fn failure(error: &qcow2_ops::Error) -> Failure {
    if error.kind() == ErrorKind::Stopped {
        return Failure::silent(exit::FAILURE);
    }
    match error.core_error() {
        Some(engine) => {
            let step = match error.kind() {
                ErrorKind::Read => "error while reading from input image file".to_owned(),
                ErrorKind::Write => "error while writing to output image file".to_owned(),
                _ => error.to_string(),
            };
            Failure::new(format!("{step}: {}", qemu_text::cause(engine)))
        }
        None => Failure::new(qemu_text::chain(error)),
    }
}
