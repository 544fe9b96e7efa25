//! What a name inside an image would open, by its looks.

use crate::info::InfoReport;
use std::fmt;

/// What a name leads to, for programs that follow it. By the text alone: no file is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NameKind {
    /// A file in the directory of the image, or below it.
    Relative,
    /// A file that the name reaches through `..`.
    Outside,
    /// A file by its absolute path.
    Absolute,
    /// Below `/dev`, `/proc` or `/sys`: a device, or what the system shows as a file.
    Device,
    /// A `json:` description, which can be any tree of drivers.
    Json,
    /// Another protocol, by its name: `nbd`, `https`, ...
    Protocol(String),
}

impl NameKind {
    /// The kind of `name`.
    ///
    /// ```
    /// use qcow2_ops::vet::NameKind;
    ///
    /// assert_eq!(NameKind::of("base.qcow2"), NameKind::Relative);
    /// assert_eq!(NameKind::of("../base.qcow2"), NameKind::Outside);
    /// assert_eq!(NameKind::of("file:/etc/passwd"), NameKind::Absolute);
    /// assert_eq!(NameKind::of("/dev/sda"), NameKind::Device);
    /// assert_eq!(NameKind::of("json:{}"), NameKind::Json);
    /// assert_eq!(NameKind::of("nbd://host/x"), NameKind::Protocol("nbd".into()));
    /// ```
    pub fn of(name: &str) -> Self {
        let path = match name.split_once(':') {
            Some((prefix, _)) if prefix.contains(['/', '\\']) => name,
            Some(("json", _)) => return Self::Json,
            Some(("file", path)) => path.strip_prefix("//").unwrap_or(path),
            // One letter is a drive.
            Some((drive, _)) if drive.len() == 1 && drive.as_bytes()[0].is_ascii_alphabetic() => {
                return Self::Absolute;
            }
            Some((protocol, _)) => return Self::Protocol(protocol.chars().take(MAX_PROTOCOL).collect()),
            None => name,
        };
        let mut parts = path.split(['/', '\\']).filter(|part| !part.is_empty() && *part != ".");
        if path.starts_with(['/', '\\']) {
            let device = matches!(parts.next(), Some("dev" | "proc" | "sys"));
            return if device { Self::Device } else { Self::Absolute };
        }
        if parts.any(|part| part == "..") { Self::Outside } else { Self::Relative }
    }

    /// Its name in reports: `path`, `device`, `json` or `protocol`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Relative | Self::Outside | Self::Absolute => "path",
            Self::Device => "device",
            Self::Json => "json",
            Self::Protocol(_) => "protocol",
        }
    }
}

impl fmt::Display for NameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relative => f.write_str("a relative path"),
            Self::Outside => f.write_str("a path out of the image's directory"),
            Self::Absolute => f.write_str("an absolute path"),
            Self::Device => f.write_str("a device"),
            Self::Json => f.write_str("a json: description"),
            Self::Protocol(name) => write!(f, "protocol {}", name.escape_debug()),
        }
    }
}

/// How much of a protocol's name is kept.
const MAX_PROTOCOL: usize = 32;

/// A file that an image names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NamedFile {
    /// What it is for the image: `backing-file` or `data-file`.
    pub role: &'static str,
    /// What the name leads to.
    pub kind: NameKind,
    /// The name as stored.
    pub name: String,
    /// The format recorded with it.
    pub format: Option<String>,
}

/// Everything that the image named in `info`.
pub fn references(info: &InfoReport) -> Vec<NamedFile> {
    let Some(qcow2) = &info.qcow2 else { return Vec::new() };
    let named = |role, name: &str, format| {
        let (kind, name) = (NameKind::of(name), name.to_owned());
        NamedFile { role, kind, name, format }
    };
    let backing = qcow2.backing.as_ref().map(|b| named("backing-file", &b.name, b.format.clone()));
    let data = qcow2.data_file.as_ref().and_then(|data| data.name.as_deref());
    let data = data.map(|name| named("data-file", name, Some("raw".to_owned())));
    backing.into_iter().chain(data).collect()
}
