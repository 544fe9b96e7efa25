//! How options are described, and those that several verbs have.

use super::{Opt, OptionSpec};

pub(super) const FILENAME: (&str, &str) = ("FILENAME", "the image, or an option string with --image-opts");

pub(super) const HELP: OptionSpec = option(Opt::Help, Some('h'), "help", None, "show this help and exit");
pub(super) const QUIET: OptionSpec = option(Opt::Quiet, Some('q'), "quiet", None, "print errors only");
pub(super) const FORMAT: OptionSpec =
    option(Opt::Format, Some('f'), "format", Some("FMT"), "format of the image");
pub(super) const CACHE: OptionSpec =
    option(Opt::Cache, Some('T'), "cache", Some("CACHE"), "cache mode (writeback)");
pub(super) const WRITE_CACHE: OptionSpec = OptionSpec { short: Some('t'), ..CACHE };
pub(super) const PROGRESS: OptionSpec = option(Opt::Progress, Some('p'), "progress", None, "show progress");
pub(super) const OPTIONS: OptionSpec =
    option(Opt::Options, Some('o'), "options", Some("OPTIONS"), "key=value,... ('-o help' lists them)");
pub(super) const OUTPUT: OptionSpec =
    option(Opt::Output, None, "output", Some("human|json"), "form of the output (human)");
pub(super) const OBJECT: OptionSpec =
    option(Opt::Object, None, "object", Some("OBJECT"), "define an object, such as a secret");
pub(super) const IMAGE_OPTS: OptionSpec = option(
    Opt::ImageOpts,
    None,
    "image-opts",
    None,
    "names are option strings (driver=qcow2,file.filename=...)",
);
pub(super) const FORCE_SHARE: OptionSpec =
    option(Opt::ForceShare, Some('U'), "force-share", None, "open without locks, even if it is in use");
pub(super) const JSON_PROGRESS: OptionSpec =
    own(Opt::JsonProgress, "json", "show progress as lines of JSON on standard error");
pub(super) const BACKING: OptionSpec =
    option(Opt::Backing, Some('b'), "backing", Some("FILE"), "backing file of the new image");
pub(super) const BACKING_FORMAT: OptionSpec =
    option(Opt::BackingFormat, Some('F'), "backing-format", Some("FMT"), "format of the backing file");

pub(super) const fn option(
    opt: Opt,
    short: Option<char>,
    long: &'static str,
    value: Option<&'static str>,
    help: &'static str,
) -> OptionSpec {
    OptionSpec { opt, short, long: Some(long), exact: false, own: false, value, help }
}

pub(super) const fn own(opt: Opt, long: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec { own: true, ..option(opt, None, long, None, help) }
}

pub(super) const fn own_value(
    opt: Opt,
    long: &'static str,
    value: &'static str,
    help: &'static str,
) -> OptionSpec {
    OptionSpec { value: Some(value), ..own(opt, long, help) }
}

pub(super) const fn short(opt: Opt, letter: char, help: &'static str) -> OptionSpec {
    OptionSpec { opt, short: Some(letter), long: None, exact: false, own: false, value: None, help }
}

pub(super) const fn advertised(
    opt: Opt,
    long: &'static str,
    value: Option<&'static str>,
    help: &'static str,
) -> OptionSpec {
    OptionSpec { opt, short: None, long: Some(long), exact: true, own: false, value, help }
}
