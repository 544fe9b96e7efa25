//! Backing chains: commit, rebase, external snapshots.

use crate::error::{Error, ErrorKind, Result};
use crate::newfile::NewFile;
use crate::options::DiskOptions;
use crate::threads::Threads;
use qcow2_core::walk::read_header;
use qcow2_core::{GuestDisk, ImageFormat, Layers, Reference, ResolvedSource, Storage, open_disk};
use qcow2_io::{FileResolver, Policy};
use qcow2_ops::{
    CallerError, Chain, CommitOptions, CopyReport, LayerRole, NewBacking, NewStorage, NextLayer, OpenChain,
    RebaseOptions, RebaseReport, Silent, snapshot,
};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Backing chains. These open the images themselves, because a layer below the top is changed or replaced: no
/// [`Disk`](crate::Disk) of the same images may be open. Files that images name are opened only as the
/// options allow it: [`follow_backing_files`](Self::follow_backing_files).
///
/// ```
/// use qcow2_image::{Disk, ImageFormat};
///
/// # let folder = tempfile::tempdir()?;
/// # let path = |name: &str| folder.path().join(name);
/// Disk::create(path("base.qcow2"), 1 << 20)?.close()?;
/// Disk::options().snapshot_externally(path("base.qcow2"), path("top.qcow2"))?;
/// let trusted = Disk::options().follow_backing_files();
/// let top = trusted.clone().writable().open(path("top.qcow2"))?;
/// top.write_at(0, b"new")?;
/// top.close()?;
/// trusted.commit(path("top.qcow2"))?;
/// trusted.rebase(path("top.qcow2"), None)?;
/// let mut bytes = [0; 3];
/// Disk::open(path("base.qcow2"))?.read_at(0, &mut bytes)?;
/// assert_eq!(&bytes, b"new");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
impl DiskOptions {
    /// Writes what the overlay at `path` contains into its backing file, which grows if it is smaller, and
    /// then makes the overlay empty. Uses all processors. A crash or an error leaves a chain that reads as
    /// before. Errors: as [`open`](Self::open); `Unsupported` if there is no backing file; `NoSpace`, `Io`.
    pub fn commit(&self, path: impl AsRef<Path>) -> Result<CopyReport> {
        self.commit_as(path.as_ref(), &CommitOptions::default().with_empty_top(true))
    }

    /// Writes what the overlay at `path` and the layers below it contain into the layer `base` of its backing
    /// chain. The overlay keeps its data. Errors: as [`commit`](Self::commit); `NotFound` if `base` is not in
    /// the chain.
    pub fn commit_into(&self, path: impl AsRef<Path>, base: impl AsRef<Path>) -> Result<CopyReport> {
        let (path, base) = (path.as_ref(), base.as_ref());
        let Some(base) = base.to_str() else {
            let reason = format!("{COMMITTING}: the name of the base is not UTF-8");
            return Err(Error::new(ErrorKind::InvalidOption, path, reason));
        };
        self.commit_as(path, &CommitOptions::default().with_base(Some(base.to_owned())))
    }

    fn commit_as(&self, path: &Path, options: &CommitOptions) -> Result<CopyReport> {
        let chain = Layered { path, options: self.clone().writable() };
        qcow2_ops::commit(&chain, options, &Threads::per_core(), &Silent)
            .map_err(|e| Error::from_cause(path, COMMITTING, e))
    }

    /// Gives the overlay at `path` another backing file, or none, and copies into it what would read
    /// differently. Uses all processors. `new`: the name to record, relative to the directory of the overlay,
    /// and the format. It is opened because you name it here; files that it names in turn are opened as for
    /// the overlay. A crash or an error leaves the old backing file or the new one, and the same guest
    /// content. Errors: as [`open`](Self::open), also for `new`; `Unsupported` for a disk that is not qcow2
    /// or has a raw data file; `InvalidOption` for a name that is too long; `NoSpace`, `Io`.
    pub fn rebase(&self, path: impl AsRef<Path>, new: Option<(&str, ImageFormat)>) -> Result<RebaseReport> {
        let path = path.as_ref();
        let failed = |e: qcow2_ops::Error| match e.kind() {
            qcow2_ops::ErrorKind::InvalidOption => Error::refused(path, REBASING, e),
            _ => Error::from_cause(path, REBASING, e),
        };
        let overlay = self.clone().writable();
        let mut options = RebaseOptions::default();
        if let Some((name, format)) = &new {
            options.backing_file = Some((*name).to_owned());
            options.backing_format = Some(format.name().to_owned());
        }
        let top = open_disk(overlay.open_file(path)?, &overlay.engine());
        let top = Chain::new(top.map_err(|e| Error::from_cause(path, REBASING, e))?);
        let new = Onto { overlay: path, options: self, new };
        qcow2_ops::rebase(top, &new, &options, &Threads::per_core(), &Silent).map_err(failed)
    }

