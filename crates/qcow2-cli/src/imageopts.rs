//! The options of new images (`-o`): which there are, of what type, and in which order they are shown.
//! Scripts read the table that `-o help` prints, so it is QEMU's.

use crate::args::Objects;
use crate::drivers;
use crate::failure::Failure;
use crate::session::Session;
use qcow2_blockdev::{
    Driver, KeyValues, OptionError, Pair, escape_commas, read_number, read_size, read_switch,
};
use std::collections::BTreeMap;
use std::fmt::Write;

/// The format of a new image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TargetFormat {
    /// Plain bytes.
    Raw,
    /// A qcow2 image.
    Qcow2,
    /// A LUKS container.
    Luks,
}

impl TargetFormat {
    /// The format called `name`.
    pub(crate) fn parse(name: &str) -> Result<Self, Failure> {
        match name {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            "luks" => Ok(Self::Luks),
            _ if drivers::makes_no_images(name) => {
                Err(Failure::new(format!("Format driver '{name}' does not support image creation")))
            }
            _ => Err(Failure::new(format!("Unknown file format '{name}'"))),
        }
    }

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Luks => "luks",
        }
    }

    /// What understands it.
    pub(crate) fn driver(self) -> Driver {
        match self {
            Self::Raw => Driver::Raw,
            Self::Qcow2 => Driver::Qcow2,
            Self::Luks => Driver::Luks,
        }
    }

    /// Whether it knows backing files, compression and bitmaps.
    pub(crate) fn is_layered(self) -> bool {
        self == Self::Qcow2
    }

    /// Its options in the order in which "Formatting" shows them, those of files included.
    fn options(self) -> &'static [ImageOption] {
        match self {
            Self::Raw => RAW,
            Self::Qcow2 => QCOW2,
            Self::Luks => LUKS,
        }
    }

    /// What can be amended, in the order of their names.
    fn amend_options(self) -> &'static [ImageOption] {
        match self {
            Self::Raw => &[],
            Self::Qcow2 => AMEND,
            Self::Luks => AMEND_LUKS,
        }
    }
}

/// The options of a new image, each of its type.
#[derive(Clone, Debug)]
pub(crate) struct ImageOptions {
    format: TargetFormat,
    values: BTreeMap<&'static str, Value>,
    objects: Objects,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Text(String),
    /// What it means, and how it was written.
    Switch(bool, String),
    Number(u64),
}

impl ImageOptions {
    /// Reads `list` by the table of `format`, the defaults of the format in place. Errors: the first option
    /// that is not known or not of its type, in QEMU's words.
    pub(crate) fn parse(format: TargetFormat, list: &KeyValues) -> Result<Self, Failure> {
        let mut options = Self { format, values: BTreeMap::new(), objects: Objects::default() };
        for option in format.options().iter().filter(|option| !option.default.is_empty()) {
            options.values.insert(option.name, option.read(option.default)?);
        }
        for Pair { key, value } in list.pairs().iter().filter(|pair| pair.key != "id") {
            let option = format.options().iter().find(|option| option.name == key);
            let option = option.ok_or_else(|| Failure::new(format!("Invalid parameter '{key}'")))?;
            options.values.insert(option.name, option.read(value)?);
        }
        Ok(options)
    }

    /// The text of option `name`, if it was given or has a default.
    pub(crate) fn text(&self, name: &str) -> Option<&str> {
        match self.values.get(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// The number of option `name`, if it was given or has a default.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        match self.values.get(name) {
            Some(&Value::Number(number)) => Some(number),
            _ => None,
        }
    }

