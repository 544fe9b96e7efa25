//! `amend`: another version, other features, another size, other passwords.

use crate::args::{Arguments, ImageArgs, Opt, parse_cache};
use crate::exit;
use crate::failure::Failure;
use crate::newimage::print_amend_options;
use crate::open::{close, open_to_change, read_name};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{
    CreateFailure, CreateFailureKind, ImageChanges, ImageName, KeyValues, OpenOptions, OptionError, Sharing,
    SlotChange, SlotError, amended_format,
};
use qcow2_core::format::Version;
use qcow2_core::{ErrorKind, HostOffset, ImageFormat, find_cause};
use qcow2_ops::amend::{AmendOptions, Refusal, amend};
use qcow2_ops::{KeySlots, resize};
use qcow2_terminal::Interrupts;
use qcow2_terminal::Meter;
use std::sync::Arc;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let mut request = Request::parse(session, args)?;
    let interrupts = Interrupts::install();
    let meter = Meter::waiting(session, &interrupts, request.progress && !request.quiet);
    let amended = amend_file(session, &mut request, &meter);
    meter.finish_begun(session, amended).map(|()| exit::SUCCESS)
}

#[derive(Debug, Default)]
struct Request {
    image: ImageArgs,
    cache: Option<String>,
    list: KeyValues,
    progress: bool,
    quiet: bool,
    force: bool,
    operands: Vec<String>,
}

impl Request {
    fn parse(session: &Session, mut args: Arguments) -> Result<Self, Failure> {
        let (mut request, mut texts) = (Self::default(), Vec::new());
        let verb = args.verb();
        while let Some(given) = args.next(session)? {
            match given.opt {
                Opt::Cache => request.cache = Some(given.value),
                Opt::Options => texts.push(KeyValues::checked(given.value)?),
                Opt::Progress => request.progress = true,
                Opt::Quiet => request.quiet = true,
                Opt::Force => request.force = true,
                opt => request.image.take(opt, given.value)?,
            }
        }
        if texts.is_empty() {
            return Err(Failure::usage(verb.name, "Must specify options (-o)"));
        }
        request.list = KeyValues::parse_image_options(&texts);
        request.operands = args.into_operands();
        Ok(request)
    }
}

/// All that comes after the options themselves: their faults end the line of the progress.
fn amend_file(session: &Session, request: &mut Request, meter: &Meter) -> Result<(), Failure> {
    if let Some(format) = request.image.format.as_deref().filter(|_| request.list.asks_help()) {
        return print_amend_options(session, &amended_format(format)?);
    }
    let operands = <[String; 1]>::try_from(std::mem::take(&mut request.operands));
    let [filename] = operands.map_err(|_| Failure::new("Expecting one image file name"))?;
    let cache = parse_cache("cache", request.cache.as_deref())?;
    request.image.check()?;
    let name = read_name(session, &filename, &request.image)?;
    // Two that change the slots of one container would lose a password.
    let how = request.image.options().with_cache(cache).with_sharing(Sharing::TopAlone);
    amend_image(session, request, (&name, &how), meter)
}

fn amend_image(
    session: &Session,
    request: &Request,
    (name, how): (&ImageName, &OpenOptions),
    meter: &Meter,
) -> Result<(), Failure> {
    let open = || open_to_change(session, name, how);
    let opened = open()?;
    amended_format(opened.format.name())?;
    if request.list.asks_help() {
        return print_amend_options(session, &opened.format);
    }
    let ImageChanges { options, slots, .. } = changes(&opened.format, &request.list, meter)?;
    // The name under which the password was asked for.
    let asked = opened.files.first().map_or(&*name.typed, |file| &*file.image).to_owned();
    let slots = SlotChange {
        options: &slots,
        name: &asked,
        keys: &name.keys,
        secrets: request.image.objects.secrets(),
        force: request.force,
    };
    if opened.format == ImageFormat::Luks {
        // A container has nothing but its slots.
        slots.apply(&*opened.storage, HostOffset::default())?;
        return close(&*opened.disk).map_err(|reason| could_not(&reason));
    }
    let key_slots = slots.options.is_some().then_some(&slots as &dyn KeySlots);
    let reopen = || Ok(open()?.disk);
    // Nothing but the disk may hold the file: its lock has to go before the image is opened anew.
    let disk = Arc::clone(&opened.disk);
    drop(opened);
    amend(disk, &reopen, &options, key_slots, meter).map_err(|error| failure(session, error, &options))
}

