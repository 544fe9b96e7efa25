//! `dd`: a part of an image as a new image.

use crate::args::{Arguments, ImageArgs, Opt};
use crate::command::convert::finish;
use crate::exit;
use crate::failure::Failure;
use crate::newimage::{format_of, make_disk};
use crate::numbers::{SIGNED, parse_argument, parse_count};
use crate::open::{read_name, warn_of_missing_end};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::open;
use qcow2_image::Threads;
use qcow2_ops::ErrorKind;
use qcow2_ops::dd::{DdOptions, dd, dd_range};
use qcow2_terminal::Interrupts;
use qcow2_terminal::Meter;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let interrupts = Interrupts::install();
    let copied = copy(session, &request, &interrupts);
    interrupts.end_files(copied.is_ok());
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
                let target_format = format_of(session, target_format, &output)?;
                Ok(Self { image, target_format, options, input, output })
            }
            _ => Err(Failure::new("Must specify both input and output files")),
        }
    }
}

fn copy(session: &Session, request: &Request, interrupts: &Interrupts) -> Result<(), Failure> {
    let name = read_name(session, &request.input, &request.image)?;
    let opened = open(&name, &request.image.options())?;
    warn_of_missing_end(session, &opened);
    let source = opened.disk;
    let wanted = dd_range(source.size(), &request.options);
    let range = wanted.clone().unwrap_or(0..0);
    let (format, size) = (&request.target_format, range.end - range.start);
    let target = make_disk(session, &request.output, format, size, interrupts)?;
    if wanted.is_none() {
        let text = format!("{}: {}: cannot skip to specified offset", session.program(), request.input);
        session.complain(&text);
    }
    let meter = Meter::unasked(session, interrupts);
    dd(&source, range, &*target, &Threads::per_core(), &meter).map_err(|error| failure(&error))?;
    interrupts.stop_watching();
    finish(&*target)
}

fn failure(error: &qcow2_ops::Error) -> Failure {
    if error.kind() == ErrorKind::Stopped {
        return Failure::silent(exit::FAILURE);
    }
    match error.core_error() {
        Some(engine) => {
            let step = match error.kind() {
                ErrorKind::Read | ErrorKind::Extents => {
                    "error while reading from input image file".to_owned()
                }
                ErrorKind::Write => "error while writing to output image file".to_owned(),
                _ => error.to_string(),
            };
            Failure::new(format!("{step}: {}", persona::cause(engine)))
        }
        None => Failure::new(persona::chain(error)),
    }
}
