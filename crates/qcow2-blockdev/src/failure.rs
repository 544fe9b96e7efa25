//! Why a disk was not opened: one error for names, trees, options, files, keys and chains.

use crate::driver::{AddressError, Driver, RuleError, TuningError, WindowError};
use crate::keyvalue::KeyValueError;
use crate::open::Refusal;
use crate::scalar::OptionError;
use crate::tree::JsonError;
use crate::warning::Warning;
use qcow2_core::format::FormatError;
use qcow2_core::{StorageError, find_cause};
use qcow2_io::{LockConflict, NbdError, OsError, SourceError};
use std::error::Error;
use std::fmt;

/// A disk that was not opened. `Display` is one sentence; [`kind`](Self::kind) is what callers match, and
/// [`cause`](Self::cause) finds an error of another crate below it.
#[derive(Debug)]
pub struct OpenFailure(Box<Details>);

#[derive(Debug)]
struct Details {
    name: String,
    layer: usize,
    kind: FailureKind,
    missing_backing: Option<MissingBacking>,
    warnings: Vec<Warning>,
}

/// A backing file that is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingBacking {
    /// Its name, as the image above records it.
    pub recorded: String,
    /// The image above, to whose directory that name is relative.
    pub above: String,
}

/// What kind of trouble it is, with what a caller may want to know of it.
#[derive(Debug)]
#[non_exhaustive]
pub enum FailureKind {
    /// No driver has this name.
    UnknownDriver(String),
    /// No driver takes names that begin so.
    UnknownProtocol(String),
    /// Neither a driver nor what it should stand on is given.
    NoDriver,
    /// This driver needs the name of a file.
    NoFileName(Driver),
    /// A node is referred to by a name, and no node has one.
    UnknownNode(String),
    /// The same of a backing file.
    UnknownBackingNode(String),
    /// A node is referred to, and what it should be is given besides.
    NodeAndName,
    /// One file is named twice: by an option, and without one.
    TwoNames,
    /// A node stands on nothing, where something must be in this role.
    NothingBelow(&'static str),
    /// A disk of this driver, which holds nothing, has no such name.
    NameOfNull(Driver),
    /// A name with `blkdebug:` lacks the second colon.
    NameOfBlkdebug,
    /// The same of `blkverify:`.
    NameOfBlkverify,
    /// A name has more nodes than this, each below the one before.
    TooManyNodes(usize),
    /// What follows `json:` is not one object.
    Json(JsonError),
    /// A list of `key=value` is none.
    KeyValues(KeyValueError),
    /// The server is not to be found by these options.
    Server(AddressError),
    /// New images cannot be put where this driver leads.
    CreatesNothing(Driver),

    /// An option that the driver does not have.
    UnknownOption {
        /// The driver.
        driver: Driver,
        /// The option.
        option: String,
    },
    /// A backing file is given for a format that has none.
    NoBackingFiles,
    /// A data file is given for an image that has none.
    NoDataFile,
    /// A value that its option does not take.
    Option(OptionError),
    /// A part of a raw disk that is not there.
    Window(WindowError),
    /// Rules for faults that are none.
    Rules(RuleError),
    /// Options of a qcow2 image that do not go together.
    Tuning(TuningError),

    /// A filter that compresses stands on a node of this driver, which does not.
    NoCompression(Driver),
    /// A filter that limits rates names no group of limits, or this one, which is not there.
    NoThrottleGroup(Option<String>),
    /// A filter that copies old bytes lacks this option or node.
    Missing(String),
    /// A filter copies old bytes by the bitmap of this node, which it does not show.
    NoBitmapNode(String),
    /// The node that it shows has no bitmap of this name.
    NoBitmap(String),
    /// It is to copy pieces of this many bytes, which is no power of two.
    UnevenClusters(u64),
    /// A filter that keeps what is read stops at this node, which is not there.
    NoBottomNode(String),
    /// Room is to be reserved in pieces that are no whole sectors.
    UnalignedPreallocation,

    /// An option wants a node left alone that is to be written to.
    ReadOnlyNode,
    /// What is read is to be kept in a disk that is not to be written to.
    KeepsNothing,
    /// Locks are to be ignored, and the disk is to be written to.
    SharedAndWritable,
    /// Requests are to be queued by the system while its page cache is in use.
    QueuedThroughCache,

    /// A device is asked for, and the name leads to something else.
    NotADevice {
        /// The driver of the device.
        driver: Driver,
        /// The name.
        path: String,
    },
    /// A device is asked for, and the name leads nowhere.
    NoDevice {
        /// The name.
        path: String,
        /// The system's answer.
        error: OsError,
    },
    /// The file cannot be opened, or read to learn its format.
    File {
        /// Its name.
        path: String,
        /// Why.
        error: Box<SourceError>,
    },
    /// The server gives no disk.
    Connect(Box<NbdError>),
    /// What is at the bottom cannot be read to learn its format.
    Probe(StorageError),
    /// What is at the bottom cannot be read.
    Storage(StorageError),
    /// A format that only its name is known of.
    UnsupportedFormat(String),
    /// Not an image of the format before qcow2.
    NotQcow,
    /// One of a later version, which another driver reads.
    QcowVersion(u32),
    /// Not a LUKS container.
    Container(FormatError),
    /// An image inside another one, or a filter, is deeper than this.
    TooDeep(usize),
    /// One image and those below it name more files than this.
    TooManyNamed(usize),
    /// The file called so stands below itself.
    Loop(String),
    /// The policy does not allow it.
    Refused(Refusal),
    /// The engine does not open the image. A layer that stays locked is among the causes:
    /// [`KeyError`](crate::KeyError).
    Engine(qcow2_core::Error),

    /// A snapshot is asked for of a disk that has none.
    NoSnapshots,
    /// The image needs an external data file and names none.
    UnnamedDataFile,
    /// The image promises that its external data file is raw, and has none.
    RawWithoutDataFile,
    /// There is no such snapshot.
    NoSuchSnapshot,
}

impl OpenFailure {
    /// The disk called `name` fails as `kind` says.
    pub fn new(name: impl Into<String>, kind: impl Into<FailureKind>) -> Self {
        let (name, kind) = (name.into(), kind.into());
        Self(Box::new(Details { name, layer: 0, kind, missing_backing: None, warnings: Vec::new() }))
    }