fn could_not(reason: &str) -> Failure {
    Failure::new(format!("Could not amend the image: {reason}"))
}

/// What is to change, from where on there is progress. The level of compatibility has words of its own.
fn changes(format: &ImageFormat, list: &KeyValues, meter: &Meter) -> Result<ImageChanges, Failure> {
    let parsed = ImageChanges::parse(format, list);
    let level = |failure: &CreateFailure| match failure.kind() {
        CreateFailureKind::Option(OptionError { option, value, .. }) if option == "compat" => {
            Some(Failure::new(format!("Unknown compatibility level {value}")))
        }
        _ => None,
    };
    let level = parsed.as_ref().err().and_then(level);
    if parsed.is_ok() || level.is_some() {
        meter.begin();
    }
    parsed.map_err(|failure| level.unwrap_or_else(|| failure.into()))
}

fn failure(session: &Session, error: qcow2_ops::Error, options: &AmendOptions) -> Failure {
    let error = match error.caller_error::<SlotError>().map_err(qcow2_ops::Error::caller_error::<Failure>) {
        Ok(unchanged) => return unchanged.into(),
        Err(Ok(failure)) => return failure,
        Err(Err(error)) => error,
    };
    if error.kind() == qcow2_ops::ErrorKind::Stopped {
        return Failure::silent(exit::FAILURE);
    }
    if let Some(refusal) = find_cause::<resize::Refusal>(&error) {
        return persona::resize_refusal(session.program(), refusal);
    }
    if let Some(failure) = persona::inconsistent_bitmap(&error) {
        return failure;
    }
    let Some(refusal) = find_cause::<Refusal>(&error) else {
        if let (Some(engine), Some(bits)) = (error.core_error(), options.refcount_bits)
            && engine.kind() == ErrorKind::OutOfRange
        {
            let reason = persona::capitalized(&engine.to_string());
            return Failure::new(format!("Cannot decrease refcount entry width to {bits} bits: {reason}"));
        }
        let mut reason = error.core_error().map_or_else(|| persona::chain(&error), |e| persona::cause(e));
        let mut before = Vec::new();
        if let Some((what, system)) = error.core_error().and_then(persona::snapshot_l1) {
            (before, reason) = (vec![what], system.to_owned());
        }
        return match options.version {
            Some(Version::V2) => {
                Failure::new(format!("Failed to turn zero into data clusters: {reason}")).after(before)
            }
            _ => could_not(&reason),
        };
    };
    let needs = "compatibility level 1.1 and above (use compat=1.1 or greater)";
    Failure::new(match refusal {
        Refusal::RefcountBits(_) => "Refcount width must be a power of two and may not exceed 64 bits".to_owned(),
        Refusal::RefcountBitsNeedVersion3 => {
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
                .to_owned()
        }
        Refusal::NoDataFile => "data-file can only be set for images that use an external data file".to_owned(),
        Refusal::DataFileRaw => "data-file-raw cannot be set on existing images".to_owned(),
        Refusal::BackingFile => {
            let hint = "You can use 'qemu-img rebase' instead.";
            return Failure::new("Cannot amend the backing file").hint(hint);
        }
        Refusal::LazyRefcountsNeedVersion3 => format!("Lazy refcounts only supported with {needs}"),
        Refusal::DowngradeDataFile => "Cannot downgrade an image with a data file".to_owned(),
        Refusal::DowngradeFeatures(bits) => {
            format!("Cannot downgrade an image with incompatible features 0x{bits:x} set")
        }
        Refusal::DowngradeRefcountBits => "compat=0.10 requires refcount_bits=16".to_owned(),
        Refusal::DowngradeSnapshots => "Internal snapshots prevent downgrade of image".to_owned(),
        Refusal::NotEncrypted => "Can't amend encryption options - encryption not present".to_owned(),
        Refusal::NoKeySlots => "Only LUKS encryption options can be amended".to_owned(),
        other => other.to_string(),
    })
}
