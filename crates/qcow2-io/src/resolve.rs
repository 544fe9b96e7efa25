//! From names to opened sources: those a user gives, and those an image gives.
//!
//! A user's name is opened as it stands. A name inside an image is somebody else's word: it opens nothing
//! unless the [`Policy`] says so, it is taken relative to the directory of the image that gives it (never the
//! current directory), it always means a local file (no `json:` descriptions, no protocols), and it opens
//! regular files only.

use crate::file::FileStorage;
use crate::lock::Locking;
use crate::open::{OpenError, OpenFile};
use crate::probe::{format_from_name, probe_format};
use qcow2_core::{ImageFormat, Reference, ResolveError, ResolvedSource, Resolver, StorageError};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Which names inside images may be opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Policy {
    /// None. For whoever only looks at an image.
    #[default]
    Deny,
    /// Regular files right in the directory of the image, without following symbolic links.
    SameDirectory,
    /// Any regular file, and block devices: for images whose makers are trusted.
    Allow,
}

/// How to open a source that a user names; `Default` reads it, probes its format, and opens nothing else.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct SourceOptions {
    /// How to open the file itself; its cache mode holds for the files it names too, and so do its locking
    /// and the files that are open together with it.
    pub file: OpenFile,
    /// How to lock the files it names, where not as the file itself. [`Locking::Auto`] shares a data file
    /// with other writers that keep its length, and no base of a commit with any.
    pub locking_below: Option<Locking>,
    /// The format; `None` looks at the first bytes.
    pub format: Option<ImageFormat>,
    /// What the names inside may open.
    pub policy: Policy,
}

impl SourceOptions {
    /// Opens as `file` says; the format is probed and nothing else is opened.
    pub fn new(file: OpenFile) -> Self {
        Self { file, ..Self::default() }
    }

    /// These options with a known format instead of a probed one.
    #[must_use]
    pub fn with_format(mut self, format: ImageFormat) -> Self {
        self.format = Some(format);
        self
    }

    /// These options with another policy for the names inside.
    #[must_use]
    pub fn with_policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }
}

/// Opens the file that a user named. The source's name is `path` as it stands. Errors: [`SourceError`].
///
/// ```
/// use qcow2_core::ImageFormat;
/// use qcow2_io::{OpenFile, SourceOptions, open_source};
///
/// let path = std::env::temp_dir().join(format!("qcow2-io-source-{}", std::process::id()));
/// std::fs::write(&path, b"just bytes")?;
/// let source = open_source(&path, &SourceOptions::new(OpenFile::read_only()))?;
/// assert_eq!(source.format, ImageFormat::Raw);
/// # drop(source);
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn open_source(path: &Path, options: &SourceOptions) -> Result<ResolvedSource, SourceError> {
    let (file, format) = open_known(path, options)?;
    let id = file.id();
    let storage = options.file.cache.wrap(Arc::new(file));
    let locking = options.locking_below.unwrap_or(options.file.locking);
    let mut inner = OpenFile::read_only().with_cache(options.file.cache).with_locking(locking);
    inner.open_files = options.file.open_files.clone();
    inner.allow_devices = options.policy == Policy::Allow;
    let resolver = FileResolver { image: path.to_owned(), policy: options.policy, file: inner };
    Ok(ResolvedSource { storage, format, name: path.display().to_string(), id, resolver: Arc::new(resolver) })
}

/// Opens the file and finds out its format. Where the lock depends on a format that is not known yet, it
/// looks first and locks second.
fn open_known(path: &Path, options: &SourceOptions) -> Result<(FileStorage, ImageFormat), SourceError> {
    let mut how = options.file.clone();
    let is_auto = how.locking == Locking::Auto;
    if let Some(format) = &options.format {
        if is_auto {
            how.locking = locking_for(format);
        }
        return Ok((how.open_file(path)?, format.clone()));
    }
    if !is_auto {
        let file = how.open_file(path)?;
        let format = probe_format(&file)?;
        return Ok((file, format));
    }
    let (locking, open_files) = (Locking::Off, None);
    let mut file = OpenFile { locking, open_files, ..how.clone() }.open_file(path)?;
    let format = probe_format(&file)?;
    how.locking = locking_for(&format);
    how.settle(&mut file, path)?;
    Ok((file, format))
}

/// How QEMU locks an image of this format.
fn locking_for(format: &ImageFormat) -> Locking {
    match format {
        ImageFormat::Raw | ImageFormat::Luks => Locking::Shared,
        _ => Locking::NoOtherWriters,
    }
}

/// Why a source was not opened. `Display` and `source()` are those of the error inside.
#[derive(Debug)]
#[non_exhaustive]
pub enum SourceError {
    /// The file could not be opened.
    Open(OpenError),
    /// Its first bytes could not be read.
    Probe(StorageError),
}

