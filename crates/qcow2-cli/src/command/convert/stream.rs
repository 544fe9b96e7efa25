//! Images through pipes: `-` as the target is standard output, `-` as the source standard input; so are the
//! system's names of both where a pipe is there.

use super::request::Request;
use super::{finish, open_sources, target};
use crate::exit;
use crate::failure::Failure;
use crate::files::open_files;
use crate::open::warn_of_missing_end;
use crate::persona;
use crate::session::{Session, unfinished_stream};
use qcow2_blockdev::{Compression, NewOptions, TemporaryFolder, is_fifo, new_image_format};
use qcow2_core::format::CompressionType;
use qcow2_core::{GuestDisk, ImageFormat, find_cause};
use qcow2_io::text_of_name;
use qcow2_ops::{ErrorKind, StreamOptions, StreamedImage};
use qcow2_ops::{begin_stream, stream_qcow2, stream_raw, stream_raw_in};
use qcow2_terminal::Interrupts;
use qcow2_terminal::Meter;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::sync::Arc;

/// Whether the request is about a pipe. The tool that is stood in for knows none: there `-` is a file.
pub(super) fn is_asked_for(session: &Session, request: &Request) -> bool {
    !session.is_drop_in()
        && (is_output(&request.target.name) || request.source.names.iter().any(|source| is_input(source)))
}

fn is_output(name: &str) -> bool {
    name == PIPE || (name == "/dev/stdout" && is_fifo(name))
}

fn is_input(name: &str) -> bool {
    name == PIPE || (name == "/dev/stdin" && is_fifo(name))
}

/// Runs the request.
pub(super) fn run(session: &Session, mut request: Request) -> Result<u8, Failure> {
    let from_pipe = request.source.names.iter().any(|source| is_input(source));
    let rules = [
        (
            from_pipe && is_output(&request.target.name),
            "source and target are both '-': one of them must be a file",
        ),
        (from_pipe && request.source.names.len() > 1, "standard input can only be the only source"),
        (!request.target.create, "'-' and -n exclude each other"),
        (request.copy.bitmaps, "bitmaps cannot be streamed"),
        (from_pipe && request.source.snapshot.is_some(), "a snapshot cannot be read from a stream"),
        (request.target.backing.is_some(), "a streamed image has no backing file"),
        (from_pipe && request.copy.compress, "what comes from a stream is not compressed on its way"),
        (
            !from_pipe && io::stdout().is_terminal(),
            "standard output is a terminal; send it to a file or another program",
        ),
    ];
    if let Some((_, text)) = rules.iter().find(|(broken, _)| *broken) {
        return Err(Failure::new(*text));
    }
    if request.copy.compress && !from_pipe {
        return write_compressed(session, &mut request);
    }
    let request = &request;
    // Nothing is half made where only standard output is written: a signal may end that at once, also while
    // the reader sleeps.
    let interrupts = if from_pipe { Interrupts::install() } else { Interrupts::default() };
    let wanted = request.shown.progress && !request.shown.quiet;
    let meter = Meter::beside_data(session, &interrupts, wanted, request.shown.json_progress);
    let done = match from_pipe {
        true => read(session, request, &interrupts, &meter),
        false => write(session, request, &meter),
    };
    interrupts.end_files(done.is_ok());
    if done.is_ok() {
        meter.complete();
    }
    meter.end();
    interrupts.die_if_asked();
    done.map(|()| exit::SUCCESS)
}

fn write(session: &Session, request: &Request, meter: &Meter) -> Result<(), Failure> {
    let format = new_image_format(request.target.format())?;
    let given = NewOptions::parse(&format, &request.target.list)?;
    if let Some(pair) = request.target.list.pairs().iter().find(|pair| pair.key != "cluster_size") {
        return Err(Failure::new(format!("option '{}' is not possible when streaming", pair.key)));
    }
    let sources = open_sources(session, request)?;
    sources.iter().for_each(|source| warn_of_missing_end(session, source));
    let disks: Vec<Arc<dyn GuestDisk>> = sources.iter().map(|source| Arc::clone(&source.disk)).collect();
    let mut out = io::stdout().lock();
    let written = match format {
        ImageFormat::Qcow2 => {
            let mut options = StreamOptions::default();
            options.cluster_size = given.number("cluster_size").unwrap_or(options.cluster_size);
            stream_qcow2(&disks, &options, &mut out, meter)
        }
        _ => stream_raw(&disks, &mut out, meter),
    };
    written.map(|_| ()).map_err(|error| match find_cause::<io::Error>(&error) {
        // An error of the source may have one of the system below it too.
        Some(broken) if error.kind() == ErrorKind::Write => unfinished_stream(broken),
        _ => persona::procedure(&error),
    })
}

/// Where a compressed cluster lies depends on those before it, which the tables in front of them must tell:
/// the image is made in a temporary file, and sent when it is whole.
fn write_compressed(session: &Session, request: &mut Request) -> Result<u8, Failure> {
    let about = |error: io::Error| Failure::new(format!("a temporary file: {error}"));
    let folder = TemporaryFolder::new().map_err(about)?;
    let path = folder.file("image");
    request.target.name = text_of_name(path.as_os_str());
    let interrupts = Interrupts::install();
    let wanted = request.shown.progress && !request.shown.quiet;
    let meter = Meter::beside_data(session, &interrupts, wanted, request.shown.json_progress);
    let made = super::convert(session, request, &interrupts, &meter);
    interrupts.end_files(made.is_ok());
    let image = made.and_then(|()| File::open(&path).map_err(about));
    // From here on the file has no name, so that nothing stays however this ends.
    drop(folder);
    meter.finish(image).and_then(|mut image| {
        let sent = io::copy(&mut image, &mut io::stdout().lock());
        sent.map(|_| exit::SUCCESS).map_err(|error| unfinished_stream(&error))
    })
}

fn read(session: &Session, request: &Request, interrupts: &Interrupts, meter: &Meter) -> Result<(), Failure> {
    // The target is opened further down, and is not what is read here.
    let _held = open_files().hold_input().map_err(|same| Failure::new(same.to_string()))?;
    let input = Stdin { input: io::stdin().lock(), interrupts };
    let begun = begin_stream(input, request.source.args.format.as_deref());
    let (format, mut input) = begun.map_err(|error| persona::procedure(&error))?;
    let target = match format == ImageFormat::Qcow2 {
        false => {
            let target = target::open(session, request, &[], 0, interrupts)?;
            stream_raw_in(&mut input, &*target, meter).map_err(|error| persona::procedure(&error))?;
            target
        }
        true => {
            let image = StreamedImage::open(&mut input).map_err(|error| persona::procedure(&error))?;
            let codecs = Compression::default().codecs()?;
            let codec = match image.header().compression_type {
                CompressionType::Zstd => codecs.zstd,
                _ => codecs.deflate,
            };
            let target = target::open(session, request, &[], image.size(), interrupts)?;
            image.copy_to(&*target, codec.as_ref(), meter).map_err(|error| persona::procedure(&error))?;
            target
        }
    };
    interrupts.stop_watching();
    finish(&*target)
}

/// Standard input, whose writer may sleep.
struct Stdin<'a> {
    input: io::StdinLock<'static>,
    interrupts: &'a Interrupts,
}

impl Read for Stdin<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.interrupts.while_waiting(|| self.input.read(bytes))
    }
}

const PIPE: &str = "-";
