//! The reasons not to accept an image.

use super::name::NameKind;
use qcow2_core::format::signature::Container;
use std::fmt;

/// The judgement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Nothing was found.
    Safe,
    /// There is something that cannot be looked into, or that has no business there.
    Unknown,
    /// Using the image may read, write or fetch something else, or exhaust the machine.
    Unsafe,
}

impl Verdict {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Safe => "safe",
            Self::Unknown => "unknown",
            Self::Unsafe => "unsafe",
        }
    }
}

/// For what an image names a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NamedBy {
    /// The backing file of qcow2.
    BackingFile,
    /// The external data file of qcow2.
    DataFile,
    /// An extent in a VMDK descriptor.
    Extent,
    /// The parent in a VMDK descriptor, of a VHD, VHDX or VDI.
    Parent,
}

impl NamedBy {
    fn name(self) -> &'static str {
        match self {
            Self::BackingFile => "backing-file",
            Self::DataFile => "data-file",
            Self::Extent => "extent",
            Self::Parent => "parent",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::BackingFile => "backing file",
            Self::DataFile => "external data file",
            Self::Extent => "extent file",
            Self::Parent => "parent image",
        }
    }
}

/// Where unknown bits are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitsOf {
    /// Incompatible features.
    Incompatible,
    /// Compatible features.
    Compatible,
    /// Autoclear features.
    Autoclear,
}

/// What could not be looked into, or has no business in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Doubt {
    /// The content is encrypted; the method.
    Encrypted(&'static str),
    /// The image is marked corrupt.
    Corrupt,
    /// A header extension of this type, which is not known.
    Extension(u32),
    /// There are more or larger L2 tables than were to be read.
    MoreTables,
    /// Bytes that are not zero follow the last cluster in use. The image may have had them in use once:
    /// nothing tells those from what was put there.
    Trailing,
    /// A partition table is not as it should be.
    Partitions(&'static str),
}

/// One reason. Sizes and places are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// The content passes for several formats.
    Polyglot {
        /// All of them.
        containers: Vec<Container>,
    },
    /// The content was said to be raw and begins, or ends, like an image.
    NotRaw {
        /// Like which.
        container: Container,
    },
    /// The content does not have the format that was stated.
    OtherFormat {
        /// The stated one.
        declared: String,
        /// The one that was seen; `None`: raw.
        seen: Option<Container>,
    },
    /// The format is not among the accepted ones.
    Format {
        /// The format.
        container: Container,
    },
    /// The metadata cannot be understood.
    Malformed {
        /// Of which format.
        container: Container,
        /// What is wrong.
        why: String,
    },
    /// It names another file.
    Name {
        /// For what.
        role: NamedBy,
        /// What the name leads to.
        kind: NameKind,
        /// The name.
        name: String,
        /// Where the name is stored, if that is known.
        at: Option<u64>,
    },
    /// It needs another file without naming it.
    NoName {
        /// For what.
        role: NamedBy,
    },
    /// Feature bits that are not known.
    UnknownBits {
        /// Of which word.
        word: BitsOf,
        /// The bits.
        bits: u64,
    },
    /// The virtual size.
    VirtualSize {
        /// What the header states.
        seen: u64,
        /// The limit.
        allowed: u64,
    },
    /// The size of the tables.
    Tables {
        /// What the header asks for.
        seen: u64,
        /// The limit.
        allowed: u64,
    },
    /// How much the file expands to.
    Ratio {
        /// Guest bytes that it holds.
        guest: u64,
        /// Length of the file.
        file: u64,
        /// The limit of the one divided by the other.
        allowed: u64,
    },
    /// Snapshots inside the image: other disks that nobody asked for.
    Snapshots {
        /// How many.
        seen: u32,
        /// The limit.
        allowed: u32,
    },
    /// Unlocking would take too long.
    Iterations {
        /// Iterations of the most expensive key slot.
        seen: u64,
        /// The limit.
        allowed: u64,
    },
    /// The disk inside begins like an image: a raw copy of it would pass for one.
    Nested {
        /// Like which.
        container: Container,
    },
    /// What cannot be judged.
    Doubt {
        /// What it is.
        what: Doubt,
        /// Where it is, if that is known.
        at: Option<u64>,
    },
}

impl Finding {
    pub(super) fn name(role: NamedBy, name: &str, at: Option<u64>) -> Self {
        let kept = name.chars().take(MAX_NAME).collect();
        Self::Name { role, kind: NameKind::of(name), name: kept, at }
    }

    pub(super) fn malformed(container: Container, why: impl Into<String>) -> Self {
        Self::Malformed { container, why: why.into() }
    }

    pub(super) fn doubt(what: Doubt, at: Option<u64>) -> Self {
        Self::Doubt { what, at }
    }