impl From<OpenError> for SourceError {
    fn from(error: OpenError) -> Self {
        Self::Open(error)
    }
}

impl From<StorageError> for SourceError {
    fn from(error: StorageError) -> Self {
        Self::Probe(error)
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(error) => error.fmt(f),
            Self::Probe(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for SourceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Open(error) => error.source(),
            Self::Probe(error) => error.source(),
        }
    }
}

/// Opens the names that one image gives, as a [`Policy`] allows.
#[derive(Clone, Debug)]
pub struct FileResolver {
    /// The image whose names these are.
    image: PathBuf,
    policy: Policy,
    /// How files are opened, but for writing.
    file: OpenFile,
}

impl FileResolver {
    /// Resolves the names inside the image at `image`.
    pub fn new(image: impl Into<PathBuf>, policy: Policy) -> Self {
        let mut file = OpenFile::read_only();
        file.allow_devices = policy == Policy::Allow;
        Self { image: image.into(), policy, file }
    }

    /// Where `reference` leads: relative names start at the image's directory. `Err` says why it leads
    /// nowhere. Opens nothing, and asks no policy.
    pub fn locate(&self, reference: Reference<'_>) -> Result<PathBuf, ResolveError> {
        let name = match reference {
            Reference::Backing { name, .. } => local_name(name)?,
            // Whatever it looks like, a data file's name is a plain one.
            Reference::DataFile { name } => name,
            _ => return Err(ResolveError::failed("a kind of name that is not known here")),
        };
        if name.is_empty() || name.contains('\0') {
            return Err(ResolveError::failed(format!("'{}' is not a file name", name.escape_default())));
        }
        let directory = self.image.parent().unwrap_or(Path::new(""));
        Ok(directory.join(name))
    }

    /// Checks `path` against the policy and returns how to open it.
    fn permit(&self, path: &Path, name: &str) -> Result<OpenFile, ResolveError> {
        let mut file = self.file.clone();
        match self.policy {
            Policy::Allow => {}
            Policy::SameDirectory if self.is_neighbour(path) => {
                file.allow_devices = false;
                file.follow_links = false;
            }
            Policy::SameDirectory => {
                return Err(ResolveError::denied(format!(
                    "opening '{name}' is not allowed: it is not in the directory of '{}'",
                    self.image.display()
                )));
            }
            Policy::Deny => {
                return Err(ResolveError::denied(format!("opening '{name}' is not allowed here")));
            }
        }
        Ok(file)
    }

    /// Whether `path` names an entry of the directory that the image is in.
    fn is_neighbour(&self, path: &Path) -> bool {
        let real_parent = |path: &Path| {
            let parent = path.parent()?;
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            parent.canonicalize().ok()
        };
        path.file_name().is_some()
            && real_parent(path).is_some_and(|parent| real_parent(&self.image) == Some(parent))
    }
}

impl Resolver for FileResolver {
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError> {
        let path = self.locate(reference)?;
        let (name, format) = match reference {
            Reference::Backing { name, format } => (name, format.map(format_from_name)),
            Reference::DataFile { name } => (name, Some(ImageFormat::Raw)),
            _ => return Err(ResolveError::failed("a kind of name that is not known here")),
        };
        let mut file = self.permit(&path, name)?;
        file.writable = writable;
        match reference {
            _ if file.locking != Locking::Auto => {}
            Reference::DataFile { .. } => (file.locking, file.resizes) = (Locking::FixedLength, true),
            // Changed below other disks, which do not expect it.
            _ if writable => file.locking = Locking::NoOtherWriters,
            _ => {}
        }
        let locking_below = Some(self.file.locking);
        let options = SourceOptions { file, locking_below, format, policy: self.policy };
        open_source(&path, &options).map_err(|error| {
            let message = format!("could not open '{}'", path.display());
            match error {
                SourceError::Open(error) => ResolveError::failed(message).with_source(error),
                SourceError::Probe(error) => ResolveError::failed(message).with_source(error),
            }
        })
    }
}

/// The file name in a backing name: as it is, or after `file:`. Anything else with a prefix is refused.
fn local_name(name: &str) -> Result<&str, ResolveError> {
    let prefix = match name.split_once(':') {
        Some((prefix, _)) if !prefix.contains('/') => prefix,
        _ => return Ok(name),
    };
    match prefix {
        "file" => Ok(&name["file:".len()..]),
        "json" => Err(ResolveError::denied("a json: description inside an image is never followed")),
        other => Err(ResolveError::failed(format!("unknown protocol '{other}'"))),
    }
}
