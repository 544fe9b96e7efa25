//! `measure`: how large the file of a new image would be.

use crate::args::{Arguments, ImageArgs, Opt, OutputFormat};
use crate::command::convert::parse_snapshot;
use crate::exit;
use crate::failure::Failure;
use crate::numbers::{SIGNED, parse_argument};
use crate::open::read_name;
use crate::persona;
use crate::render::json;
use crate::session::Session;
use qcow2_blockdev::{KeyValues, NewOptions, new_image_format, open, open_snapshot};
use qcow2_core::format::Version;
use qcow2_core::{GuestDisk, ImageFormat};
use qcow2_ops::ErrorKind;
use qcow2_ops::measure::{
    Measure, MeasureOptions, Measured, measure_bitmaps, measure_container, measure_qcow2, measure_raw,
};
use qcow2_ops::snapshot::SnapshotName;
use std::sync::Arc;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = Request::parse(session, args)?;
    let source = request.open(session)?;
    let format = new_image_format(&request.target_format)?;
    let options = request.options(&format)?;
    let what = match (&source, request.size) {
        (Some(Source { disk, is_null: true }), _) if !options.given("backing_file") => {
            Measured::Size(disk.size())
        }
        (Some(source), _) => Measured::Disk(&source.disk),
        (None, size) => Measured::Size(size.unwrap_or(0)),
    };
    let (measured, bitmaps) = match format {
        ImageFormat::Luks => {
            let area_len = options.luks_header_len(request.image.objects.secrets())?;
            (measure_container(what, area_len), None)
        }
        ImageFormat::Qcow2 => {
            let mut wanted = qcow2_options(&options)?;
            wanted.luks_len = options.luks_header_len(request.image.objects.secrets())?;
            let bitmaps = source.as_ref().filter(|_| version(&options) >= Version::V3);
            let bitmaps =
                bitmaps.map(|source| bitmap_bytes(&source.disk, wanted.cluster_size)).transpose()?;
            (measure_qcow2(what, &wanted), bitmaps.flatten())
        }
        _ => (measure_raw(what), None),
    };
    let measured = measured.map_err(|error| failure(&error))?;
    session.print(&match request.output {
        OutputFormat::Human => text(&measured, bitmaps),
        OutputFormat::Json => json::pretty(&value(&measured, bitmaps)),
    })?;
    Ok(exit::SUCCESS)
}

/// What is measured.
struct Source {
    disk: Arc<dyn GuestDisk>,
    /// Whether it is nothing, which is stored nowhere.
    is_null: bool,
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

    fn open(&self, session: &Session) -> Result<Option<Source>, Failure> {
        let Some(filename) = &self.filename else { return Ok(None) };
        self.image.check()?;
        let (name, how) = (read_name(session, filename, &self.image)?, self.image.options());
        let opened = match &self.snapshot {
            Some(snapshot) => open_snapshot(&name, &how, |all| snapshot.position(all))?,
            None => open(&name, &how)?,
        };
        Ok(Some(Source { disk: opened.disk, is_null: opened.is_null }))
    }

    fn options(&self, format: &ImageFormat) -> Result<NewOptions, Failure> {
        let list = KeyValues::parse_image_options(&self.option_texts);
        let parsed = match list.asks_help() {
            true => Err(Failure::new("Invalid parameter 'help'")),
            false => NewOptions::parse(format, &list).map_err(Failure::from),
        };
        parsed.map_err(|failure| {
            Failure::new(format!("Invalid options for file format '{}'", format.name()))
                .after(failure.texts())
        })
    }
}

/// The options that matter, checked in QEMU's order.
fn qcow2_options(options: &NewOptions) -> Result<MeasureOptions, Failure> {
    let mut wanted = MeasureOptions::default();
    wanted.cluster_size = options.number("cluster_size").unwrap_or(wanted.cluster_size);
    wanted.refcount_bits = options.number("refcount_bits").unwrap_or(wanted.refcount_bits);
    wanted.extended_l2 = options.switch("extended_l2");
    wanted.has_backing = options.text("backing_file").is_some();
    let (size, bits) = (wanted.cluster_size, wanted.refcount_bits);
    let refused = |text: String| Err(Failure::new(text));
    if !size.is_power_of_two() || !(512..=2 << 20).contains(&size) {
        return refused("Cluster size must be a power of two between 512 and 2048k".to_owned());
    }
    if wanted.extended_l2 && size < 16384 {
        let text = "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes";
        return refused(text.to_owned());
    }
    if let Some(other) = options.text("compat").filter(|level| !["0.10", "1.1"].contains(level)) {
        return refused(format!("Invalid compatibility level: '{other}'"));
    }
    if !bits.is_power_of_two() || bits > 64 {
        return refused("Refcount width must be a power of two and may not exceed 64 bits".to_owned());
    }
    if version(options) < Version::V3 && bits != 16 {
        return refused(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
                .to_owned(),
        );
    }
    wanted.preallocation = options.preallocation()?;
    Ok(wanted)
}

fn version(options: &NewOptions) -> Version {
    if options.text("compat") == Some("0.10") { Version::V2 } else { Version::V3 }
}

/// Bytes for the bitmaps of a source that can have some.
fn bitmap_bytes(disk: &Arc<dyn GuestDisk>, cluster_size: u64) -> Result<Option<u64>, Failure> {
    let Some(image) = disk.as_image().filter(|image| image.header().version >= Version::V3) else {
        return Ok(None);
    };
    let bitmaps = image.bitmaps().map_err(|error| Failure::new(persona::chain(&error)))?;
    Ok(Some(measure_bitmaps(&bitmaps, disk.size(), cluster_size)))
}

fn text(measured: &Measure, bitmaps: Option<u64>) -> String {
    let mut text =
        format!("required size: {}\nfully allocated size: {}\n", measured.required, measured.fully_allocated);
    if let Some(bytes) = bitmaps {
        text += &format!("bitmaps size: {bytes}\n");
    }
    text
}

fn value(measured: &Measure, bitmaps: Option<u64>) -> serde_json::Value {
    let mut out = serde_json::Map::new();
    if let Some(bytes) = bitmaps {
        out.insert("bitmaps".to_owned(), bytes.into());
    }
    out.insert("required".to_owned(), measured.required.into());
    out.insert("fully-allocated".to_owned(), measured.fully_allocated.into());
    serde_json::Value::Object(out)
}

fn failure(error: &qcow2_ops::Error) -> Failure {
    match error.kind() {
        ErrorKind::InvalidOption => {
            Failure::new("The image size is too large (try using a larger cluster size)")
        }
        _ => persona::procedure(error),
    }
}