    /// Whether option `name` was given or has a default.
    pub(crate) fn given(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// Whether switch `name` is on.
    pub(crate) fn switch(&self, name: &str) -> bool {
        matches!(self.values.get(name), Some(Value::Switch(true, _)))
    }

    /// Sets a text option.
    pub(crate) fn set_text(&mut self, name: &'static str, text: &str) {
        self.values.insert(name, Value::Text(text.to_owned()));
    }

    /// Sets a number option.
    pub(crate) fn set_number(&mut self, name: &'static str, number: u64) {
        self.values.insert(name, Value::Number(number));
    }

    /// Sets the objects that options may speak of.
    pub(crate) fn set_objects(&mut self, objects: &Objects) {
        self.objects = objects.clone();
    }

    /// The objects that options may speak of.
    pub(crate) fn objects(&self) -> &Objects {
        &self.objects
    }

    /// The format they belong to.
    pub(crate) fn format(&self) -> TargetFormat {
        self.format
    }

    /// The line that announces a new image, without its end.
    pub(crate) fn announcement(&self, file: &str) -> String {
        let mut line = format!("Formatting '{file}', fmt={}", self.format.name());
        for option in self.format.options() {
            let _ = match self.values.get(option.name) {
                Some(Value::Text(text) | Value::Switch(_, text)) => {
                    write!(line, " {}={}", option.name, escape_commas(text))
                }
                // Numbers are shown as signed ones.
                Some(&Value::Number(number)) => write!(line, " {}={}", option.name, number.cast_signed()),
                None => Ok(()),
            };
        }
        line
    }
}

/// Prints what `-o` takes. `with_file`: whether the target is known to be a file, whose options then count
/// too.
pub(crate) fn print_options(session: &Session, format: TargetFormat, with_file: bool) -> Result<(), Failure> {
    let mut text = match with_file {
        true => "Supported options:\n".to_owned(),
        false => format!("Supported {} options:\n", format.name()),
    };
    let mut shown: Vec<&ImageOption> =
        format.options().iter().filter(|option| with_file || !option.of_file).collect();
    shown.sort_by_key(|option| option.name);
    for option in shown {
        let name = format!("{}=<{}>", option.name, option.kind.name());
        let _ = writeln!(text, "  {name:<22} - {}", option.help);
    }
    if !with_file {
        text.push_str(
            "\nThe protocol level may support further options.\n\
             Specify the target filename to include those options.\n",
        );
    }
    session.print(&text)
}

/// The value of an option of `amend`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AmendOption {
    Text(String),
    Switch(bool),
    Number(u64),
}

/// Reads `list` by the table of what can be amended. Errors: the first option that is not known, can only be
/// given for a new image, or is not of its type.
pub(crate) fn read_amend_options(
    format: TargetFormat,
    list: &KeyValues,
) -> Result<Vec<(&'static str, AmendOption)>, Failure> {
    let read = |Pair { key, value }: &Pair| {
        let Some(option) = format.amend_options().iter().find(|option| option.name == key) else {
            let failure = Failure::new(format!("Invalid parameter '{key}'"));
            return Err(match could_be_new(format, list) {
                true => failure.hint("This option is only supported for image creation"),
                false => failure,
            });
        };
        let value = match option.read(value)? {
            Value::Text(text) => AmendOption::Text(text),
            Value::Switch(on, _) => AmendOption::Switch(on),
            Value::Number(number) => AmendOption::Number(number),
        };
        Ok((option.name, value))
    };
    list.pairs().iter().map(read).collect()
}

/// Whether every option in `list` is one of `amend` or of a new image, and of its type.
fn could_be_new(format: TargetFormat, list: &KeyValues) -> bool {
    let of_format = || format.options().iter().filter(|option| !option.of_file);
    list.pairs().iter().all(|Pair { key, value }| {
        let mut known = format.amend_options().iter().chain(of_format());
        known.find(|option| option.name == key).is_some_and(|option| option.read(value).is_ok())
    })
}

/// Prints what `amend -o` takes.
pub(crate) fn print_amend_options(session: &Session, format: TargetFormat) -> Result<(), Failure> {
    let mut text = format!("Amend options for '{}':\n", format.name());
    for option in format.amend_options() {
        let name = format!("{}=<{}>", option.name, option.kind.name());
        let _ = writeln!(text, "  {name:<22} - {}", option.help);
    }
    session.print(&text)
}

