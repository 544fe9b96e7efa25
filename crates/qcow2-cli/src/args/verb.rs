//! Verbs, and their arguments while these are read.

use super::table::COMMON;
use super::{Getopt, Given, Opt, OptionSpec, print_verb_help};
use crate::failure::Failure;
use crate::policy;
use crate::session::Session;

/// One verb of the command line.
#[derive(Debug)]
pub(crate) struct Verb {
    /// As typed.
    pub(crate) name: &'static str,
    /// One line for the list of verbs.
    pub(crate) summary: &'static str,
    /// What follows the verb, for the help.
    pub(crate) synopsis: &'static str,
    /// In the order in which lists of possibilities name them.
    pub(crate) options: &'static [OptionSpec],
    /// Operands and what they are.
    pub(crate) operands: &'static [(&'static str, &'static str)],
    /// Runs it. The code is for the caller of the program.
    pub(crate) run: fn(&Session, Arguments) -> Result<u8, Failure>,
}

impl Verb {
    /// Whether the tool that is stood in for has no such verb.
    pub(crate) fn is_foreign(&self, session: &Session) -> bool {
        session.is_drop_in() && matches!(self.name, "io" | "checksum" | "rescue" | "serve" | "vet")
    }
}

/// The arguments of one verb while they are read.
pub(crate) struct Arguments {
    verb: &'static Verb,
    getopt: Getopt<'static>,
}

impl Arguments {
    /// `args`: what follows the verb.
    pub(crate) fn new(session: &Session, verb: &'static Verb, args: Vec<String>, permute: bool) -> Self {
        let getopt = Getopt::new(verb.options, args, permute).with_common(COMMON);
        Self { verb, getopt: if session.is_drop_in() { getopt.without_own() } else { getopt } }
    }

    /// Takes `-` and digits right after the first operand for an operand too, and a third operand for one
    /// too many before any option behind it is read.
    pub(crate) fn with_signed_number(self) -> Self {
        Self { getopt: self.getopt.with_signed_number(), ..self }
    }

    /// The next option. Asking for help prints it and ends the command.
    pub(crate) fn next(&mut self, session: &Session) -> Result<Option<Given>, Failure> {
        match self.getopt.next() {
            Ok(Some(given)) if given.opt == Opt::Help => {
                print_verb_help(session, self.verb)?;
                Err(Failure::silent(crate::exit::SUCCESS))
            }
            Ok(Some(given)) if policy::take(given.opt, &given.value)? => self.next(session),
            Ok(given) => Ok(given),
            Err(text) => {
                let failure = Failure::syntax(Some(self.verb.name), text);
                Err(hint_at(failure, self.getopt.meant().as_deref()))
            }
        }
    }

    /// The operands; only complete when there are no more options.
    pub(crate) fn into_operands(self) -> Vec<String> {
        self.getopt.into_operands()
    }

    /// The only operand; `expected` is the complaint about fewer or more.
    pub(crate) fn into_one_operand(self, expected: &str) -> Result<String, Failure> {
        let verb = self.verb;
        match <[String; 1]>::try_from(self.into_operands()) {
            Ok([operand]) => Ok(operand),
            Err(_) => Err(Failure::usage(verb.name, expected)),
        }
    }

    /// The names of images: one, or several under our own name.
    pub(crate) fn into_images(self, session: &Session) -> Result<Vec<String>, Failure> {
        if session.is_drop_in() {
            return self.into_one_operand("Expecting one image file name").map(|name| vec![name]);
        }
        let verb = self.verb;
        match self.into_operands() {
            names if names.is_empty() => {
                Err(Failure::usage(verb.name, "Expecting at least one image file name"))
            }
            names => Ok(names),
        }
    }

    /// The verb they belong to.
    pub(crate) fn verb(&self) -> &'static Verb {
        self.verb
    }
}

/// Adds the hint to `failure` that something else was `meant`, if it was.
pub(crate) fn hint_at(failure: Failure, meant: Option<&str>) -> Failure {
    match meant {
        Some(meant) => failure.advise(format!("did you mean '{meant}'?")),
        None => failure,
    }
}
