//! `commit`: what an image holds goes into its backing file, or into one further down.

use crate::args::{Arguments, ImageArgs, Opt, parse_cache};
use crate::exit;
use crate::failure::Failure;
use crate::findings::tell_of_change;
use crate::interrupt::Interrupts;
use crate::numbers::{SIGNED, parse_argument};
use crate::open::{close, read_name};
use crate::persona;
use crate::progress::Meter;
use crate::session::Session;
use qcow2_blockdev::{OpenedChain, open_down_to};
use qcow2_image::Threads;
use qcow2_ops::{CommitOptions, ErrorKind};

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let interrupts = Interrupts::install();
    let cache = request.cache.as_ref().map(|text| parse_cache("cache", text)).transpose()?;
    let mut how = request.image.options().with_cache(cache.unwrap_or_default());
    how.bytes_per_second = request.bytes_per_second;
    request.image.check()?;
    let name = read_name(session, &request.filename, &request.image)?;
    let chain = open_down_to(&name, &how, request.base.as_deref(), &|warning, source| {
        tell_of_change(session, warning, source);
    });
    let chain = chain.map_err(Failure::from);
    if chain.as_ref().is_err_and(Failure::is_of_opening) {
        return chain.map(|_| exit::SUCCESS);
    }
    let meter = Meter::new(session, &interrupts, request.progress && !request.quiet, PROGRESS_STEP);
    let committed = chain.and_then(|chain| commit(&request, &chain, &meter));
    if committed.is_ok() {
        meter.complete_again();
    }
    meter.end();
    interrupts.die_if_asked();
    committed?;
    if !request.quiet {
        session.print("Image committed.\n")?;
    }
    Ok(exit::SUCCESS)
}

#[derive(Debug, Default)]
struct Request {
    image: ImageArgs,
    cache: Option<String>,
    base: Option<String>,
    drop: bool,
    bytes_per_second: Option<u64>,
    progress: bool,
    quiet: bool,
    filename: String,
}

impl Request {
    fn parse(session: &Session, mut args: Arguments) -> Result<Self, Failure> {
        let mut request = Self::default();
        while let Some(given) = args.next(session)? {
            match given.opt {
                Opt::Format => request.image.format = Some(given.value),
                Opt::ImageOpts => request.image.image_opts = true,
                Opt::Cache => request.cache = Some(given.value),
                Opt::Backing => (request.base, request.drop) = (Some(given.value), true),
                Opt::Drop => request.drop = true,
                Opt::Rate => {
                    let rate = parse_argument("rate limit", &given.value, SIGNED)?;
                    request.bytes_per_second = Some(rate).filter(|&rate| rate > 0);
                }
                Opt::Progress => request.progress = true,
                Opt::Quiet => request.quiet = true,
                Opt::Object => request.image.objects.add(&given.value)?,
                _ => {}
            }
        }
        request.filename = args.into_one_operand("Expecting one image file name")?;
        Ok(request)
    }
}

fn commit(request: &Request, chain: &OpenedChain, meter: &Meter) -> Result<(), Failure> {
    let mut options = CommitOptions::default();
    options.empty_top = !request.drop;
    let workers = Threads::per_core();
    let committed = qcow2_ops::commit(&chain.above, &chain.base, &options, &workers, meter);
    // Both are left clean whatever happened.
    let closed = [&chain.base, &chain.above[0]].map(|disk| close(&**disk));
    committed.map_err(|error| failure(&error))?;
    let closed: Result<Vec<()>, String> = closed.into_iter().collect();
    closed.map(|_| ()).map_err(|reason| Failure::new(format!("Could not commit the image: {reason}")))
}

fn failure(error: &qcow2_ops::Error) -> Failure {
    if error.kind() == ErrorKind::Stopped {
        return Failure::silent(exit::FAILURE);
    }
    match error.core_error() {
        Some(engine) if matches!(error.kind(), ErrorKind::Extents | ErrorKind::Read | ErrorKind::Write) => {
            Failure::new(format!("Block job failed: {}", persona::cause(engine)))
        }
        Some(engine) => Failure::new(format!("{error}: {}", persona::cause(engine))),
        None => Failure::new(persona::chain(error)),
    }
}

/// Hundredths of a percent between two outputs.
const PROGRESS_STEP: u64 = 100;
