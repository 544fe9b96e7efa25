//! `commit`: what an image holds goes into its backing file, or into one further down.

use crate::args::{Arguments, ImageArgs, Opt, parse_cache};
use crate::exit;
use crate::failure::Failure;
use crate::findings::tell_of_change;
use crate::numbers::{SIGNED, parse_argument};
use crate::open::read_name;
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{ChainFiles, OpenFailure, Warning};
use qcow2_core::{ResolvedSource, find_cause};
use qcow2_image::Threads;
use qcow2_ops::{ChainError, CommitOptions, ErrorKind};
use qcow2_terminal::Interrupts;
use qcow2_terminal::Meter;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let interrupts = Interrupts::install();
    let cache = parse_cache("cache", request.cache.as_deref())?;
    let mut how = request.image.options().with_cache(cache);
    how.bytes_per_second = request.bytes_per_second;
    request.image.check()?;
    let name = read_name(session, &request.filename, &request.image)?;
    let tell = |warning: &Warning, source: &ResolvedSource| tell_of_change(session, warning, source);
    let chain = ChainFiles::new(&name, &how, &tell);
    let options = CommitOptions::default().with_base(request.base.clone()).with_empty_top(!request.drop);
    let meter = Meter::waiting(session, &interrupts, request.progress && !request.quiet);
    let committed = qcow2_ops::commit(&chain, &options, &Threads::per_core(), &meter);
    let committed = committed.map_err(|error| failure(error, &name.typed));
    if committed.as_ref().is_err_and(Failure::is_of_opening) {
        return committed.map(|_| exit::SUCCESS);
    }
    meter.begin();
    meter.finish(committed)?;
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
                Opt::Cache => request.cache = Some(given.value),
                Opt::Backing => (request.base, request.drop) = (Some(given.value), true),
                Opt::Drop => request.drop = true,
                Opt::Rate => {
                    let rate = parse_argument("rate limit", &given.value, SIGNED)?;
                    request.bytes_per_second = Some(rate).filter(|&rate| rate > 0);
                }
                Opt::Progress => request.progress = true,
                Opt::Quiet => request.quiet = true,
                opt => request.image.take(opt, given.value)?,
            }
        }
        request.filename = args.into_one_operand("Expecting one image file name")?;
        Ok(request)
    }
}

fn failure(error: qcow2_ops::Error, name: &str) -> Failure {
    let error = match error.caller_error::<OpenFailure>() {
        Ok(failure) => return failure.into(),
        Err(error) => error,
    };
    if let Some(chain) = find_cause::<ChainError>(&error) {
        return persona::chain_failure(name, chain);
    }
    match (error.kind(), error.core_error()) {
        (ErrorKind::Extents | ErrorKind::Read | ErrorKind::Write, Some(engine)) => {
            Failure::new(format!("Block job failed: {}", persona::cause(engine)))
        }
        (ErrorKind::Close, Some(engine)) => {
            Failure::new(format!("Could not commit the image: {}", persona::cause(engine)))
        }
        _ => persona::procedure(&error),
    }
}
