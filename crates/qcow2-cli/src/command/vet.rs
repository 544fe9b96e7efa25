//! `vet`: whether images of unknown origin are safe to accept.

use crate::args::{Arguments, ImageArgs, Opt, OutputFormat};
use crate::exit;
use crate::failure::Failure;
use crate::open::read_name;
use crate::policy::policy;
use crate::session::Session;
use qcow2_blockdev::open_bytes;
use qcow2_core::ImageFormat;
use qcow2_ops::vet::{Verdict, VetOptions, VetReport, vet};
use qcow2_report::vet::to_json;
use qcow2_report::{human, json};
use serde_json::Value;

/// Runs the verb.
pub(crate) fn run(session: &Session, mut args: Arguments) -> Result<u8, Failure> {
    let (mut image, mut output) = (ImageArgs::default(), OutputFormat::Human);
    let verb = args.verb();
    while let Some(given) = args.next(session)? {
        match given.opt {
            Opt::Output => output = OutputFormat::parse(verb, &given.value)?,
            opt => image.take(opt, given.value)?,
        }
    }
    let filenames = args.into_images(session)?;
    let (mut values, mut code) = (Vec::new(), exit::SUCCESS);
    for filename in &filenames {
        match look(session, &image, filename) {
            Ok(report) => {
                code = code.max(exit_code(report.verdict()));
                match output {
                    OutputFormat::Human => {
                        session.print(&format!("{}: {report}\n", human::escaped(filename)))?
                    }
                    OutputFormat::Json => values.push(to_json(filename, &report)),
                }
            }
            // One that cannot be read hides nothing of the others.
            Err(failure) => {
                session.report(&failure);
                code = code.max(exit::VET_UNKNOWN);
            }
        }
    }
    if output == OutputFormat::Json {
        session.print(&match &values[..] {
            [only] if filenames.len() == 1 => json::pretty(only),
            _ => json::pretty(&Value::Array(values)),
        })?;
    }
    Ok(code)
}

fn look(session: &Session, image: &ImageArgs, filename: &str) -> Result<VetReport, Failure> {
    // The bytes are looked at as they are.
    let raw = ImageArgs { format: Some("raw".to_owned()), ..image.clone() };
    let how = raw.options().top_only();
    let source = open_bytes(&read_name(session, filename, &raw)?, &how)?.source;
    let policy = policy();
    let format = image.format.as_deref().map(ImageFormat::from_name);
    let mut options = VetOptions::default().with_format(format).with_codecs(how.codecs());
    options.max_virtual_size = policy.max_virtual_size.unwrap_or(options.max_virtual_size);
    options.max_table_size = policy.max_memory.unwrap_or(options.max_table_size);
    vet(&source.storage, &options).map_err(|error| Failure::new(error.to_string()).about(filename))
}

fn exit_code(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Safe => exit::SUCCESS,
        Verdict::Unknown => exit::VET_UNKNOWN,
        Verdict::Unsafe => exit::VET_UNSAFE,
    }
}
