//! Verbs, their options and how they are read: qemu-img's names throughout.

mod describe;
mod help;
mod image;
mod object;
mod opt;
mod spec;
mod table;
mod tools;
mod verb;

pub(crate) use describe::print_description;
pub(crate) use help::{print_general_help, print_verb_help, print_version};
pub(crate) use image::ImageArgs;
pub(crate) use object::Objects;
pub(crate) use opt::{Getopt, Given, Opt, OptionSpec};
pub(crate) use table::{GENERAL, VERBS, find_verb, known_but_missing, meant_verb};
pub(crate) use verb::{Arguments, Verb, hint_at};

use crate::failure::Failure;
use qcow2_io::CacheMode;

/// Reads the name of a cache mode, writeback where none is given; `what` names the option in the error
/// ("cache", "source cache").
pub(crate) fn parse_cache(what: &str, text: Option<&str>) -> Result<CacheMode, Failure> {
    let parse =
        |text| CacheMode::parse(text).ok_or_else(|| Failure::new(format!("Invalid {what} option: {text}")));
    text.map_or(Ok(CacheMode::default()), parse)
}

/// How results are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum OutputFormat {
    /// For people.
    #[default]
    Human,
    /// For programs.
    Json,
}

impl OutputFormat {
    /// Reads the value of `--output`.
    pub(crate) fn parse(verb: &'static Verb, text: &str) -> Result<Self, Failure> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err(Failure::usage(verb.name, format!("--output expects 'human' or 'json' not '{text}'"))),
        }
    }
}
