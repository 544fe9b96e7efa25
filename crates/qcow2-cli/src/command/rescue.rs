//! `rescue`: what is left of a damaged image, as a new image.

use super::convert::finish;
use crate::args::{Arguments, ImageArgs, Opt, OutputFormat};
use crate::exit;
use crate::failure::Failure;
use crate::newimage::{format_of, make_disk};
use crate::numbers::{SIGNED, parse_argument};
use crate::open::read_name;
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{Compression, open, open_bytes};
use qcow2_core::HostOffset;
use qcow2_image::Threads;
use qcow2_ops::{ConvertOptions, RescueFiles, RescueOptions, RescueReport, convert, rescue};
use qcow2_report::{json, rescue as render};
use qcow2_terminal::Interrupts;
use qcow2_terminal::Meter;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let interrupts = Interrupts::install();
    let meter = match request.output {
        OutputFormat::Json => Meter::beside_data(session, &interrupts, request.progress, false),
        OutputFormat::Human => Meter::new(session, &interrupts, request.progress, false),
    };
    let rescued = copy(session, &request, &interrupts, &meter);
    interrupts.end_files(rescued.is_ok());
    if rescued.is_ok() {
        meter.complete_again();
    }
    meter.end();
    interrupts.die_if_asked();
    let report = rescued?;
    let code = if report.is_complete() { exit::SUCCESS } else { exit::RESCUE_LOST };
    let text = match request.output {
        OutputFormat::Human => report.to_string(),
        OutputFormat::Json => json::pretty(&render::to_json(&report, &request.input)),
    };
    session.print(&text).map_err(|failure| failure.with_code(code.max(exit::FAILURE)))?;
    Ok(code)
}

fn copy(
    session: &Session,
    request: &Request,
    interrupts: &Interrupts,
    meter: &Meter,
) -> Result<RescueReport, Failure> {
    let options = request.image.options();
    let bytes = |name: &String, args: &ImageArgs| -> Result<_, Failure> {
        let name = read_name(session, name, args)?;
        let storage = open_bytes(&name, &options)?.source.storage;
        Ok((name, storage))
    };
    let (name, storage) = bytes(&request.input, &request.image)?;
    let mut files = RescueFiles::new(storage, Compression::default().codecs()?);
    files.keys = Some((&name.keys, &name.typed));
    if let Some(data) = &request.data {
        files.data = Some(bytes(data, &request.beside(Some("raw".to_owned())))?.1);
    }
    if let Some(backing) = &request.backing {
        let name = read_name(session, backing, &request.beside(request.backing_format.clone()))?;
        files.backing = Some(open(&name, &options)?.disk);
    }
    let failed = |error: qcow2_ops::Error| persona::procedure(&error);
    let rescued = rescue(&files, &request.options, meter).map_err(failed)?;
    let source = rescued.disk();
    let (format, size) = (&request.target_format, source.size());
    let target = make_disk(session, &request.target, format, size, interrupts)?;
    let mut options = ConvertOptions::default();
    options.target_is_new = request.target_format != "luks";
    convert(&[source], &*target, &options, &Threads::per_core(), meter).map_err(failed)?;
    interrupts.stop_watching();
    finish(&*target)?;
    Ok(rescued.report())
}

#[derive(Default)]
struct Request {
    image: ImageArgs,
    options: RescueOptions,
    data: Option<String>,
    backing: Option<String>,
    backing_format: Option<String>,
    output: OutputFormat,
    progress: bool,
    input: String,
    target: String,
    target_format: String,
}

impl Request {
    fn parse(session: &Session, mut args: Arguments) -> Result<Self, Failure> {
        let (mut request, mut format) = (Self::default(), None);
        let verb = args.verb();
        while let Some(given) = args.next(session)? {
            let size = |what| parse_argument(what, &given.value, SIGNED);
            match given.opt {
                Opt::ClusterSize => request.options.cluster_size = Some(size("cluster size")?),
                Opt::Size => request.options.size = Some(size("image size")?),
                Opt::L1Table => request.options.l1_table = Some(HostOffset::new(size("offset")?)),
                Opt::DataFile => request.data = Some(given.value),
                Opt::Backing => request.backing = Some(given.value),
                Opt::BackingFormat => request.backing_format = Some(given.value),
                Opt::TargetFormat => format = Some(given.value),
                Opt::Output => request.output = OutputFormat::parse(verb, &given.value)?,
                Opt::Progress => request.progress = true,
                opt => request.image.take(opt, given.value)?,
            }
        }
        request.image.check()?;
        let operands = <[String; 2]>::try_from(args.into_operands());
        let Ok([input, target]) = operands else {
            return Err(Failure::usage(verb.name, "Expecting the damaged image and the name of the new one"));
        };
        request.target_format = format_of(session, format, &target)?;
        (request.input, request.target) = (input, target);
        Ok(request)
    }

    /// How a file is named that is given beside the image.
    fn beside(&self, format: Option<String>) -> ImageArgs {
        ImageArgs { format, image_opts: false, ..self.image.clone() }
    }
}