    /// How bad it is.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Doubt { .. } => Verdict::Unknown,
            Self::UnknownBits { word, .. } if *word != BitsOf::Incompatible => Verdict::Unknown,
            // A raw disk of either kind is the same bytes to everybody.
            Self::Polyglot { containers } if containers.iter().all(|c| c.is_disk_content()) => {
                Verdict::Unknown
            }
            // Many guests encrypt their disks themselves.
            Self::Nested { container: Container::Luks } => Verdict::Unknown,
            _ => Verdict::Unsafe,
        }
    }

    /// Its kind, for programs: a word in lower case with hyphens, which stays the same.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Polyglot { .. } => "polyglot",
            Self::NotRaw { .. } => "not-raw",
            Self::OtherFormat { .. } => "other-format",
            Self::Format { .. } => "format",
            Self::Malformed { .. } => "malformed",
            Self::Name { role, .. } | Self::NoName { role } => role.name(),
            Self::UnknownBits { .. } => "unknown-bits",
            Self::VirtualSize { .. } => "virtual-size",
            Self::Tables { .. } => "tables",
            Self::Ratio { .. } => "ratio",
            Self::Snapshots { .. } => "snapshots",
            Self::Iterations { .. } => "iterations",
            Self::Nested { .. } => "nested",
            Self::Doubt { what: Doubt::Encrypted(_), .. } => "encrypted",
            Self::Doubt { what: Doubt::Corrupt, .. } => "corrupt",
            Self::Doubt { what: Doubt::Extension(_), .. } => "unknown-extension",
            Self::Doubt { what: Doubt::MoreTables, .. } => "tables",
            Self::Doubt { what: Doubt::Trailing, .. } => "trailing-content",
            Self::Doubt { what: Doubt::Partitions(_), .. } => "partitions",
        }
    }

    /// Where in the file it is, in bytes, if that is known.
    pub fn offset(&self) -> Option<u64> {
        match self {
            Self::Name { at, .. } | Self::Doubt { at, .. } => *at,
            _ => None,
        }
    }

    /// What was seen and what is allowed, where both are numbers.
    pub fn numbers(&self) -> Option<(u64, u64)> {
        Some(match *self {
            Self::VirtualSize { seen, allowed }
            | Self::Tables { seen, allowed }
            | Self::Iterations { seen, allowed } => (seen, allowed),
            Self::Ratio { guest, file, allowed } => (guest / file.max(1), allowed),
            Self::Snapshots { seen, allowed } => (seen.into(), allowed.into()),
            _ => return None,
        })
    }

    /// The name that was found, and what it leads to.
    pub fn named(&self) -> Option<(&str, &NameKind)> {
        match self {
            Self::Name { name, kind, .. } => Some((name, kind)),
            _ => None,
        }
    }
}

/// How much of a name is kept; a path is not longer on any system.
const MAX_NAME: usize = 4096;

/// `text` without anything that a terminal would obey.
fn printable(text: &str) -> String {
    let one = |c: char| if c == '\'' || c == '"' { String::from(c) } else { c.escape_debug().collect() };
    text.chars().map(one).collect()
}

/// One sentence, without anything that a terminal would obey.
impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |f: &mut fmt::Formatter<'_>, at: &Option<u64>| match at {
            Some(at) => write!(f, " at {at:#x}"),
            None => Ok(()),
        };
        match self {
            Self::Polyglot { containers } => {
                let names: Vec<_> = containers.iter().map(|container| container.name()).collect();
                write!(f, "content passes for {} formats: {}", names.len(), names.join(", "))
            }
            Self::NotRaw { container } => {
                write!(f, "stated format is raw, but the content passes for {}", container.name())
            }
            Self::OtherFormat { declared, seen } => {
                let seen = seen.map_or("raw", Container::name);
                write!(f, "stated format is {}, but the content is {seen}", declared.escape_debug())
            }
            Self::Format { container } => {
                write!(f, "format is {}, which is not among the accepted ones", container.name())
            }
            Self::Malformed { container, why } => {
                write!(f, "{} metadata is not valid: {}", container.name(), printable(why))
            }
            Self::Name { role, kind, name, at: place } => {
                write!(f, "{} '{}'", role.words(), name.escape_debug())?;
                at(f, place)?;
                write!(f, ", {kind}; allowed is none")
            }
            Self::NoName { role } => write!(f, "{} without a name; allowed is none", role.words()),
            Self::UnknownBits { word, bits } => {
                let word = match word {
                    BitsOf::Incompatible => "incompatible",
                    BitsOf::Compatible => "compatible",
                    BitsOf::Autoclear => "autoclear",
                };
                write!(f, "{word} features {bits:#x} are not known")
            }
            Self::VirtualSize { seen, allowed } => {
                write!(f, "virtual size is {seen} bytes, allowed are {allowed}")
            }
            Self::Tables { seen, allowed } => write!(f, "tables have {seen} bytes, allowed are {allowed}"),
            Self::Ratio { guest, file, allowed } => {
                write!(f, "{file} bytes of file hold {guest} bytes of disk, allowed are {allowed} for each")
            }
            Self::Snapshots { seen, allowed } => {
                write!(f, "{seen} internal snapshots, allowed are {allowed}")
            }
            Self::Iterations { seen, allowed } => {
                write!(f, "key derivation takes {seen} iterations, allowed are {allowed}")
            }
            Self::Nested { container } => {
                write!(f, "the disk inside begins like {}", container.name())
            }
            Self::Doubt { what, at: place } => {
                what.fmt(f)?;
                at(f, place)
            }
        }
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Encrypted(method) => write!(f, "content is encrypted ({method}) and was not looked at"),
            Self::Corrupt => f.write_str("image is marked corrupt"),
            Self::Extension(kind) => write!(f, "header extension {kind:#010x} is not known"),
            Self::MoreTables => f.write_str("more l2 tables than are read; content was not counted"),
            Self::Trailing => f.write_str("content behind the end of the image"),
            Self::Partitions(why) => write!(f, "partition table: {why}"),
        }
    }
}
