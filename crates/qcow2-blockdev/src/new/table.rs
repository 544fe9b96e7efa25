//! Which options there are, of what type, and in which order they are shown: QEMU's tables, which scripts
//! read.

use super::target::protocol_of_new;
use crate::driver::Driver;
use crate::failure::FailureKind;
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
/// included. `file` and the drivers of devices and servers have some too. None for a format that is not made
/// here.
pub fn create_options(format: &ImageFormat) -> &'static [OptionSpec] {
    match format {
        ImageFormat::Raw => RAW,
        ImageFormat::Qcow2 => QCOW2,
        ImageFormat::Luks => LUKS,
        ImageFormat::Other(name) if name == "file" => FILE,
        ImageFormat::Other(name) if name == "host_device" || name == "host_cdrom" => DEVICE,
        ImageFormat::Other(name) if name == "nbd" => SERVER,
        _ => &[],
    }
}

/// What `-o` takes for a new image of `format` called `name`, in the order of their names: the options of the
/// format, and what the format does not have of those of the file, device or server that the name leads to.
/// Without a name those of the format alone. Errors: `UnknownProtocol`, `CreatesNothing`.
pub fn options_at(format: &ImageFormat, name: Option<&str>) -> Result<Vec<OptionSpec>, FailureKind> {
    let mut options: Vec<_> =
        create_options(format).iter().filter(|option| !option.of_file).copied().collect();
    let of_name = match name.map(protocol_of_new).transpose()? {
        None => &[],
        Some(Driver::File) => FILE,
        Some(Driver::HostDevice | Driver::HostCdrom | Driver::Nbd) => SERVER,
        Some(driver) => return Err(FailureKind::CreatesNothing(driver)),
    };
    for option in of_name {
        if options.iter().all(|known| known.name != option.name) {
            options.push(*option);
        }
    }
    options.sort_by_key(|option| option.name);
    Ok(options)
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
const PREALLOCATION: OptionSpec =
    text("preallocation", "Preallocation mode (allowed values: off, falloc, full)");
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
    of_file(PREALLOCATION),
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

const RAW: &[OptionSpec] = &[SIZE, NOCOW, of_file(PREALLOCATION), EXTENT_SIZE_HINT];

/// Those of a file are its own.
const FILE: &[OptionSpec] = &[
    SIZE,
    OptionSpec { of_file: false, ..NOCOW },
    PREALLOCATION,
    OptionSpec { of_file: false, ..EXTENT_SIZE_HINT },
];

/// A device has its space.
const DEVICE: &[OptionSpec] = &[SIZE, NOCOW, NO_PREALLOCATION, EXTENT_SIZE_HINT];

/// So has a server's disk.
const SERVER: &[OptionSpec] = &[SIZE, NO_PREALLOCATION];

const NO_PREALLOCATION: OptionSpec = text("preallocation", "Preallocation mode (allowed values: off)");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_depend_on_where_the_image_goes() {
        let names = |format: &str, name| {
            let options = options_at(&ImageFormat::from_name(format), name).ok()?;
            Some(options.iter().map(|option| option.name).collect::<Vec<_>>().join(" "))
        };
        let in_file = Some("extent_size_hint nocow preallocation size".to_owned());
        let there_already = Some("preallocation size".to_owned());
        assert_eq!(names("raw", None).as_deref(), Some("size"));
        for (format, name, expected) in [
            ("raw", "x", &in_file),
            ("raw", "file:x", &in_file),
            ("raw", "nbd://h/x", &there_already),
            ("raw", "host_device:x", &there_already),
            ("nbd", "nbd:x", &there_already),
            ("nbd", "x", &in_file),
            ("raw", "nofile:x", &None),
            ("raw", "blkdebug::x", &None),
            ("raw", "json:{}", &None),
        ] {
            assert_eq!(names(format, Some(name)), *expected, "{format} {name}");
        }
        let help = |name| {
            let options = options_at(&ImageFormat::Raw, Some(name)).unwrap();
            options.iter().find(|option| option.name == "preallocation").unwrap().help
        };
        assert!(help("x").contains("full") && !help("nbd:x").contains("full"));
    }
}
