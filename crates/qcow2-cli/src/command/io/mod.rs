//! `io`: reads, writes and looks at a disk by commands. Called as `qemu-io` it behaves as that tool.
//!
//! `parse` turns words into commands, `exerciser` runs them, `target` makes the requests, `report` tells of
//! them.

mod background;
mod command;
mod console;
mod copy_on_read;
mod device;
mod exerciser;
mod guarded_raw;
mod help;
mod parse;
mod report;
mod request;
mod source;
mod table;
mod target;
#[cfg(test)]
mod tests;
mod vmstate;
mod words;

use crate::args::{Arguments, Getopt, Objects, Opt, Verb, print_verb_help, print_version};
use crate::exit;
use crate::failure::Failure;
use crate::session::Session;
use console::Console;
use device::Files;
use exerciser::{Exerciser, Flow};
use qcow2_io::CacheMode;
use request::OpenRequest;
use std::io::BufRead;

/// Runs the verb.
pub(crate) fn run(session: &Session, mut args: Arguments) -> Result<u8, Failure> {
    let verb = args.verb();
    let mut request = Request::default();
    while let Some(given) = args.next(session)? {
        request.take(given.opt, given.value)?;
    }
    let mut operands = args.into_operands();
    if operands.len() > 1 {
        return Err(Failure::usage(verb, "Expecting at most one image file name"));
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
            Opt::Cache => open.set_cache(Some(&value)).map_err(Failure::new)?,
            Opt::Discard => open.set_discard(Some(&value)).map_err(Failure::new)?,
            Opt::Aio => open.set_aio(Some(&value)).map_err(Failure::new)?,
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
    let opener = Files { objects: request.objects };
    let mut exerciser = Exerciser::new(Console::standard(session.program()), &opener);
    if let Some(path) = path {
        request.open.path = Some(path);
        if !exerciser.open_first(request.open) {
            return Ok(exit::FAILURE);
        }
    }
    match request.commands.is_empty() {
        true => interactive(session, &mut exerciser),
        false => {
            let _ = request.commands.iter().all(|line| exerciser.execute(line) == Flow::Continue);
        }
    }
    exerciser.finish();
    if let Some(lost) = exerciser.console().take_lost() {
        return Err(lost);
    }
    Ok(if exerciser.has_failed() { exit::FAILURE } else { exit::SUCCESS })
}

/// Runs the lines of standard input, each after a prompt.
fn interactive(session: &Session, exerciser: &mut Exerciser<'_>) {
    let prompt = format!("{}> ", session.program());
    let mut lines = std::io::stdin().lock().lines();
    loop {
        exerciser.console().out(&prompt);
        match lines.next() {
            Some(Ok(line)) if exerciser.execute(&line) == Flow::Continue => {}
            _ => break,
        }
    }
}