    /// The same in the backing file that is so many layers further down.
    #[must_use]
    pub(crate) fn below(mut self, layers: usize) -> Self {
        self.0.layer += layers;
        self
    }

    pub(crate) fn with_missing_backing(mut self, missing: MissingBacking) -> Self {
        self.0.missing_backing = Some(missing);
        self
    }

    pub(crate) fn with_warnings(mut self, warnings: Vec<Warning>) -> Self {
        self.0.warnings = warnings;
        self
    }

    /// The disk, as its name was typed.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Which layer is at fault: 0 is the image itself, 1 its backing file, and so on.
    pub fn layer(&self) -> usize {
        self.0.layer
    }

    /// What kind of trouble it is.
    pub fn kind(&self) -> &FailureKind {
        &self.0.kind
    }

    /// The kind of the name at fault: where an image names another one that fails, that of the other, however
    /// deep.
    pub fn origin(&self) -> &FailureKind {
        let mut kind = self.kind();
        while let Some(deeper) = kind.source().and_then(find_cause::<FailureKind>) {
            kind = deeper;
        }
        kind
    }

    /// The kind alone.
    pub fn into_kind(self) -> FailureKind {
        self.0.kind
    }

    /// The backing file that is not there, where that is the reason.
    pub fn missing_backing(&self) -> Option<&MissingBacking> {
        self.0.missing_backing.as_ref()
    }

    /// What there was to be warned of in the name.
    pub fn warnings(&self) -> &[Warning] {
        &self.0.warnings
    }

    /// The lock that was not to be had, where that is the reason.
    pub fn lock_conflict(&self) -> Option<&LockConflict> {
        self.cause()
    }

    /// The first error of type `T` among the causes.
    pub fn cause<T: Error + 'static>(&self) -> Option<&T> {
        find_cause(&self.0.kind)
    }
}

impl fmt::Display for OpenFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Details { name, layer, kind, .. } = &*self.0;
        match layer {
            0 => write!(f, "could not open '{name}': {kind}"),
            1 => write!(f, "could not open the backing file of '{name}': {kind}"),
            layer => write!(f, "could not open the backing file {layer} layers below '{name}': {kind}"),
        }
    }
}

impl Error for OpenFailure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.kind.source()
    }
}

impl FailureKind {
    /// The sentence for what filters lack, or do not take.
    fn fmt_of_filter(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCompression(driver) => {
                write!(f, "compression is not supported for underlying format: {}", driver.name())
            }
            Self::NoThrottleGroup(Some(name)) => write!(f, "throttle group '{name}' does not exist"),
            Self::NoThrottleGroup(None) => f.write_str("please specify a throttle group"),
            Self::Missing(option) => write!(f, "parameter '{option}' is missing"),
            Self::NoBitmapNode(node) => write!(f, "node '{node}' not found"),
            Self::NoBitmap(bitmap) => write!(f, "dirty bitmap '{bitmap}' not found"),
            Self::UnevenClusters(bytes) => {
                write!(f, "old content is copied in pieces of a power of two, not of {bytes} bytes")
            }
            Self::NoBottomNode(node) => write!(f, "bottom node '{node}' not found"),
            Self::UnalignedPreallocation => {
                f.write_str("prealloc-align parameter of preallocate filter is not aligned to 512")
            }
            other => write!(f, "{other:?}"),
        }
    }
}

