//! `map`: where the content of an image is stored.

use crate::args::{Arguments, ImageArgs, Opt, OutputFormat};
use crate::exit;
use crate::failure::Failure;
use crate::numbers::{SIGNED, parse_argument};
use crate::open::read_name;
use crate::session::Session;
use qcow2_blockdev::{OpenedDisk, open};
use qcow2_ops::{MapExtent, MapOptions};
use qcow2_report::map::{JsonRows, TextRows};
use std::ops::ControlFlow;

/// Runs the verb.
pub(crate) fn run(session: &Session, args: Arguments) -> Result<u8, Failure> {
    let request = parse(session, args)?;
    request.image.check()?;
    let name = read_name(session, &request.filename, &request.image)?;
    let opened = open(&name, &request.image.options())?;
    match request.output {
        OutputFormat::Human => {
            let rows = TextRows::new(&opened.files);
            let unmappable = || Failure::new("File contains external, encrypted or compressed clusters.");
            session.print(TextRows::HEADER)?;
            walk(session, &opened, &request.options, &mut |extent| rows.row(extent).ok_or_else(unmappable))?;
        }
        OutputFormat::Json => {
            let mut rows = JsonRows::default();
            walk(session, &opened, &request.options, &mut |extent| Ok(rows.row(extent)))?;
            session.print(JsonRows::END)?;
        }
    }
    Ok(exit::SUCCESS)
}

struct Request {
    image: ImageArgs,
    output: OutputFormat,
    options: MapOptions,
    filename: String,
}

fn parse(session: &Session, mut args: Arguments) -> Result<Request, Failure> {
    let (mut image, mut output, mut options) = (ImageArgs::default(), OutputFormat::Human, MapOptions::new());
    let verb = args.verb();
    while let Some(given) = args.next(session)? {
        match given.opt {
            Opt::Output => output = OutputFormat::parse(verb, &given.value)?,
            Opt::StartOffset => options.start = parse_argument("start offset", &given.value, SIGNED)?,
            Opt::MaxLength => options.len = Some(parse_argument("max length", &given.value, SIGNED)?),
            opt => image.take(opt, given.value)?,
        }
    }
    let filename = args.into_one_operand("Expecting one image file name")?;
    Ok(Request { image, output, options, filename })
}

/// Prints what `row` makes of each run, in pieces of a convenient size.
fn walk(
    session: &Session,
    opened: &OpenedDisk,
    options: &MapOptions,
    row: &mut dyn FnMut(&MapExtent) -> Result<String, Failure>,
) -> Result<(), Failure> {
    let (mut pending, mut failed) = (String::new(), None);
    let mut visit = |extent: &MapExtent| {
        let host = extent.host.and_then(|host| host.checked_add(opened.host_start));
        let extent = match opened.is_null && !extent.zero {
            true => MapExtent { present: false, data: false, host: None, ..*extent },
            false => MapExtent { host, ..*extent },
        };
        let done = row(&extent).and_then(|text| {
            pending.push_str(&text);
            if pending.len() < PIECE { Ok(()) } else { session.print(&std::mem::take(&mut pending)) }
        });
        match done {
            Ok(()) => ControlFlow::Continue(()),
            Err(failure) => {
                failed = Some(failure);
                ControlFlow::Break(())
            }
        }
    };
    let mapped = qcow2_ops::map(&opened.disk, options, &mut visit);
    session.print(&pending)?;
    if let Some(failure) = failed {
        return Err(failure);
    }
    mapped.map_err(|error| {
        Failure::new(format!("Could not read file metadata: {}", crate::persona::cause(&error)))
    })
}

/// Bytes of text that are printed at once.
const PIECE: usize = 64 << 10;
