//! `info`: what an image says of itself. Opens no file but the one named, unless the backing chain is asked
//! for.

use crate::args::{Arguments, ImageArgs, Opt, OutputFormat};
use crate::exit;
use crate::failure::Failure;
use crate::open::read_name;
use crate::persona;
use crate::policy::policy;
use crate::session::Session;
use qcow2_blockdev::{ImageName, OpenFailure, OpenedBytes, locate_backing, open_bytes, permit_backing};
use qcow2_core::chain::MAX_CHAIN_LEN;
use qcow2_core::format::{FormatError, FormatErrorKind};
use qcow2_core::{SourceId, find_cause};
use qcow2_ops::vet::references;
use qcow2_report::info::{NamedInfo, to_json, to_text};
use qcow2_report::json;
use serde_json::Value;
use std::collections::BTreeSet;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = parse(session, args)?;
    request.image.check()?;
    let several = request.filenames.len() > 1;
    let (mut infos, mut code) = (Vec::new(), exit::SUCCESS);
    for filename in &request.filenames {
        match look(session, &request, filename) {
            Ok(more) => infos.extend(more),
            // One that cannot be read hides nothing of the others.
            Err(failure) if several => {
                session.report(&failure);
                code = failure.code();
            }
            Err(failure) => return Err(failure),
        }
    }
    let text = match request.output {
        OutputFormat::Human => infos.iter().map(to_text).collect::<Vec<_>>().join("\n"),
        OutputFormat::Json if request.chain || several => {
            json::pretty(&infos.iter().map(to_json).collect::<Value>())
        }
        OutputFormat::Json => infos.iter().map(|info| json::pretty(&to_json(info))).collect(),
    };
    session.print(&text).map(|()| code)
}

struct Request {
    image: ImageArgs,
    output: OutputFormat,
    chain: bool,
    filenames: Vec<String>,
}

fn parse(session: &Session, mut args: Arguments) -> Result<Request, Failure> {
    let (mut image, mut output, mut chain) = (ImageArgs::default(), OutputFormat::Human, false);
    let verb = args.verb();
    while let Some(given) = args.next(session)? {
        match given.opt {
            Opt::BackingChain => chain = true,
            Opt::Output => output = OutputFormat::parse(verb, &given.value)?,
            opt => image.take(opt, given.value)?,
        }
    }
    let filenames = args.into_images(session)?;
    Ok(Request { image, output, chain, filenames })
}

/// The image, and with `-b` the files below it, each opened as one that nobody vouches for.
fn look(session: &Session, request: &Request, filename: &str) -> Result<Vec<NamedInfo>, Failure> {
    let mut infos = Vec::new();
    let mut seen: BTreeSet<SourceId> = BTreeSet::new();
    let mut args = request.image.clone();
    let mut next = Some(read_name(session, filename, &args)?);
    while let Some(name) = next.take() {
        if infos.len() >= MAX_CHAIN_LEN {
            return Err(Failure::new(format!("backing chain has more than {MAX_CHAIN_LEN} layers")));
        }
        let OpenedBytes { source, mut nodes, .. } = open_bytes(&name, &args.options().top_only())?;
        if source.id.is_some_and(|id| !seen.insert(id)) {
            let message = format!("Backing file '{}' creates an infinite loop.", name.typed);
            return Err(Failure::new(message));
        }
        let describe = if session.is_own() { qcow2_ops::info } else { qcow2_ops::info::info_past_end };
        let mut report =
            describe(&*source.storage, &source.format).map_err(|error| match error.core_error() {
                Some(engine) => persona::engine_failure(&name.typed, engine),
                None => Failure::could_not_open(&name.typed, &unreadable(&error)),
            })?;
        if let Some(qcow2) = report.qcow2.as_mut().filter(|_| !session.is_own()) {
            let damage = std::mem::take(&mut qcow2.bitmap_damage);
            if let Some(reason) = persona::bitmap_refusal(&qcow2.bitmaps, &damage) {
                return Err(Failure::could_not_open(&name.typed, &reason));
            }
        }
        let backing = report.qcow2.as_ref().and_then(|qcow2| qcow2.backing.clone());
        let full_backing = backing.as_ref().map(|b| locate_backing(name.path().unwrap_or_default(), &b.name));
        if let Some((backing, full)) = backing.zip(full_backing.clone()).filter(|_| request.chain) {
            permit_backing(&policy(), &source.name, &backing.name, infos.len())
                .map_err(|refusal| OpenFailure::new(&name.typed, refusal))?;
            args = ImageArgs { format: backing.format, image_opts: false, ..args };
            next = Some(ImageName::parse(&full, &args.naming())?);
        }
        let format = match name.node.driver().format().is_none() {
            true => nodes.remove(0).driver,
            false if report.qcow2.is_some() => "qcow2",
            false if report.luks.is_some() => "luks",
            false => "raw",
        };
        let references = session.is_own().then(|| references(&report));
        infos.push(NamedInfo { filename: source.name, format, full_backing, nodes, report, references });
    }
    Ok(infos)
}

/// Why nothing is known of an image.
fn unreadable(error: &qcow2_ops::Error) -> String {
    match find_cause::<FormatError>(error).map(FormatError::kind) {
        Some(FormatErrorKind::NotLuks) => "Volume is not in LUKS format".to_owned(),
        _ => persona::chain(error),
    }
}