#[derive(Debug)]
struct ImageOption {
    name: &'static str,
    kind: Kind,
    /// Empty: none.
    default: &'static str,
    /// Whether files take it, not the format.
    of_file: bool,
    help: &'static str,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Text,
    Switch,
    Size,
    Number,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "str",
            Self::Switch => "bool (on/off)",
            Self::Size => "size",
            Self::Number => "num",
        }
    }
}

impl ImageOption {
    fn read(&self, text: &str) -> Result<Value, OptionError> {
        match self.kind {
            Kind::Text => Ok(Value::Text(text.to_owned())),
            Kind::Switch => read_switch(self.name, text).map(|on| Value::Switch(on, text.to_owned())),
            Kind::Size => read_size(self.name, text).map(Value::Number),
            Kind::Number => read_number(self.name, text).map(Value::Number),
        }
    }
}

const fn text(name: &'static str, help: &'static str) -> ImageOption {
    ImageOption { name, kind: Kind::Text, default: "", of_file: false, help }
}

const fn switch(name: &'static str, help: &'static str) -> ImageOption {
    ImageOption { kind: Kind::Switch, ..text(name, help) }
}

const fn size(name: &'static str, help: &'static str) -> ImageOption {
    ImageOption { kind: Kind::Size, ..text(name, help) }
}

const fn number(name: &'static str, help: &'static str) -> ImageOption {
    ImageOption { kind: Kind::Number, ..text(name, help) }
}

const fn or(default: &'static str, option: ImageOption) -> ImageOption {
    ImageOption { default, ..option }
}

const fn of_file(option: ImageOption) -> ImageOption {
    ImageOption { of_file: true, ..option }
}

const SIZE: ImageOption = size("size", "Virtual disk size");
const NOCOW: ImageOption = of_file(switch("nocow", "Turn off copy-on-write (valid only on btrfs)"));
const EXTENT_SIZE_HINT: ImageOption =
    of_file(size("extent_size_hint", "Extent size hint for the image file, 0 to disable"));

