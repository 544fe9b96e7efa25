//! Options for opening a disk.

use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::password::Passwords;
use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{Codecs, ImageFormat, Layers, OpenOptions, ResolvedSource};
use qcow2_io::{CacheMode, Locking, OpenFile, Policy, SourceOptions, open_source};
use std::path::Path;
use std::sync::Arc;

/// A builder for opening disks, made by [`Disk::options`]: each method sets one option; [`open`](Self::open)
/// opens a disk with them. Options can be kept, cloned and reused.
///
/// The defaults: a qcow2 image, read-only, with QEMU's locks and both compression algorithms. No file that
/// the image names is opened.
///
/// ```no_run
/// use qcow2_image::Disk;
///
/// let disk = Disk::options()
///     .writable()
///     .follow_backing_files()
///     .password("correct horse")
///     .open("overlay.qcow2")?;
/// disk.write_at(4096, b"changed")?;
/// disk.close()?;
/// # Ok::<(), qcow2_image::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "options open nothing before `open` is called"]
pub struct DiskOptions {
    writable: bool,
    /// `None`: probe the format.
    format: Option<ImageFormat>,
    names: Policy,
    layers: Layers,
    passwords: Passwords,
    cache: CacheMode,
    locking: Locking,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            writable: false,
            format: Some(ImageFormat::Qcow2),
            names: Policy::Deny,
            layers: Layers::Follow,
            passwords: Passwords::default(),
            cache: CacheMode::Writeback,
            locking: Locking::Auto,
        }
    }
}

impl DiskOptions {
    /// Opens for reading and writing. Nobody else can open the image meanwhile.
    pub fn writable(mut self) -> Self {
        self.writable = true;
        self
    }

    /// Sets the format of the file, if it is not qcow2: [`ImageFormat::Raw`], or [`ImageFormat::Luks`] for a
    /// LUKS container.
    pub fn format(mut self, format: ImageFormat) -> Self {
        self.format = Some(format);
        self
    }

    /// Probes the format from the first bytes; an unknown format is raw. Only for trusted files: the guest of
    /// a raw disk can write a qcow2 header into it.
    pub fn probe_format(mut self) -> Self {
        self.format = None;
        self
    }

    /// Opens the files that the image names: its backing chain and its external data file, wherever they are.
    /// Only for images from a trusted source: an image can name any file that this program may read, and its
    /// guest would see the content. If the format of a backing file is not recorded, it is probed. Same as
    /// [`names`](Self::names) with [`Policy::Allow`].
    pub fn follow_backing_files(self) -> Self {
        self.names(Policy::Allow)
    }

    /// Sets which files that the image names may be opened; none by default. Opening fails if the image names
    /// any other file.
    pub fn names(mut self, policy: Policy) -> Self {
        self.names = policy;
        self
    }

    /// Opens an overlay without its backing file: data that the overlay does not contain cannot be read. For
    /// inspecting its snapshots and bitmaps.
    pub fn without_backing_file(mut self) -> Self {
        self.layers = Layers::NoBacking;
        self
    }

    /// The password for all encrypted layers. It is wiped from memory after its last use.
    pub fn password(mut self, password: impl Into<Vec<u8>>) -> Self {
        self.passwords = Passwords::one(password.into());
        self
    }

    /// Sets a callback for passwords. `ask` gets the path of an encrypted layer (the image or one of its
    /// backing files) and returns its password, or `None` to give up. It is called for encrypted layers only.
    pub fn password_from(mut self, ask: impl Fn(&str) -> Option<Vec<u8>> + Send + Sync + 'static) -> Self {
        self.passwords = Passwords::asking(ask);
        self
    }

    /// Sets the cache mode. The default uses the page cache; data is durable after a flush.
    pub fn cache(mut self, cache: CacheMode) -> Self {
        self.cache = cache;
        self
    }

    /// Sets how the image is locked; QEMU's way by default. With [`Locking::Shared`] an image can be opened
    /// for reading while a virtual machine writes to it; the data read may be inconsistent.
    pub fn locking(mut self, locking: Locking) -> Self {
        self.locking = locking;
        self
    }

    /// Opens the image in the file or on the block device at `path`. Disk: reads metadata. If the image was
    /// not closed cleanly and is opened for writing, its refcounts are counted again.
    ///
    /// Errors: `NotFound`, `PermissionDenied`, `InUse`; `NotAnImage`; `NameDenied`, `BrokenChain` for files
    /// that the image names; `Password`; `Corrupt` when opening an image marked corrupt for writing;
    /// `Unsupported`.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Disk> {
        let path = path.as_ref();
        Disk::from_source(path, self.open_file(path)?, self.engine())
    }

    /// Opens a snapshot of the image as a read-only disk: the first snapshot with this id or, if there is
    /// none, with this name. Errors: as [`open`](Self::open), and `NotFound` if there is no such snapshot.
    pub fn open_snapshot(&self, path: impl AsRef<Path>, snapshot: &str) -> Result<Disk> {
        let path = path.as_ref();
        let options = Self { writable: false, ..self.clone() };
        Disk::snapshot_in(path, options.open_file(path)?, &options.engine(), snapshot)
    }

    /// Opens the image in `source`, for storages other than files. The options for format, names, cache and
    /// locks do not apply. Errors: as [`open`](Self::open).
    pub fn open_source(&self, source: ResolvedSource) -> Result<Disk> {
        let name = source.name.clone();
        Disk::from_source(Path::new(&name), source, self.engine())
    }

    /// Opens the file without reading its metadata.
    pub(crate) fn open_file(&self, path: &Path) -> Result<ResolvedSource> {
        let file = if self.writable { OpenFile::writable() } else { OpenFile::read_only() };
        let file = file.with_cache(self.cache).with_locking(self.locking);
        let mut options = SourceOptions::new(file).with_policy(self.names);
        options.format.clone_from(&self.format);
        open_source(path, &options).map_err(|error| Error::from_cause(path, OPENING, error))
    }

    /// Opens the file as a backing file: read-only, and locked against writers even if it is raw.
    pub(crate) fn open_backing(&self, path: &Path) -> Result<ResolvedSource> {
        Self { writable: false, locking: Locking::NoOtherWriters, ..self.clone() }.open_file(path)
    }

    /// The options for the engine.
    pub(crate) fn engine(&self) -> OpenOptions {
        let mut options = OpenOptions::default().with_codecs(codecs()).with_layers(self.layers);
        options.writable = self.writable;
        options.keys = self.passwords.keyring();
        // Freed clusters are discarded, so that the file system gets the space back.
        options.discard_freed = self.writable;
        options
    }

    /// The same for files of which nothing is written and nothing followed.
    pub(crate) fn for_rescue(&self) -> Self {
        Self { writable: false, names: Policy::Deny, layers: Layers::TopOnly, ..self.clone() }
    }

    pub(crate) fn passwords(&self) -> &Passwords {
        &self.passwords
    }
}

/// All compression algorithms.
pub(crate) fn codecs() -> Codecs {
    Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()))
}

/// The step named in errors of opening.
pub(crate) const OPENING: &str = "opening the image";
