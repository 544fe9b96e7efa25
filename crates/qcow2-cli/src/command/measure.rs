//! `measure`: how large the file of a new image would be.

use crate::args::{Arguments, ImageArgs, Opt, OutputFormat};
use crate::command::convert::parse_snapshot;
use crate::exit;
use crate::failure::Failure;
use crate::numbers::{SIGNED, parse_argument};
use crate::open::read_name;
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{KeyValues, NewOptions, OpenedDisk, measured_format, open, open_snapshot};
use qcow2_core::ImageFormat;
use qcow2_ops::ErrorKind;
use qcow2_ops::measure::{Measured, measure};
use qcow2_ops::snapshot::SnapshotName;
use qcow2_report::json;
use qcow2_report::measure::{to_json, to_text};

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let source = request.open(session)?;
    let format = measured_format(&request.target_format)?;
    let options = request.options(&format)?;
    let what = match (&source, request.size) {
        (Some(OpenedDisk { disk, is_null: true, .. }), _) if !options.given("backing_file") => {
            Measured::Size(disk.size())
        }
        (Some(source), _) => Measured::Disk(&source.disk),
        (None, size) => Measured::Size(size.unwrap_or(0)),
    };
    let target = options.measure_target(request.image.objects.secrets()).map_err(persona::measured)?;
    let measured = measure(what, &target).map_err(|error| failure(&error))?;
    session.print(&match request.output {
        OutputFormat::Human => to_text(&measured),
        OutputFormat::Json => json::pretty(&to_json(&measured)),
    })?;
    Ok(exit::SUCCESS)
}

#[derive(Debug, Default)]
struct Request {
    image: ImageArgs,
    output: OutputFormat,
    target_format: String,
    option_texts: Vec<String>,
    size: Option<u64>,
    snapshot: Option<SnapshotName>,
    filename: Option<String>,
}

impl Request {
    fn parse(session: &Session, mut args: Arguments) -> Result<Self, Failure> {
        let mut request = Self { target_format: "raw".to_owned(), ..Self::default() };
        let verb = args.verb();
        while let Some(given) = args.next(session)? {
            match given.opt {
                Opt::Format => request.image.format = Some(given.value),
                Opt::ImageOpts => request.image.image_opts = true,
                Opt::ForceShare => request.image.force_share = true,
                Opt::Output => request.output = OutputFormat::parse(verb, &given.value)?,
                Opt::TargetFormat => request.target_format = given.value,
                Opt::Options => request.option_texts.push(KeyValues::checked(given.value)?),
                Opt::Snapshot => request.snapshot = Some(parse_snapshot(&given.value)?),
                Opt::Size => request.size = Some(parse_argument("image size", &given.value, SIGNED)?),
                Opt::Object => request.image.objects.add(&given.value)?,
                _ => {}
            }
        }
        let mut operands = args.into_operands().into_iter();
        request.filename = operands.next();
        if operands.next().is_some() {
            return Err(Failure::new("At most one filename argument is allowed."));
        }
        let of_a_file =
            request.image.image_opts || request.image.format.is_some() || request.snapshot.is_some();
        let refusal = match (&request.filename, request.size) {
            (None, _) if of_a_file => Some("--image-opts, -f, and -l require a filename argument."),
            (None, None) => Some("Either --size N or one filename must be specified."),
            (Some(_), Some(_)) => Some("--size N cannot be used together with a filename."),
            _ => None,
        };
        refusal.map_or(Ok(request), |text| Err(Failure::new(text)))
    }

    fn open(&self, session: &Session) -> Result<Option<OpenedDisk>, Failure> {
        let Some(filename) = &self.filename else { return Ok(None) };
        self.image.check()?;
        let (name, how) = (read_name(session, filename, &self.image)?, self.image.options());
        Ok(Some(match &self.snapshot {
            Some(snapshot) => open_snapshot(&name, &how, |all| snapshot.position(all))?,
            None => open(&name, &how)?,
        }))
    }

    fn options(&self, format: &ImageFormat) -> Result<NewOptions, Failure> {
        let list = KeyValues::parse_image_options(&self.option_texts).without_help();
        NewOptions::parse(format, &list).map_err(|error| {
            Failure::new(format!("Invalid options for file format '{}'", format.name()))
                .after(Failure::from(error).texts())
        })
    }
}

fn failure(error: &qcow2_ops::Error) -> Failure {
    match (error.kind(), error.core_error()) {
        (ErrorKind::InvalidOption, _) => {
            Failure::new("The image size is too large (try using a larger cluster size)")
        }
        (ErrorKind::Metadata, Some(engine)) => Failure::new(persona::chain(engine)),
        (ErrorKind::Extents, Some(engine)) => {
            Failure::new(format!("Unable to get block status: {}", persona::cause(engine)))
        }
        _ => persona::procedure(error),
    }
}