/// A sentence that follows "could not open 'name': ".
impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownDriver(name) => write!(f, "there is no driver '{name}'"),
            Self::UnknownProtocol(name) => write!(f, "no driver takes names that begin with '{name}:'"),
            Self::NoDriver => f.write_str("neither 'driver' nor 'file' is given"),
            Self::NoFileName(driver) => write!(f, "the driver '{}' needs the name of a file", driver.name()),
            Self::UnknownNode(name) => write!(f, "there is no node called '{name}'"),
            Self::UnknownBackingNode(name) => {
                write!(f, "there is no node called '{name}' for the backing file")
            }
            Self::NodeAndName => {
                f.write_str("a node is referred to, and a name or options are given besides")
            }
            Self::TwoNames => f.write_str("the file is named twice, by 'filename' and besides"),
            Self::NothingBelow(role) => write!(f, "nothing is given for '{role}'"),
            Self::NameOfNull(driver) => write!(f, "the only name of a '{0}' disk is '{0}://'", driver.name()),
            Self::NameOfBlkdebug => f.write_str("the name is not of the form 'blkdebug:rules:image'"),
            Self::NameOfBlkverify => f.write_str("the name is not of the form 'blkverify:copy:image'"),
            Self::TooManyNodes(most) => {
                write!(f, "more than {most} images and filters stand below one another")
            }
            Self::Json(error) => write!(f, "the description is not one JSON object: {error}"),
            Self::KeyValues(error) => error.fmt(f),
            Self::Server(error) => error.fmt(f),
            Self::CreatesNothing(driver) => write!(f, "the driver '{}' makes no images", driver.name()),
            Self::UnknownOption { driver, option } => {
                write!(f, "the driver '{}' has no option '{option}'", driver.name())
            }
            Self::NoBackingFiles => f.write_str("a disk of this format has no backing file"),
            Self::NoDataFile => f.write_str("the image has no external data file"),
            Self::Option(error) => error.fmt(f),
            Self::Window(error) => error.fmt(f),
            Self::Rules(error) => error.fmt(f),
            Self::Tuning(error) => error.fmt(f),
            Self::ReadOnlyNode => f.write_str("an option allows reading only"),
            Self::KeepsNothing => f.write_str("what is read is kept only where the disk may be written to"),
            Self::SharedAndWritable => f.write_str("locks are ignored only where nothing is written"),
            Self::QueuedThroughCache => f.write_str("aio=native takes cache.direct=on"),
            Self::NotADevice { path, .. } => write!(f, "'{path}' is not a device"),
            Self::NoDevice { path, error } => write!(f, "no device at '{path}': {error}"),
            Self::File { error, .. } => error.fmt(f),
            Self::Connect(error) => error.fmt(f),
            Self::Probe(error) => write!(f, "the format cannot be found out: {error}"),
            Self::Storage(error) => error.fmt(f),
            Self::UnsupportedFormat(_) | Self::NotQcow | Self::QcowVersion(_) | Self::Container(_) => {
                self.about_format(f)
            }
            Self::TooDeep(most) => write!(f, "more than {most} images and filters stand inside one another"),
            Self::TooManyNamed(most) => {
                write!(f, "more than {most} files are named by one image and those below it")
            }
            Self::Loop(name) => write!(f, "'{name}' stands below itself in the backing chain"),
            Self::Refused(refusal) => refusal.fmt(f),
            Self::Engine(error) => error.fmt(f),
            Self::UnnamedDataFile => f.write_str("image needs an external data file but names none"),
            Self::RawWithoutDataFile => {
                f.write_str("image promises a raw external data file (autoclear bit 1), but has no data file")
            }
            Self::NoSnapshots => f.write_str("a disk of this format has no snapshots"),
            Self::NoSuchSnapshot => f.write_str("there is no such snapshot"),
            _ => self.fmt_of_filter(f),
        }
    }
}

impl FailureKind {
    /// The sentence for bytes that are not in the format they should be in.
    fn about_format(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnsupportedFormat(name) => {
                write!(f, "format '{name}' is not supported, only qcow2, raw and luks are")
            }
            Self::QcowVersion(version) => write!(f, "version {version} is of format 'qcow2', not 'qcow'"),
            Self::Container(error) => write!(f, "{error}"),
            _ => f.write_str("not an image in format 'qcow'"),
        }
    }
}

impl Error for FailureKind {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Window(error) => error.source(),
            Self::NoDevice { error, .. } => error.source(),
            Self::File { error, .. } => error.source(),
            Self::Connect(error) => error.source(),
            Self::Probe(error) | Self::Storage(error) => error.source(),
            Self::Engine(error) => error.source(),
            _ => None,
        }
    }
}

macro_rules! from {
    ($($error:ty => $kind:ident),* $(,)?) => {$(
        impl From<$error> for FailureKind {
            fn from(error: $error) -> Self {
                Self::$kind(error)
            }
        }
    )*};
}

from!(
    JsonError => Json,
    KeyValueError => KeyValues,
    AddressError => Server,
    OptionError => Option,
    WindowError => Window,
    RuleError => Rules,
    TuningError => Tuning,
    Refusal => Refused,
    qcow2_core::Error => Engine,
);
