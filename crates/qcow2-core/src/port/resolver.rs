//! Turning a name found inside an image into an opened source, or refusing to.

use super::storage::Storage;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;

/// How the bytes of a source are to be understood.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageFormat {
    /// Plain bytes.
    Raw,
    /// A qcow2 image.
    Qcow2,
    /// A LUKS container.
    Luks,
    /// Something that this toolkit knows by name only.
    Other(String),
}

impl ImageFormat {
    /// The format called `name`, as users and images write it.
    ///
    /// ```
    /// use qcow2_core::ImageFormat;
    /// assert_eq!(ImageFormat::from_name("raw"), ImageFormat::Raw);
    /// assert_eq!(ImageFormat::from_name("vmdk"), ImageFormat::Other("vmdk".into()));
    /// ```
    pub fn from_name(name: &str) -> Self {
        match name {
            "raw" => Self::Raw,
            "qcow2" => Self::Qcow2,
            "luks" => Self::Luks,
            other => Self::Other(other.into()),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Luks => "luks",
            Self::Other(name) => name,
        }
    }
}

/// A name that an image gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reference<'a> {
    /// Its backing file, with the format recorded beside it. Names are bytes in the image; these are UTF-8
    /// with broken sequences replaced.
    Backing {
        /// The name as it stands in the image.
        name: &'a str,
        /// The recorded format; `None` asks the resolver to probe, if it dares.
        format: Option<&'a str>,
    },
    /// Its external data file: always raw bytes, always a plain file name.
    DataFile {
        /// The name as it stands in the image.
        name: &'a str,
    },
}

/// What makes two openings the same source; used to find loops in a backing chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceId {
    /// The device the file is on, or any number for sources that are not files.
    pub device: u64,
    /// The file's number on that device.
    pub file: u64,
}

/// An opened source. A clone is the same source again: it shares the storage.
#[derive(Clone)]
pub struct ResolvedSource {
    /// Its bytes, opened for reading, or for writing too where that was asked for.
    pub storage: Arc<dyn Storage>,
    /// How to understand them.
    pub format: ImageFormat,
    /// Its name for messages, as resolved.
    pub name: String,
    /// Its identity, where it has one.
    pub id: Option<SourceId>,
    /// Resolves the names that this source gives in turn (relative to its own place).
    pub resolver: Arc<dyn Resolver>,
}

impl ResolvedSource {
    /// The source `name` in `storage`, which is of `format`; it has no identity and opens no name that it
    /// gives.
    pub fn new(storage: Arc<dyn Storage>, format: ImageFormat, name: impl Into<String>) -> Self {
        Self { storage, format, name: name.into(), id: None, resolver: Arc::new(NoResolver) }
    }

    /// This source with an identity, by which loops in a backing chain are found.
    #[must_use]
    pub fn with_id(self, id: Option<SourceId>) -> Self {
        Self { id, ..self }
    }

    /// This source with another resolver for the names that it gives.
    #[must_use]
    pub fn with_resolver(self, resolver: Arc<dyn Resolver>) -> Self {
        Self { resolver, ..self }
    }
}

impl fmt::Debug for ResolvedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResolvedSource").field("name", &self.name).field("format", &self.format).finish()
    }
}

/// A name that was not opened.
#[derive(Debug)]
pub struct ResolveError {
    message: String,
    denied: bool,
    source: Option<Box<dyn core::error::Error + Send + Sync>>,
}

impl ResolveError {
    /// The source could not be opened; `message` names it.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { message: message.into(), denied: false, source: None }
    }

    /// The policy forbids opening it.
    pub fn denied(message: impl Into<String>) -> Self {
        Self { message: message.into(), denied: true, source: None }
    }

    /// Adds the underlying error.
    pub fn with_source(mut self, source: impl core::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// Whether policy, not failure, was the reason.
    pub fn is_denied(&self) -> bool {
        self.denied
    }
}

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl core::error::Error for ResolveError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as _)
    }
}

/// Opens names found inside an image. The engine never opens one itself.
pub trait Resolver: Send + Sync {
    /// Opens what `reference` names, relative to the image this resolver belongs to. `writable`: whether
    /// changes will be made. The engine itself asks so for data files of images open for writing only; commit
    /// asks so for the backing file that it writes to, and for no other.
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError>;
}

/// Opens nothing: the choice for whoever only looks at an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoResolver;

impl Resolver for NoResolver {
    fn resolve(&self, reference: Reference<'_>, _writable: bool) -> Result<ResolvedSource, ResolveError> {
        let name = match reference {
            Reference::Backing { name, .. } | Reference::DataFile { name } => name,
        };
        Err(ResolveError::denied(alloc::format!("opening '{name}' is not allowed here")))
    }
}
