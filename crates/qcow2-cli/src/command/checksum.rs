//! `checksum`: a digest of what a machine sees, the same for every image that holds the same disk.

use crate::args::{Arguments, ImageArgs, Opt, OutputFormat, parse_cache};
use crate::exit;
use crate::failure::Failure;
use crate::imagename::ImageName;
use crate::interrupt::Interrupts;
use crate::open::{OpenAs, open_image, warn_of_missing_end};
use crate::progress::Meter;
use crate::render::{human, json, qemu_text};
use crate::session::Session;
use crate::threads::Threads;
use qcow2_ops::ErrorKind;
use serde_json::{Map, Value};

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = parse(session, args)?;
    request.image.check()?;
    let name = ImageName::read(session, &request.filename, &request.image)?;
    let cache = request.cache.as_ref().map(|text| parse_cache("source cache", text)).transpose()?;
    let how = OpenAs { cache: cache.unwrap_or_default(), ..OpenAs::READ };
    let opened = open_image(&name, &request.image, how)?;
    warn_of_missing_end(session, &opened);
    let disk = opened.disk;
    let interrupts = Interrupts::install();
    let meter = Meter::beside_data(session, &interrupts, request.progress, request.json_progress);
    let digest = match request.blake3 {
        true => qcow2_ops::checksum_blake3(&disk, &Threads::per_core(), &meter).map(|sum| sum.to_string()),
        false => {
            qcow2_ops::checksum(&disk, &Threads::per_core(), &meter).map(|sum| format!("{:08x}", sum.crc32))
        }
    };
    if digest.is_ok() {
        meter.complete();
    }
    meter.end();
    interrupts.die_if_asked();
    let digest = digest.map_err(|error| failure(&error))?;
    let method = if request.blake3 { "blake3" } else { "crc32" };
    session.print(&match request.output {
        OutputFormat::Human => format!("{digest}  {}\n", human::escaped(&request.filename)),
        OutputFormat::Json => {
            let mut fields = Map::new();
            fields.insert("filename".to_owned(), request.filename.into());
            fields.insert("virtual-size".to_owned(), disk.size().into());
            fields.insert(method.to_owned(), digest.into());
            json::pretty(&Value::Object(fields))
        }
    })?;
    Ok(exit::SUCCESS)
}

#[derive(Default)]
struct Request {
    image: ImageArgs,
    cache: Option<String>,
    output: OutputFormat,
    blake3: bool,
    progress: bool,
    json_progress: bool,
    filename: String,
}

fn parse(session: &Session, mut args: Arguments) -> Result<Request, Failure> {
    let mut request = Request::default();
    let verb = args.verb();
    while let Some(given) = args.next(session)? {
        match given.opt {
            Opt::Format => request.image.format = Some(given.value),
            Opt::ImageOpts => request.image.image_opts = true,
            Opt::ForceShare => request.image.force_share = true,
            Opt::Cache => request.cache = Some(given.value),
            Opt::Output => request.output = OutputFormat::parse(verb, &given.value)?,
            Opt::Blake3 => request.blake3 = true,
            Opt::Progress => request.progress = true,
            Opt::JsonProgress => request.json_progress = true,
            Opt::Object => request.image.objects.add(&given.value)?,
            _ => {}
        }
    }
    request.filename = args.into_one_operand("Expecting one image file name")?;
    Ok(request)
}

fn failure(error: &qcow2_ops::Error) -> Failure {
    match (error.kind(), error.core_error()) {
        (ErrorKind::Stopped, _) => Failure::silent(exit::FAILURE),
        (_, Some(engine)) => Failure::new(format!("{error}: {}", qemu_text::cause(engine))),
        _ => Failure::new(qemu_text::chain(error)),
    }
}
