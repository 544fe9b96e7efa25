//! `bench`: requests at equal steps, and how long they took.

use crate::args::{Arguments, ImageArgs, Opt};
use crate::exit;
use crate::failure::Failure;
use crate::numbers::{SIGNED, parse_argument, parse_count};
use crate::open::{open_to_change, read_name};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{open, open_bytes};
use qcow2_exerciser::{Bench, BenchFailure, BenchRefusal};
use qcow2_image::Threads;
use qcow2_io::CacheMode;
use qcow2_ops::Executor;
use qcow2_terminal::Interrupts;
use qcow2_terminal::Meter;
use std::ops::RangeInclusive;

/// Counts, depths and buffer sizes.
const POSITIVE: RangeInclusive<u64> = 1..=i32::MAX as u64;

struct Request {
    image: ImageArgs,
    cache: CacheMode,
    bench: Bench,
    step: Option<u64>,
    write: bool,
    pattern: u8,
    native: bool,
    threads: Option<usize>,
    filename: String,
}

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = parse(session, args)?;
    request.image.check()?;
    let bench = &request.bench;
    bench.check().map_err(|refusal| {
        Failure::new(match refusal {
            BenchRefusal::FlushesWithoutWrites => "--flush-interval is only available in write tests",
            BenchRefusal::FlushesWithinDepth => "Flush interval can't be smaller than depth",
        })
    })?;
    let name = read_name(session, &request.filename, &request.image)?;
    let refused = |reason| Err(Failure::could_not_open(&name.typed, reason));
    if request.write && request.image.force_share {
        return refused(persona::SHARED_AND_WRITABLE);
    }
    if request.native && !request.cache.is_direct() {
        // A file that does not open at all is told first.
        open_bytes(&name, &request.image.options())?;
        return refused(persona::NATIVE_NEEDS_DIRECT);
    }
    let how = request.image.options().with_cache(request.cache);
    let opened = match request.write {
        true => open_to_change(session, &name, &how)?,
        false => open(&name, &how)?,
    };
    let options = &bench.requests;
    session.print(&format!(
        "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})\n",
        options.count,
        if request.write { "write" } else { "read" },
        options.buffer_size,
        bench.depth,
        options.start,
        options.step,
    ))?;
    if let Some(interval) = options.flush_interval {
        session.print(&format!("Sending flush every {interval} requests\n"))?;
    }
    let workers = bench.workers(request.threads.unwrap_or_else(|| Threads::per_core().workers()));
    let interrupts = Interrupts::install();
    let meter = Meter::unasked(session, &interrupts);
    let report = bench.run(&*opened.disk, &Threads::new(workers), &meter);
    interrupts.die_if_asked();
    report.sent.map_err(|failure| {
        let reason = match failure {
            BenchFailure::PastEnd => "Input/output error".to_owned(),
            BenchFailure::Request(error) => persona::cause(&error),
        };
        Failure::new(format!("Failed request: {reason}"))
    })?;
    session.print(&format!("Run completed in {:.3} seconds.\n", report.elapsed.as_secs_f64()))?;
    report.closed.map_err(|error| {
        Failure::new(format!("error while closing the image: {}", persona::cause(&error)))
    })?;
    Ok(exit::SUCCESS)
}

fn parse(session: &Session, mut args: Arguments) -> Result<Request, Failure> {
    let mut request = Request {
        image: ImageArgs::default(),
        cache: CacheMode::Writeback,
        bench: Bench::new(),
        step: None,
        write: false,
        pattern: 0,
        native: false,
        threads: None,
        filename: String::new(),
    };
    let options = &mut request.bench.requests;
    while let Some(given) = args.next(session)? {
        let number = |what: &str, range| parse_argument(what, &given.value, range);
        let count = |what: &str, range| parse_count(what, &given.value, range);
        match given.opt {
            Opt::Cache => {
                request.cache =
                    CacheMode::parse(&given.value).ok_or_else(|| Failure::new("Invalid cache mode"))?;
            }
            Opt::Native => request.native = true,
            Opt::Aio => match &*given.value {
                "native" => request.native = true,
                "threads" | "io_uring" => {}
                other => return Err(Failure::new(format!("Invalid aio option: {other}"))),
            },
            Opt::RequestCount => options.count = count("request count", POSITIVE)?,
            Opt::Depth => request.bench.depth = count("queue depth", POSITIVE)? as usize,
            Opt::BufferSize => options.buffer_size = number("buffer size", POSITIVE)?,
            Opt::StepSize => request.step = Some(number("step size", 0..=i32::MAX as u64)?),
            Opt::StartOffset => options.start = number("offset", SIGNED)?,
            Opt::Pattern => request.pattern = count("pattern byte", 0..=255)? as u8,
            Opt::FlushInterval => {
                let interval = count("flush interval", 0..=i32::MAX as u64)?;
                options.flush_interval = (interval > 0).then_some(interval);
            }
            Opt::NoDrain => options.drain = false,
            Opt::Write => request.write = true,
            Opt::Threads => request.threads = Some(number("thread count", 1..=1024)? as usize),
            opt => request.image.take(opt, given.value)?,
        }
    }
    options.step = request.step.filter(|&step| step > 0).unwrap_or(options.buffer_size);
    options.pattern = request.write.then_some(request.pattern);
    request.filename = args.into_one_operand("Expecting one image file name")?;
    Ok(request)
}
