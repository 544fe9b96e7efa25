//! `resize`: a longer or a shorter disk.

use crate::args::{Arguments, ImageArgs, Opt};
use crate::exit;
use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::open::{close, open_to_change, read_name};
use crate::persona;
use crate::progress::Meter;
use crate::session::Session;
use qcow2_blockdev::read_size;
use qcow2_core::format::AutoclearFeatures;
use qcow2_core::{ErrorKind, GuestDisk, Image, Preallocation, StorageError, StorageErrorKind, find_cause};
use qcow2_ops::resize::{MAX_DISK_SIZE, NewSize, Refusal, ResizeOptions};

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
    resized.map_err(|error| failure(session, &error, request.options.preallocation, &*disk))?;
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

fn failure(
    session: &Session,
    error: &qcow2_ops::Error,
    preallocation: Preallocation,
    disk: &dyn GuestDisk,
) -> Failure {
    let Some(refusal) = find_cause::<Refusal>(error) else {
        if let Some(engine) = error.core_error().filter(|engine| engine.kind() == ErrorKind::Inconsistent) {
            return Failure::new(persona::capitalized(&engine.to_string())).hint(persona::INCONSISTENT_HINT);
        }
        let reason = error.core_error().map_or_else(|| persona::chain(error), |e| persona::cause(e));
        // A raw file gets its length and its space in one.
        let one_step = preallocation == Preallocation::Falloc && disk.as_raw().is_some();
        let fixed = |error: &StorageError| matches!(error.kind(), StorageErrorKind::FixedLength(_));
        if find_cause::<StorageError>(error).is_some_and(fixed) {
            let raw_data =
                |image: &Image| image.header().features.autoclear.contains(AutoclearFeatures::RAW_DATA_FILE);
            if disk.as_image().is_some_and(raw_data) {
                return Failure::new(reason);
            }
            return Failure::new(reason.replacen("Cannot grow", "Cannot resize", 1));
        }
        if error.kind() != qcow2_ops::ErrorKind::Preallocate && !one_step {
            return Failure::new(format!("Could not resize file: {reason}"));
        }
        let own_file = disk.as_image().is_some_and(|image| !image.header().has_data_file());
        return Failure::new(format!("{}: {reason}", persona::no_space(preallocation, own_file)));
    };
    match refusal {
        Refusal::PreallocationOnDevice(mode) if disk.as_image().is_some() => {
            Failure::new(format!("Failed to resize underlying file: {}", persona::on_device(*mode)))
        }
        refusal => refusal_text(session, refusal),
    }
}

/// Why a disk is not resized, in QEMU's words.
pub(super) fn refusal_text(session: &Session, refusal: &Refusal) -> Failure {
    Failure::new(match refusal {
        Refusal::NotPositive => "New image size must be positive".to_owned(),
        Refusal::NothingToPreallocate => "Preallocation can only be used for growing images".to_owned(),
        Refusal::TooLarge(size) => format!("offset({size}) exceeds maximum({MAX_DISK_SIZE})"),
        Refusal::NotSectors(_) => "The new size must be a multiple of 512".to_owned(),
        Refusal::Version2Snapshots => "Can't resize a v2 image which has snapshots".to_owned(),
        Refusal::L1TooLarge => "Failed to grow the L1 table: File too large".to_owned(),
        Refusal::PreallocationOnDevice(mode) => persona::on_device(*mode),
        Refusal::RawMetadata => "Unsupported preallocation mode: metadata".to_owned(),
        Refusal::WouldShrink => {
            let failure = Failure::new("Use the --shrink option to perform a shrink operation.");
            return failure.hint(format!("{}: warning: {LOSS}", session.program()));
        }
        other => other.to_string(),
    })
}

/// What a script may wait for; a person should read it.
const LOSS: &str = "Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an \
                    operation, make sure there is no important data there.";
