//! `--help` and `--version`, made from the tables.

use super::table::COMMON;
use super::{GENERAL, OptionSpec, VERBS, Verb};
use crate::failure::Failure;
use crate::session::Session;
use qcow2_blockdev::Driver;
use std::fmt::Write;

/// Prints the list of verbs and the options before them.
pub(crate) fn print_general_help(session: &Session) -> Result<(), Failure> {
    let program = session.program();
    let mut text = version_line(session);
    let _ = write!(text, "\nUsage:\n  {program} [OPTIONS] VERB [--help | VERB OPTIONS]\n\nOptions:\n");
    push_options(&mut text, GENERAL);
    text.push_str("\nVerbs:\n");
    for verb in VERBS.iter().filter(|verb| !verb.is_foreign(session)) {
        let _ = writeln!(text, "  {:<10}{}", verb.name, verb.summary);
    }
    let _ = write!(text, "\nSupported image formats:\n\n  {}\n", Driver::NAMES.join(" "));
    if session.is_own() {
        let _ = write!(text, "\n{LIMITS}\n");
    }
    session.print(&text)
}

/// Prints what one verb takes.
pub(crate) fn print_verb_help(session: &Session, verb: &Verb) -> Result<(), Failure> {
    let mut text = String::new();
    let _ = write!(text, "{}.\n\nUsage:\n  {}", verb.summary, session.program());
    if !session.is_qemu_io() {
        let _ = write!(text, " {}", verb.name);
    }
    let _ = write!(text, " {}\n\n", verb.synopsis);
    text.push_str("Options:\n");
    push_options(&mut text, verb.options);
    if session.is_own() {
        text.push_str("\nWhat images may lead to:\n");
        push_options(&mut text, COMMON);
    }
    if !verb.operands.is_empty() {
        text.push_str("\nOperands:\n");
    }
    for (name, help) in verb.operands {
        let _ = writeln!(text, "  {name:<INDENT$}{help}");
    }
    session.print(&text)
}

/// Prints the version. Scripts read the number after `qemu-img version` to learn what they may ask for.
pub(crate) fn print_version(session: &Session) -> Result<(), Failure> {
    session.print(&version_line(session))
}

fn version_line(session: &Session) -> String {
    let own = env!("CARGO_PKG_VERSION");
    if session.is_qemu_nbd() {
        return format!("{} {QEMU_VERSION} (qcow2 {own})\n", session.program());
    }
    match session.is_drop_in() || session.is_qemu_io() {
        true => format!("{} version {QEMU_VERSION} (qcow2 {own})\n", session.program()),
        false => format!("qcow2 {own} (command line of qemu-img {QEMU_VERSION})\n"),
    }
}

fn push_options(text: &mut String, options: &[OptionSpec]) {
    for spec in options.iter().filter(|spec| !spec.help.is_empty()) {
        let mut names = match (spec.short, spec.long) {
            (Some(short), Some(long)) => format!("-{short}, --{long}"),
            (Some(short), None) => format!("-{short}"),
            (None, Some(long)) => format!("--{long}"),
            (None, None) => continue,
        };
        if let Some(value) = spec.value {
            let _ = write!(names, " {value}");
        }
        let _ = match names.len() < INDENT {
            true => writeln!(text, "  {names:<INDENT$}{}", spec.help),
            false => writeln!(text, "  {names}\n  {:<INDENT$}{}", "", spec.help),
        };
    }
}

/// Where to read what is refused because of its size.
pub(super) const LIMITS: &str = "Limits of images and verbs: see \"Limits\" in README.md.";

/// Columns that names take in the help.
const INDENT: usize = 30;

/// The version whose command line this program has.
const QEMU_VERSION: &str = "10.0.2";
