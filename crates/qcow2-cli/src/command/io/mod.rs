//! `io`: reads, writes and looks at a disk by commands. Called as `qemu-io` it behaves as that tool.
//!
//! The commands are the exerciser's. Here are its options, its disks (`device`), its outputs (`console`) and
//! the words for errors (`words`).

mod console;
mod device;
mod words;

pub(crate) use device::{failure, lines};

use crate::args::{Arguments, Getopt, Objects, Opt, Verb, print_verb_help, print_version};
use crate::exit;
use crate::failure::Failure;
use crate::session::Session;
use console::Streams;
use device::Files;
use qcow2_core::format::text::text_of;
use qcow2_exerciser::{Console, Exerciser, Flow, OpenRequest, Ports, RequestError};
use qcow2_io::CacheMode;
use std::io::BufRead;
use words::QemuWords;

/// Runs the verb.
pub(crate) fn run(session: &Session, mut args: Arguments) -> Result<u8, Failure> {
    let verb = args.verb();
    let mut request = Request::default();
    while let Some(given) = args.next(session)? {
        request.take(given.opt, given.value)?;
    }
    let mut operands = args.into_operands();
    if operands.len() > 1 {
        return Err(Failure::usage(verb.name, "Expecting at most one image file name"));
    }
    exercise(session, request, operands.pop())
}

/// Runs the program under the name `qemu-io`, where wrong options bring up the help.
pub(crate) fn run_as_tool(session: &Session, verb: &'static Verb, args: Vec<String>) -> Result<u8, Failure> {
    let mut getopt = Getopt::new(verb.options, args, true);
    let mut request = Request::default();
    loop {
        match getopt.next() {
            Ok(None) => break,
            Ok(Some(given)) if given.opt == Opt::Help => {
                return print_verb_help(session, verb).map(|()| exit::SUCCESS);
            }
            Ok(Some(given)) if given.opt == Opt::Version => {
                return print_version(session).map(|()| exit::SUCCESS);
            }
            Ok(Some(given)) => request.take(given.opt, given.value)?,
            Err(text) => {
                session.complain(&format!("{}: {text}", session.called()));
                return print_verb_help(session, verb).map(|()| exit::FAILURE);
            }
        }
    }
    let mut operands = getopt.into_operands();
    if operands.len() > 1 {
        return print_verb_help(session, verb).map(|()| exit::FAILURE);
    }
    exercise(session, request, operands.pop())
}

/// What the options ask for.
#[derive(Default)]
struct Request {
    open: OpenRequest,
    commands: Vec<String>,
    objects: Objects,
}

impl Request {
    fn take(&mut self, opt: Opt, value: String) -> Result<(), Failure> {
        let open = &mut self.open;
        let refused = |error: RequestError| Failure::new(error.to_string());
        match opt {
            Opt::Command => self.commands.push(value),
            Opt::Format => open.format = Some(value),
            Opt::ImageOpts => open.image_opts = true,
            Opt::ForceShare => open.force_share = true,
            Opt::ReadOnly => open.read_only = true,
            Opt::Scratch => open.snapshot = true,
            Opt::CopyOnRead => open.copy_on_read = true,
            Opt::NoCache => open.cache = CacheMode::None,
            Opt::NativeAio => open.native_aio = true,
            Opt::Cache => open.set_cache(Some(&value)).map_err(refused)?,
            Opt::Discard => open.set_discard(Some(&value)).map_err(refused)?,
            Opt::Aio => open.set_aio(Some(&value)).map_err(refused)?,
            Opt::Object => self.objects.add(&value)?,
            // Buffers are placed as the storage wants them anyway; traces are not kept.
            _ => {}
        }
        Ok(())
    }
}

fn exercise(session: &Session, mut request: Request, path: Option<String>) -> Result<u8, Failure> {
    if request.open.image_opts && request.open.format.is_some() {
        return Err(Failure::new("--image-opts and -f are mutually exclusive"));
    }
    let opener = Files { session, objects: request.objects };
    let console = Streams::new(session);
    let words = QemuWords { program: session.program(), stands_in: session.is_qemu_io() };
    let mut exerciser = Exerciser::new(Ports { opener: &opener, console: &console, words: &words });
    if let Some(path) = path {
        request.open.path = Some(path);
        if !exerciser.open(request.open) {
            return Ok(exit::FAILURE);
        }
    }
    match request.commands.is_empty() {
        true => interactive(session, &console, &mut exerciser),
        false => {
            let _ = request.commands.iter().all(|line| goes_on(exerciser.execute(line)));
        }
    }
    exerciser.finish();
    if let Some(lost) = console.take_lost() {
        return Err(lost);
    }
    Ok(if exerciser.has_failed() { exit::FAILURE } else { exit::SUCCESS })
}

/// Runs the lines of standard input, each after a prompt.
fn interactive(session: &Session, console: &Streams<'_>, exerciser: &mut Exerciser<'_>) {
    let prompt = format!("{}> ", session.program());
    let mut lines = std::io::stdin().lock().split(b'\n');
    loop {
        console.out(&prompt);
        match lines.next() {
            Some(Ok(line)) if goes_on(exerciser.execute(text_of(&line).trim_end_matches('\r'))) => {}
            _ => break,
        }
    }
}

/// Does to this process what a command asks for. Returns whether there is a next one.
fn goes_on(flow: Flow) -> bool {
    match flow {
        Flow::Quit => return false,
        Flow::Abort => std::process::abort(),
        // A number that is no signal does nothing.
        #[cfg(unix)]
        Flow::Raise(signal) => drop(signal_hook::low_level::raise(signal)),
        _ => {}
    }
    true
}