    /// Creates an overlay at `new`, which must not exist, on top of the image at `path`: the state of `path`
    /// is kept if only the overlay is written from now on. `path` is only read, and nobody may be writing to
    /// it. The overlay records it by its bare name in the same directory, otherwise by its absolute path.
    /// After an error there is no file at `new`. Errors: as [`open`](Self::open); `Exists`; `NoSpace`, `Io`.
    pub fn snapshot_externally(&self, path: impl AsRef<Path>, new: impl AsRef<Path>) -> Result<()> {
        let (path, new) = (path.as_ref(), new.as_ref());
        let failed = |e| Error::from_cause(new, SNAPSHOTTING, e);
        let source = self.open_backing(path)?;
        let (format, id) = (source.format.clone(), source.id);
        let mut how = self.engine();
        (how.writable, how.discard_freed) = (false, false);
        let old = open_disk(source, &how).map_err(|e| Error::from_cause(path, SNAPSHOTTING, e))?;
        let name = FileResolver::new(new, Policy::Deny).name_for(path);
        let name = name.map_err(|e| Error::from_cause(path, SNAPSHOTTING, e))?;
        let file = OverlayFile { path: new, in_use: [id], made: Mutex::default() };
        snapshot::external(&*old, &format, &name, &file).map_err(failed)?;
        file.keep();
        Ok(())
    }
}

const COMMITTING: &str = "committing the image";
const REBASING: &str = "rebasing the image";
const SNAPSHOTTING: &str = "creating an external snapshot";

/// Opens the layers of the image at `path`, as the options allow.
struct Layered<'a> {
    path: &'a Path,
    options: DiskOptions,
}

impl Layered<'_> {
    fn open_named(above: &ResolvedSource, writable: bool) -> Result<Option<ResolvedSource>, CallerError> {
        if above.format != ImageFormat::Qcow2 {
            return Ok(None);
        }
        let header = read_header(&*above.storage)?;
        let Some(name) = header.backing_file_name().filter(|name| !name.is_empty()) else { return Ok(None) };
        let format = header.extensions.backing_format_name();
        let reference = Reference::Backing { name: &name, format: format.as_deref() };
        Ok(Some(above.resolver.resolve(reference, writable).map_err(qcow2_core::Error::from)?))
    }
}

impl OpenChain for Layered<'_> {
    fn open_top(&self) -> Result<ResolvedSource, CallerError> {
        Ok(self.options.open_file(self.path)?)
    }

    fn look_below(
        &self,
        above: &ResolvedSource,
        _: usize,
        base: Option<&str>,
    ) -> Result<NextLayer, CallerError> {
        let Some(base) = base.map(Path::new) else {
            // Without a base the layer directly below is the target, and `open_below` reports a file that is
            // missing.
            let named = above.format == ImageFormat::Qcow2
                && read_header(&*above.storage)?.backing_file_name().is_some_and(|name| !name.is_empty());
            return Ok(if named { NextLayer::Base } else { NextLayer::None });
        };
        let Some(below) = Self::open_named(above, false)? else { return Ok(NextLayer::None) };
        let is_base = base
            .canonicalize()
            .is_ok_and(|base| Path::new(&below.name).canonicalize().is_ok_and(|below| below == base));
        Ok(if is_base { NextLayer::Base } else { NextLayer::Middle })
    }

    fn open_below(
        &self,
        above: &ResolvedSource,
        _: usize,
        writable: bool,
    ) -> Result<ResolvedSource, CallerError> {
        let missing = || {
            qcow2_core::Error::new(qcow2_core::ErrorKind::Chain, "the image no longer names a backing file")
        };
        Ok(Self::open_named(above, writable)?.ok_or_else(missing)?)
    }

    fn open_layer(
        &self,
        source: ResolvedSource,
        _: usize,
        role: LayerRole,
    ) -> Result<Arc<dyn GuestDisk>, CallerError> {
        let mut how = self.options.engine();
        if role == LayerRole::Middle {
            (how.writable, how.discard_freed) = (false, false);
        }
        if role != LayerRole::Base {
            how.layers = Layers::NoBacking;
        }
        Ok(open_disk(source, &how)?)
    }
}

/// Opens the new backing file of a rebase. The caller named it, so no policy applies to it.
struct Onto<'a> {
    overlay: &'a Path,
    options: &'a DiskOptions,
    new: Option<(&'a str, ImageFormat)>,
}

impl NewBacking for Onto<'_> {
    fn is_format(&self, format: &str) -> bool {
        matches!(format, "qcow2" | "raw" | "luks")
    }

    fn open(&self) -> Result<Chain, CallerError> {
        let (name, format) = self.new.clone().unwrap_or(("", ImageFormat::Raw));
        let path = FileResolver::new(self.overlay, Policy::Deny)
            .locate(Reference::Backing { name, format: None })
            .map_err(qcow2_core::Error::from)?;
        let options = self.options.clone().format(format);
        let mut how = options.engine();
        (how.writable, how.discard_freed) = (false, false);
        Ok(Chain::new(open_disk(options.open_backing(&path)?, &how)?))
    }
}

/// The file of a new overlay, deleted unless it is kept.
struct OverlayFile<'a> {
    path: &'a Path,
    in_use: [Option<qcow2_core::SourceId>; 1],
    made: Mutex<Option<NewFile>>,
}

impl OverlayFile<'_> {
    fn take(&self) -> Option<NewFile> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn keep(&self) {
        self.take().into_iter().for_each(NewFile::keep);
    }
}

impl NewStorage for OverlayFile<'_> {
    fn make(&self) -> Result<Arc<dyn Storage>, CallerError> {
        let file = NewFile::open(self.path, false, &self.in_use)?;
        let storage = Arc::clone(&file.source().storage);
        *self.made.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
        Ok(storage)
    }

    fn discard(&self) {
        drop(self.take());
    }
}
