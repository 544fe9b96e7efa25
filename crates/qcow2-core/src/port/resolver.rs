//! The port for names found inside an image: opens them, or refuses to.

use super::storage::Storage;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;

/// The format of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageFormat {
    /// Plain bytes.
    Raw,
    /// A qcow2 image.
    Qcow2,
    /// A LUKS container.
    Luks,
    /// A format that this toolkit does not implement.
    Other(String),
}

impl ImageFormat {
    /// The format with this name, as users write it and images record it.
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

/// A name in an image's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reference<'a> {
    /// The backing file. Names in images are bytes; here invalid UTF-8 sequences are replaced.
    Backing {
        /// The name in the header.
        name: &'a str,
        /// The recorded format. If `None`, the resolver may probe the format or refuse.
        format: Option<&'a str>,
    },
    /// The external data file: always raw, always a plain file name.
    DataFile {
        /// The name in the header.
        name: &'a str,
    },
}

/// The identity of a source: equal for two opens of the same file. Used to find loops in a backing chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceId {
    /// The file's device number; any number for sources that are not files.
    pub device: u64,
    /// The file's inode number on that device.
    pub file: u64,
}

/// An opened source. Clones share the storage.
#[derive(Clone)]
pub struct ResolvedSource {
    /// Its bytes, opened for reading, and for writing if requested.
    pub storage: Arc<dyn Storage>,
    /// The format of the bytes.
    pub format: ImageFormat,
    /// Its resolved name, for messages.
    pub name: String,
    /// Its identity, if known.
    pub id: Option<SourceId>,
    /// Resolves the names in this source's own header, relative to this source.
    pub resolver: Arc<dyn Resolver>,
}

impl ResolvedSource {
    /// A source with this storage, format and name, without an identity. Its resolver is [`NoResolver`]:
    /// names in its header are not opened.
    pub fn new(storage: Arc<dyn Storage>, format: ImageFormat, name: impl Into<String>) -> Self {
        Self { storage, format, name: name.into(), id: None, resolver: Arc::new(NoResolver) }
    }

    /// This source with an identity, for finding loops in a backing chain.
    #[must_use]
    pub fn with_id(self, id: Option<SourceId>) -> Self {
        Self { id, ..self }
    }

    /// This source with another resolver for the names in its header.
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

    /// True if a policy denied the name; false if opening it failed.
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
    /// Opens `reference`, relative to the image that this resolver belongs to. `writable`: true to open for
    /// writing. The engine passes true only for the data file of an image that is open for writing; commit
    /// passes true for the backing file that it writes to.
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError>;

    /// True if the caller has chosen a file for references like this one, whatever the image names: then even
    /// an image that names none has one, and [`resolve`](Self::resolve) is called with an empty name.
    fn has_chosen(&self, _reference: Reference<'_>) -> bool {
        false
    }
}

/// Refuses every name: for programs that only inspect an image.
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
