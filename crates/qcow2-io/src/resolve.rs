//! Opens the files that users name, and resolves the names inside images.
//!
//! A user's name is opened as given. A name inside an image is untrusted: it opens nothing unless the
//! [`Policy`] allows it; a relative name starts at the directory of the image that contains it, never at the
//! current directory; it is always a local file (no `json:`, no protocols); and it opens regular files only.

use crate::file::FileStorage;
use crate::lock::Locking;
use crate::name::{path_of, text_of_name};
use crate::open::{OpenError, OpenFile};
use crate::probe::probe_format;
use qcow2_core::{ImageFormat, Reference, ResolveError, ResolvedSource, Resolver, StorageError};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Which names inside images may be opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Policy {
    /// None: for programs that only inspect an image.
    #[default]
    Deny,
    /// Regular files in the image's own directory, without following symbolic links.
    SameDirectory,
    /// Any regular file or block device: for images from trusted sources.
    Allow,
}

/// Options for opening a source that a user names. `Default` opens it read-only, probes the format, and opens
/// none of the files it names.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct SourceOptions {
    /// How to open the file itself. Cache mode, locking and the set of open files apply to the files it names
    /// as well.
    pub file: OpenFile,
    /// Locking of the files it names, if it differs from the file's own. [`Locking::Auto`] lets other
    /// programs write to an external data file as long as they keep its length, and keeps other writers off a
    /// commit's backing file.
    pub locking_below: Option<Locking>,
    /// The format; `None` probes the first bytes.
    pub format: Option<ImageFormat>,
    /// Which names inside the image may be opened.
    pub policy: Policy,
    /// Whether the name of an external data file starts at the current directory, as QEMU has it, and not at
    /// that of the image.
    pub data_from_here: bool,
}

impl SourceOptions {
    /// Opens as `file` says, probes the format, and opens no other file.
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

    /// These options with another locking of the files that it names.
    #[must_use]
    pub fn with_locking_below(self, locking_below: Locking) -> Self {
        Self { locking_below: Some(locking_below), ..self }
    }
}

/// Opens the file a user named. The source's name is `path` as given. Errors: [`SourceError`].
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
    let (image, policy) = (path.to_owned(), options.policy);
    let resolver = FileResolver { image, policy, file: inner, data_from_here: options.data_from_here };
    Ok(ResolvedSource {
        storage,
        format,
        name: text_of_name(path.as_os_str()),
        id,
        resolver: Arc::new(resolver),
    })
}

/// Opens the file and determines its format. If the locking depends on a format that is still unknown, the
/// file is opened unlocked, probed, and locked afterwards.
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

/// QEMU's default locking for this format.
fn locking_for(format: &ImageFormat) -> Locking {
    match format {
        ImageFormat::Raw | ImageFormat::Luks => Locking::Shared,
        _ => Locking::NoOtherWriters,
    }
}

/// Why a source could not be opened. `Display` and `source()` are those of the inner error.
#[derive(Debug)]
#[non_exhaustive]
pub enum SourceError {
    /// The file could not be opened.
    Open(OpenError),
    /// Reading the first bytes failed.
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

/// Opens the files that one image names, as far as a [`Policy`] allows.
#[derive(Clone, Debug)]
pub struct FileResolver {
    /// Path of the image that contains the names.
    image: PathBuf,
    policy: Policy,
    /// How files are opened; write access is set per call.
    file: OpenFile,
    data_from_here: bool,
}

impl FileResolver {
    /// Resolver for the names inside the image at `image`.
    pub fn new(image: impl Into<PathBuf>, policy: Policy) -> Self {
        let mut file = OpenFile::read_only();
        file.allow_devices = policy == Policy::Allow;
        Self { image: image.into(), policy, file, data_from_here: false }
    }

    /// Returns the path that `reference` means: relative names start at the image's directory, that of a data
    /// file perhaps at the current one ([`SourceOptions::data_from_here`]). `Err` says why there is none.
    /// Opens
    /// nothing and does not check the policy.
    pub fn locate(&self, reference: Reference<'_>) -> Result<PathBuf, ResolveError> {
        let name = match reference {
            Reference::Backing { name, .. } => local_name(name)?,
            // A data file's name is always a plain path, even if it looks like a protocol.
            Reference::DataFile { name } => name,
            _ => return Err(ResolveError::failed("unsupported kind of reference")),
        };
        if name.is_empty() || name.contains('\0') {
            return Err(ResolveError::failed(format!("'{}' is not a file name", name.escape_default())));
        }
        let directory = match reference {
            Reference::DataFile { .. } if self.data_from_here => None,
            _ => self.image.parent(),
        };
        Ok(directory.unwrap_or(Path::new("")).join(path_of(name)))
    }

    /// Returns the name by which the image refers to the existing file at `file`, the inverse of
    /// [`locate`](Self::locate): its bare name in the image's directory, otherwise its absolute path. The
    /// image need not exist yet, but its directory must. A bare name with a colon would be taken for a
    /// protocol, so it begins with `./`. Disk: reads directories.
    /// Errors: the system's, if one of the two does not exist.
    pub fn name_for(&self, file: &Path) -> io::Result<String> {
        let file = file.canonicalize()?;
        let folder = self.image.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).canonicalize()?;
        let name = match (file.parent(), file.file_name()) {
            (Some(parent), Some(name)) if parent == folder => Path::new("./").join(name),
            _ => file,
        };
        let text = text_of_name(name.as_os_str());
        Ok(text.strip_prefix("./").filter(|rest| !rest.contains(':')).unwrap_or(&text).to_owned())
    }

    /// Says whether the policy allows opening what `reference` names, for callers that open it by other
    /// means. Opens nothing. Errors: as [`Resolver::resolve`], before anything is opened; with
    /// [`Policy::SameDirectory`] a symbolic link too.
    pub fn check(&self, reference: Reference<'_>) -> Result<(), ResolveError> {
        let path = self.locate(reference)?;
        let name = text_of_name(path.as_os_str());
        let file = self.permit(&path, &name)?;
        if !file.follow_links && path.symlink_metadata().is_ok_and(|data| data.is_symlink()) {
            return Err(ResolveError::denied(format!("opening '{name}' is not allowed: it is a link")));
        }
        Ok(())
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

    /// True if `path` names an entry of the image's own directory.
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
            Reference::Backing { name, format } => (name, format.map(ImageFormat::from_name)),
            Reference::DataFile { name } => (name, Some(ImageFormat::Raw)),
            _ => return Err(ResolveError::failed("unsupported kind of reference")),
        };
        let mut file = self.permit(&path, name)?;
        file.writable = writable;
        match reference {
            _ if file.locking != Locking::Auto => {}
            Reference::DataFile { .. } => (file.locking, file.resizes) = (Locking::FixedLength, true),
            // A backing file opened for writing (commit) is the base of other overlays too, which do not
            // expect changes.
            _ if writable => file.locking = Locking::NoOtherWriters,
            _ => {}
        }
        let locking_below = Some(self.file.locking);
        let (policy, data_from_here) = (self.policy, self.data_from_here);
        let options = SourceOptions { file, locking_below, format, policy, data_from_here };
        open_source(&path, &options).map_err(|error| {
            let message = format!("could not open '{}'", path.display());
            match error {
                SourceError::Open(error) => ResolveError::failed(message).with_source(error),
                SourceError::Probe(error) => ResolveError::failed(message).with_source(error),
            }
        })
    }
}

/// The path in a backing file name: as given, or after `file:`. Any other prefix is refused.
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