const QCOW2: &[ImageOption] = &[
    switch("encryption", "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)"),
    text("encrypt.format", "Encrypt the image, format choices: 'aes', 'luks'"),
    text("encrypt.key-secret", "ID of secret providing qcow AES key or LUKS passphrase"),
    text("encrypt.cipher-alg", "Name of encryption cipher algorithm"),
    text("encrypt.cipher-mode", "Name of encryption cipher mode"),
    text("encrypt.ivgen-alg", "Name of IV generator algorithm"),
    text("encrypt.ivgen-hash-alg", "Name of IV generator hash algorithm"),
    text("encrypt.hash-alg", "Name of encryption hash algorithm"),
    number("encrypt.iter-time", "Time to spend in PBKDF in milliseconds"),
    or("65536", size("cluster_size", "qcow2 cluster size")),
    or("off", switch("extended_l2", "Extended L2 tables")),
    text("preallocation", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    or("zlib", text("compression_type", "Compression method used for image cluster compression")),
    SIZE,
    text("compat", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    text("backing_file", "File name of a base image"),
    text("backing_fmt", "Image format of the base image"),
    text("data_file", "File name of an external data file"),
    switch("data_file_raw", "The external data file must stay valid as a raw image"),
    or("off", switch("lazy_refcounts", "Postpone refcount updates")),
    or("16", number("refcount_bits", "Width of a reference count entry in bits")),
    NOCOW,
    EXTENT_SIZE_HINT,
];

const LUKS: &[ImageOption] = &[
    SIZE,
    text("key-secret", "ID of the secret that provides the keyslot passphrase"),
    text("cipher-alg", "Name of encryption cipher algorithm"),
    text("cipher-mode", "Name of encryption cipher mode"),
    text("ivgen-alg", "Name of IV generator algorithm"),
    text("ivgen-hash-alg", "Name of IV generator hash algorithm"),
    text("hash-alg", "Name of encryption hash algorithm"),
    number("iter-time", "Time to spend in PBKDF in milliseconds"),
    NOCOW,
    of_file(text("preallocation", "Preallocation mode (allowed values: off, falloc, full)")),
    EXTENT_SIZE_HINT,
];

const AMEND: &[ImageOption] = &[
    text("backing_file", "File name of a base image"),
    text("backing_fmt", "Image format of the base image"),
    text("compat", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    text("data_file", "File name of an external data file"),
    switch("data_file_raw", "The external data file must stay valid as a raw image"),
    number("encrypt.iter-time", "Time to spend in PBKDF in milliseconds"),
    number("encrypt.keyslot", "Select a single keyslot to modify explicitly"),
    text("encrypt.new-secret", "New secret to set in the matching keyslots. Empty string to erase"),
    text("encrypt.old-secret", "Select all keyslots that match this password"),
    text("encrypt.state", "Select new state of affected keyslots (active/inactive)"),
    switch("lazy_refcounts", "Postpone refcount updates"),
    number("refcount_bits", "Width of a reference count entry in bits"),
    SIZE,
];

const AMEND_LUKS: &[ImageOption] = &[
    number("iter-time", "Time to spend in PBKDF in milliseconds"),
    number("keyslot", "Select a single keyslot to modify explicitly"),
    text("new-secret", "New secret to set in the matching keyslots. Empty string to erase"),
    text("old-secret", "Select all keyslots that match this password"),
    text("state", "Select new state of affected keyslots (active/inactive)"),
];

const RAW: &[ImageOption] = &[
    SIZE,
    NOCOW,
    of_file(text("preallocation", "Preallocation mode (allowed values: off, falloc, full)")),
    EXTENT_SIZE_HINT,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(format: TargetFormat, text: &str) -> Result<ImageOptions, Failure> {
        let texts = if text.is_empty() { Vec::new() } else { vec![text.to_owned()] };
        ImageOptions::parse(format, &KeyValues::parse_image_options(&texts))
    }

    #[track_caller]
    fn check(format: TargetFormat, text: &str, announcement: &str) {
        assert_eq!(parse(format, text).unwrap().announcement("x"), announcement);
    }

    #[track_caller]
    fn check_error(text: &str, lines: &[&str]) {
        assert_eq!(parse(TargetFormat::Qcow2, text).unwrap_err().lines("p", "p"), lines);
    }

    #[test]
    fn announcements() {
        check(
            TargetFormat::Qcow2,
            "size=1M",
            "Formatting 'x', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib size=1048576 \
             lazy_refcounts=off refcount_bits=16",
        );
        check(
            TargetFormat::Qcow2,
            "nocow=on,backing_file=a,,b,lazy_refcounts=yes,refcount_bits=-1,size=1.5k,compat=v3,id=q",
            "Formatting 'x', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib size=1536 compat=v3 \
             backing_file=a,,b lazy_refcounts=yes refcount_bits=-1 nocow=on",
        );
        check(
            TargetFormat::Raw,
            "extent_size_hint=1M,preallocation=off,nocow=on,size=1M",
            "Formatting 'x', fmt=raw size=1048576 nocow=on preallocation=off extent_size_hint=1048576",
        );
    }

    #[test]
    fn errors() {
        check_error("nope=1,size=q", &["p: Invalid parameter 'nope'"]);
        check_error("lazy_refcounts=ON", &["p: Parameter 'lazy_refcounts' expects 'on' or 'off'"]);
        check_error("refcount_bits=16k", &["p: Parameter 'refcount_bits' expects a number"]);
        check_error("refcount_bits=on", &["p: Parameter 'refcount_bits' expects a number"]);
        check_error(
            "refcount_bits=99999999999999999999",
            &["p: Value '99999999999999999999' is too large for parameter 'refcount_bits'"],
        );
        check_error("size=-1", &["p: Value '-1' is out of range for parameter 'size'"]);
        check_error(
            "size=1X",
            &[
                "p: Parameter 'size' expects a non-negative number below 2^64",
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
                "and exabytes, respectively.",
            ],
        );
    }
}
