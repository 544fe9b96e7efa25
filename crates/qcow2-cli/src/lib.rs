//! The command line of the qcow2 tools: qemu-img's verbs, options, texts and exit codes.
//!
//! [`main_with`] is the whole program; it behaves as qemu-img itself where it is called by that name. A verb
//! parses its arguments, opens images, calls one procedure of `qcow2-ops`, renders the report, and returns an
//! exit code.
#![forbid(unsafe_code)]

mod args;
mod command;
mod exit;
mod failure;
mod files;
mod findings;
mod newimage;
mod numbers;
mod open;
mod persona;
mod policy;
mod session;
mod trace;

use args::{Arguments, Getopt, Opt};
use failure::Failure;
use session::Session;
use std::ffi::OsString;

/// Runs the program. `args`: the name it was called by, then its arguments. Returns the exit code; everything
/// else it has to say has gone to standard output and standard error.
pub fn main_with(args: impl IntoIterator<Item = OsString>) -> u8 {
    qcow2_terminal::outlive_harmless_signals();
    let mut args = args.into_iter();
    let session = Session::new(&qcow2_io::text_of_name(&args.next().unwrap_or_default()));
    if session.is_own() {
        persona::speak_own_words();
    }
    let args = args.map(|arg| qcow2_io::text_of_name(&arg)).collect();
    let done = dispatch(&session, args).or_else(|failure| match failure.as_help() {
        Some(text) => session.print(text).map(|()| failure.code()),
        None => Err(failure),
    });
    done.unwrap_or_else(|failure| {
        session.report(&failure);
        failure.code()
    })
}

fn dispatch(session: &Session, args: Vec<String>) -> Result<u8, Failure> {
    policy::take_environment()?;
    if let Some(verb) = args::find_verb("io").filter(|_| session.is_qemu_io()) {
        return command::io::run_as_tool(session, verb, args);
    }
    if session.is_qemu_nbd() {
        return command::serve::run_as_tool(session, args);
    }
    let mut getopt = Getopt::new(args::GENERAL, args, false);
    if session.is_drop_in() {
        getopt = getopt.without_own();
    }
    loop {
        let given = match getopt.next() {
            Ok(Some(given)) => given,
            Ok(None) => break,
            Err(text) => {
                return Err(args::hint_at(Failure::syntax(None, text), getopt.meant().as_deref()));
            }
        };
        match given.opt {
            Opt::Help => return args::print_general_help(session).map(|()| exit::SUCCESS),
            Opt::Describe if !session.is_drop_in() => {
                return args::print_description(session).map(|()| exit::SUCCESS);
            }
            Opt::Version => return args::print_version(session).map(|()| exit::SUCCESS),
            Opt::Trace if trace::accept(session, &given.value)? => return Ok(exit::SUCCESS),
            _ => {}
        }
    }
    let mut operands = getopt.into_operands().into_iter();
    let name = operands.next().ok_or_else(|| Failure::general_usage("Not enough arguments"))?;
    match args::find_verb(&name).filter(|verb| !verb.is_foreign(session)) {
        Some(verb) => {
            let permute = std::env::var_os("POSIXLY_CORRECT").is_none();
            (verb.run)(session, Arguments::new(session, verb, operands.collect(), permute))
        }
        None if args::known_but_missing(&name) => {
            Err(Failure::general_usage(format!("Command not supported yet: {name}")))
        }
        None => {
            let failure = Failure::general_usage(format!("Command not found: {name}"));
            Err(args::hint_at(failure, args::meant_verb(&name)))
        }
    }
}
