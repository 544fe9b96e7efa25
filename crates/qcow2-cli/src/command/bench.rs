//! `bench`: requests at equal steps, and how long they took.

use crate::args::{Arguments, ImageArgs, Opt};
use crate::exit;
use crate::failure::Failure;
use crate::imagename::ImageName;
use crate::interrupt::Interrupts;
use crate::numbers::{SIGNED, parse_argument, parse_count};
use crate::open::{NATIVE_NEEDS_DIRECT, OpenAs, open_image, open_to_change};
use crate::progress::Meter;
use crate::render::qemu_text;
use crate::session::Session;
use crate::threads::Threads;
use qcow2_io::CacheMode;
use qcow2_ops::{BenchOptions, Executor};
use std::ops::RangeInclusive;
use std::time::Instant;

/// Counts, depths and buffer sizes.
const POSITIVE: RangeInclusive<u64> = 1..=i32::MAX as u64;

struct Request {
    image: ImageArgs,
    cache: CacheMode,
    options: BenchOptions,
    step: Option<u64>,
    depth: u64,
    write: bool,
    pattern: u8,
    native: bool,
    threads: Option<usize>,
    filename: String,
}

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let mut request = parse(session, args)?;
    request.image.check()?;
    check_flushes(&request)?;
    let name = ImageName::read(session, &request.filename, &request.image)?;
    let refused = |reason| Err(Failure::could_not_open(&name.typed, reason));
    if request.write && request.image.force_share {
        return refused("force-share=on can only be used with read-only images");
    }
    if request.native && !request.cache.is_direct() {
        // What does not open at all is told first.
        open_image(&name, &request.image, OpenAs::READ)?;
        return refused(NATIVE_NEEDS_DIRECT);
    }
    let how = OpenAs { cache: request.cache, ..OpenAs::READ };
    let opened = match request.write {
        true => open_to_change(session, &name, &request.image, how)?,
        false => open_image(&name, &request.image, how)?,
    };
    request.options.step = request.step.filter(|&step| step > 0).unwrap_or(request.options.buffer_size);
    request.options.pattern = request.write.then_some(request.pattern);
    let options = &request.options;
    session.print(&format!(
        "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})\n",
        options.count,
        if request.write { "write" } else { "read" },
        options.buffer_size,
        request.depth,
        options.start,
        options.step,
    ))?;
    if let Some(interval) = options.flush_interval {
        session.print(&format!("Sending flush every {interval} requests\n"))?;
    }
    let depth = usize::try_from(request.depth).unwrap_or(usize::MAX);
    let workers = Threads::new(request.threads.unwrap_or_else(|| Threads::per_core().workers()).min(depth));
    let interrupts = Interrupts::install();
    let meter = Meter::unasked(session, &interrupts);
    let began = Instant::now();
    let result = qcow2_ops::bench(&*opened.disk, options, &workers, &meter);
    let seconds = began.elapsed().as_secs_f64();
    let closed = opened.disk.as_image().map_or(Ok(()), |image| image.close());
    interrupts.die_if_asked();
    result.map_err(|error| {
        // A request past the end fails as one that the device refuses.
        let past_end = error.core_error().is_some_and(|e| e.kind() == qcow2_core::ErrorKind::OutOfRange);
        let reason = if past_end { "Input/output error".to_owned() } else { qemu_text::cause(&error) };
        Failure::new(format!("Failed request: {reason}"))
    })?;
    session.print(&format!("Run completed in {seconds:.3} seconds.\n"))?;
    closed.map_err(|error| {
        Failure::new(format!("error while closing the image: {}", qemu_text::cause(&error)))
    })?;
    Ok(exit::SUCCESS)
}

fn parse(session: &Session, mut args: Arguments) -> Result<Request, Failure> {
    let mut request = Request {
        image: ImageArgs::default(),
        cache: CacheMode::Writeback,
        options: BenchOptions::new(),
        step: None,
        depth: 64,
        write: false,
        pattern: 0,
        native: false,
        threads: None,
        filename: String::new(),
    };
    while let Some(given) = args.next(session)? {
        let number = |what: &str, range| parse_argument(what, &given.value, range);
        let count = |what: &str, range| parse_count(what, &given.value, range);
        match given.opt {
            Opt::Format => request.image.format = Some(given.value),
            Opt::ImageOpts => request.image.image_opts = true,
            Opt::ForceShare => request.image.force_share = true,
            Opt::Object => request.image.objects.add(&given.value)?,
            Opt::Cache => {
                request.cache =
                    CacheMode::parse(&given.value).ok_or_else(|| Failure::new("Invalid cache mode"))?;
            }
            Opt::Native => request.native = true,
            Opt::Aio => match &*given.value {
                "native" => request.native = true,
                "threads" | "io_uring" => request.native = false,
                other => return Err(Failure::new(format!("Invalid aio option: {other}"))),
            },
            Opt::RequestCount => request.options.count = count("request count", POSITIVE)?,
            Opt::Depth => request.depth = count("queue depth", POSITIVE)?,
            Opt::BufferSize => request.options.buffer_size = number("buffer size", POSITIVE)?,
            Opt::StepSize => request.step = Some(number("step size", 0..=i32::MAX as u64)?),
            Opt::StartOffset => request.options.start = number("offset", SIGNED)?,
            Opt::Pattern => request.pattern = count("pattern byte", 0..=255)? as u8,
            Opt::FlushInterval => {
                let interval = count("flush interval", 0..=i32::MAX as u64)?;
                request.options.flush_interval = (interval > 0).then_some(interval);
            }
            Opt::NoDrain => request.options.drain = false,
            Opt::Write => request.write = true,
            Opt::Threads => request.threads = Some(number("thread count", 1..=1024)? as usize),
            _ => {}
        }
    }
    request.filename = args.into_one_operand("Expecting one image file name")?;
    Ok(request)
}

fn check_flushes(request: &Request) -> Result<(), Failure> {
    match request.options.flush_interval {
        Some(_) if !request.write => Err(Failure::new("--flush-interval is only available in write tests")),
        Some(interval) if interval < request.depth => {
            Err(Failure::new("Flush interval can't be smaller than depth"))
        }
        _ => Ok(()),
    }
}
