//! Which options there are, of what type, and in which order they are shown: QEMU's tables, which scripts
//! read.

use crate::scalar::{OptionError, OptionValue, read_number, read_size, read_switch};
use qcow2_core::ImageFormat;

/// An option of a new image, or of one that is changed.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec {
    /// Its name.
    pub name: &'static str,
    /// What its value is.
    pub value: OptionType,
    /// The value of a new image for which none is given.
    pub default: Option<&'static str>,
    /// Whether files take it, not the format.
    pub of_file: bool,
    /// What it does, in a few words.
    pub help: &'static str,
}

impl OptionSpec {
    /// What `-o help` says of it: a whole line.
    pub fn line(&self) -> String {
        let name = format!("{}=<{}>", self.name, self.value.name());
        format!("  {name:<22} - {}\n", self.help)
    }
}

/// What the value of an option is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionType {
    /// Any text.
    Text,
    /// On or off.
    Switch,
    /// A number of bytes, with a suffix or without ([`parse_size`](crate::parse_size)).
    Size,
    /// A number.
    Number,
}

impl OptionType {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "str",
            Self::Switch => "bool (on/off)",
            Self::Size => "size",
            Self::Number => "num",
        }
    }
}

impl OptionSpec {
    pub(super) fn read(&self, text: &str) -> Result<OptionValue, OptionError> {
        match self.value {
            OptionType::Text => Ok(OptionValue::Text(text.to_owned())),
            OptionType::Switch => {
                read_switch(self.name, text).map(|on| OptionValue::Switch(on, text.to_owned()))
            }
            OptionType::Size => read_size(self.name, text).map(OptionValue::Number),
            OptionType::Number => read_number(self.name, text).map(OptionValue::Number),
        }
    }
}

/// The options of a new image of `format`, in the order in which an announcement shows them, those of files
/// included. None for a format that is not made here.
pub fn create_options(format: &ImageFormat) -> &'static [OptionSpec] {
    match format {
        ImageFormat::Raw => RAW,
        ImageFormat::Qcow2 => QCOW2,
        ImageFormat::Luks => LUKS,
        _ => &[],
    }
}

/// What can be changed in an image of `format`, in the order of the names.
pub fn amend_options(format: &ImageFormat) -> &'static [OptionSpec] {
    match format {
        ImageFormat::Qcow2 => AMEND,
        ImageFormat::Luks => AMEND_LUKS,
        _ => &[],
    }
}

const fn text(name: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec { name, value: OptionType::Text, default: None, of_file: false, help }
}

const fn switch(name: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec { value: OptionType::Switch, ..text(name, help) }
}

const fn size(name: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec { value: OptionType::Size, ..text(name, help) }
}

const fn number(name: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec { value: OptionType::Number, ..text(name, help) }
}

const fn or(default: &'static str, option: OptionSpec) -> OptionSpec {
    OptionSpec { default: Some(default), ..option }
}

const fn of_file(option: OptionSpec) -> OptionSpec {
    OptionSpec { of_file: true, ..option }
}

const SIZE: OptionSpec = size("size", "Virtual disk size");
const NOCOW: OptionSpec = of_file(switch("nocow", "Turn off copy-on-write (valid only on btrfs)"));
const EXTENT_SIZE_HINT: OptionSpec =
    of_file(size("extent_size_hint", "Extent size hint for the image file, 0 to disable"));

const QCOW2: &[OptionSpec] = &[
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

/// QEMU lists it too, and refuses it in every image that is made from a list of options.
pub(super) const DETACHED_HEADER: &str = "detached-header";

const LUKS: &[OptionSpec] = &[
    SIZE,
    text("key-secret", "ID of the secret that provides the keyslot passphrase"),
    text("cipher-alg", "Name of encryption cipher algorithm"),
    text("cipher-mode", "Name of encryption cipher mode"),
    text("ivgen-alg", "Name of IV generator algorithm"),
    text("ivgen-hash-alg", "Name of IV generator hash algorithm"),
    text("hash-alg", "Name of encryption hash algorithm"),
    number("iter-time", "Time to spend in PBKDF in milliseconds"),
    switch(DETACHED_HEADER, "Create a detached LUKS header"),
    NOCOW,
    of_file(text("preallocation", "Preallocation mode (allowed values: off, falloc, full)")),
    EXTENT_SIZE_HINT,
];

const AMEND: &[OptionSpec] = &[
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

const AMEND_LUKS: &[OptionSpec] = &[
    number("iter-time", "Time to spend in PBKDF in milliseconds"),
    number("keyslot", "Select a single keyslot to modify explicitly"),
    text("new-secret", "New secret to set in the matching keyslots. Empty string to erase"),
    text("old-secret", "Select all keyslots that match this password"),
    text("state", "Select new state of affected keyslots (active/inactive)"),
];

const RAW: &[OptionSpec] = &[
    SIZE,
    NOCOW,
    of_file(text("preallocation", "Preallocation mode (allowed values: off, falloc, full)")),
    EXTENT_SIZE_HINT,
];
