//! `checksum`: a digest of what a machine sees, the same for every image that holds the same disk.

use crate::args::{Arguments, ImageArgs, Opt, OutputFormat, parse_cache};
use crate::exit;
use crate::failure::Failure;
use crate::open::{read_name, warn_of_missing_end};
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::open;
use qcow2_image::Threads;
use qcow2_report::{human, json};
use qcow2_terminal::Interrupts;
use qcow2_terminal::Meter;
use serde_json::{Map, Value};
use std::cell::OnceCell;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = parse(session, args)?;
    request.image.check()?;
    let several = request.filenames.len() > 1;
    let interrupts = OnceCell::new();
    let (mut sums, mut code) = (Vec::new(), exit::SUCCESS);
    for filename in &request.filenames {
        match sum(session, &request, filename, &interrupts) {
            Ok(sum) if request.output == OutputFormat::Human => {
                session.print(&format!("{}  {}\n", sum.digest, human::escaped(filename)))?;
            }
            Ok(sum) => sums.push(sum.to_json(filename)),
            // One that cannot be read hides nothing of the others.
            Err(failure) if several => {
                session.report(&failure);
                code = failure.code();
            }
            Err(failure) => return Err(failure),
        }
    }
    if request.output == OutputFormat::Json {
        session.print(&match &sums[..] {
            [only] if !several => json::pretty(only),
            _ => json::pretty(&Value::Array(sums)),
        })?;
    }
    Ok(code)
}

/// The digest of one disk.
struct Sum {
    method: &'static str,
    digest: String,
    size: u64,
}

impl Sum {
    fn to_json(&self, filename: &str) -> Value {
        let mut fields = Map::new();
        fields.insert("filename".to_owned(), filename.into());
        fields.insert("virtual-size".to_owned(), self.size.into());
        fields.insert(self.method.to_owned(), self.digest.clone().into());
        Value::Object(fields)
    }
}

fn sum(
    session: &Session,
    request: &Request,
    filename: &str,
    interrupts: &OnceCell<Interrupts>,
) -> Result<Sum, Failure> {
    let name = read_name(session, filename, &request.image)?;
    let cache = parse_cache("source cache", request.cache.as_deref())?;
    let opened = open(&name, &request.image.options().with_cache(cache))?;
    warn_of_missing_end(session, &opened);
    let disk = opened.disk;
    // A signal may end the program as ever while a file is being opened.
    let interrupts = interrupts.get_or_init(Interrupts::install);
    let meter = Meter::beside_data(session, interrupts, request.progress, request.json_progress);
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
    let digest = digest.map_err(|error| persona::procedure(&error))?;
    let method = if request.blake3 { "blake3" } else { "crc32" };
    Ok(Sum { method, digest, size: disk.size() })
}

#[derive(Default)]
struct Request {
    image: ImageArgs,
    cache: Option<String>,
    output: OutputFormat,
    blake3: bool,
    progress: bool,
    json_progress: bool,
    filenames: Vec<String>,
}

fn parse(session: &Session, mut args: Arguments) -> Result<Request, Failure> {
    let mut request = Request::default();
    let verb = args.verb();
    while let Some(given) = args.next(session)? {
        match given.opt {
            Opt::Cache => request.cache = Some(given.value),
            Opt::Output => request.output = OutputFormat::parse(verb, &given.value)?,
            Opt::Blake3 => request.blake3 = true,
            Opt::Progress => request.progress = true,
            Opt::JsonProgress => request.json_progress = true,
            opt => request.image.take(opt, given.value)?,
        }
    }
    request.filenames = args.into_images(session)?;
    Ok(request)
}
