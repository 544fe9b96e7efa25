//! Creates images.

use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::names::Given;
use crate::newfile::NewFile;
use crate::options::DiskOptions;
use qcow2_core::format::CompressionType;
use qcow2_core::{
    CreateOptions, Image, ImageFormat, LuksArea, NewEncryption, OpenOptions, Preallocation, RawOptions,
    Reference, ResolvedSource, SourceId,
};
use qcow2_crypt::luks::{NewVolume, create as create_volume};
use qcow2_crypt::{CryptError, Secret};
use qcow2_io::{FileResolver, Policy, ThreadClock, file_id, random_bytes};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A builder for new images: each method sets one property; [`create`](Self::create) creates the image and
/// opens it. The defaults are those of `qemu-img create -f qcow2`: version 3, 64 KiB clusters.
///
/// ```
/// use qcow2_image::{ImageFormat, NewDisk};
///
/// let dir = tempfile::tempdir()?;
/// let base = NewDisk::raw().size(1 << 30).create(dir.path().join("base.raw"))?;
/// base.write_at(0, b"from below")?;
/// base.close()?;
///
/// let overlay =
///     NewDisk::qcow2().backing_file("base.raw", ImageFormat::Raw).create(dir.path().join("top.qcow2"))?;
/// let mut text = [0; 10];
/// overlay.read_at(0, &mut text)?;
/// assert_eq!((&text, overlay.size()), (b"from below", 1 << 30));
/// overlay.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is created before `create` is called"]
pub struct NewDisk {
    raw: bool,
    /// `None`: the size of the backing file, or of the disk to convert.
    size: Option<u64>,
    options: CreateOptions,
    password: Option<Secret>,
    unlock_time: Duration,
    overwrite: bool,
    /// Options for opening the backing file.
    below: DiskOptions,
}

impl NewDisk {
    /// A qcow2 image.
    pub fn qcow2() -> Self {
        Self {
            raw: false,
            size: None,
            options: CreateOptions::new(0),
            password: None,
            unlock_time: Duration::from_millis(NewVolume::default().iter_time_ms),
            overwrite: false,
            below: DiskOptions::default(),
        }
    }

    /// A raw disk: the file holds the guest disk byte for byte. [`create`](Self::create) refuses options that
    /// only qcow2 images have.
    pub fn raw() -> Self {
        Self { raw: true, ..Self::qcow2() }
    }

    /// Virtual size in bytes, rounded up to a multiple of 512. The default is the size of the backing file or
    /// of the disk to convert.
    pub fn size(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }

    /// Cluster size in bytes: a power of two from 512 to 2 MiB; default 64 KiB.
    pub fn cluster_size(mut self, cluster_size: u64) -> Self {
        self.options.cluster_size = cluster_size;
        self
    }

    /// Compresses clusters with zstd instead of deflate. It is faster in both directions, but programs from
    /// before 2020 cannot read it.
    pub fn zstd(mut self) -> Self {
        self.options.compression_type = CompressionType::Zstd;
        self
    }

    /// What to allocate up front; nothing by default.
    pub fn preallocation(mut self, preallocation: Preallocation) -> Self {
        self.options.preallocation = preallocation;
        self
    }

    /// Makes the image an overlay of the file `name`. `name` is stored unchanged; a relative name is relative
    /// to the directory of the new image. The file must exist. It is opened because you name it here; files
    /// that it names in turn are not, unless [`follow_backing_files`](Self::follow_backing_files) allows it.
    pub fn backing_file(mut self, name: impl Into<String>, format: ImageFormat) -> Self {
        self.options.backing_file = Some(name.into());
        self.below = self.below.format(format);
        self
    }

    /// Also opens the files that the backing file names. Only for backing files from a trusted source.
    pub fn follow_backing_files(self) -> Self {
        self.names(Policy::Allow)
    }

    /// Sets which files that the backing file names may be opened; none by default.
    pub fn names(mut self, policy: Policy) -> Self {
        self.below = self.below.names(policy);
        self
    }

    /// Sets a callback for the passwords of encrypted backing files; see [`DiskOptions::password_from`].
    pub fn backing_password_from(
        mut self,
        ask: impl Fn(&str) -> Option<Vec<u8>> + Send + Sync + 'static,
    ) -> Self {
        self.below = self.below.password_from(ask);
        self
    }

    /// Stores guest data in an external data file, which is created as well. `name` is stored unchanged; a
    /// relative name is relative to the directory of the new image.
    pub fn data_file(mut self, name: impl Into<String>) -> Self {
        self.options.data_file = Some(name.into());
        self
    }

    /// Encrypts the disk with LUKS, AES-256 in XTS mode, under `password`.
    pub fn password(mut self, password: impl Into<Vec<u8>>) -> Self {
        self.password = Some(Secret::new(password.into()));
        self
    }

    /// Time for one password attempt on this machine; two seconds by default, to make guessing expensive.
    /// Creating and opening the image take about as long.
    pub fn unlock_time(mut self, time: Duration) -> Self {
        self.unlock_time = time;
        self
    }

    /// Sets properties without a method of their own: the version, the refcount width, extended L2 entries, a
    /// raw data file. The size and the format of the backing file can only be set by their methods.
    ///
    /// ```
    /// # use qcow2_image::NewDisk;
    /// let new = NewDisk::qcow2().size(1 << 30).with(|options| options.extended_l2 = true);
    /// ```
    pub fn with(mut self, change: impl FnOnce(&mut CreateOptions)) -> Self {
        change(&mut self.options);
        self
    }

    /// Overwrites an existing file, which is otherwise an error.
    pub fn overwrite(mut self) -> Self {
        self.overwrite = true;
        self
    }

    /// Creates the image in a regular file at `path`, durably, and opens it for writing. If that fails, a new
    /// file is deleted, and an overwritten one is left empty.
    ///
    /// Errors: `InvalidOption` for invalid or incompatible options, before anything is written; `Exists`,
    /// `InUse`, `PermissionDenied`; for the backing file as [`DiskOptions::open`]; `NoSpace`, `Io`.
    pub fn create(&self, path: impl AsRef<Path>) -> Result<Disk> {
        let (disk, files) = self.make(path.as_ref(), None)?;
        files.into_iter().for_each(NewFile::keep);
        Ok(disk)
    }

    /// Like [`create`](Self::create), with `base` below, which is open already, for reading: neither it nor
    /// the new image is opened again. `base` may be below thousands of disks, which share all that it has
    /// cached; it stays open until the last of them is dropped. The name of its file is the one given with
    /// [`backing_file`](Self::backing_file), as a program that opens the new image later must find it; the
    /// format that is recorded is that of `base`.
    ///
    /// Errors: `InvalidOption` without a name, for a name of another file than that of `base`, for a `base`
    /// opened for writing or as a snapshot, and for an external data file; otherwise as
    /// [`create`](Self::create).
    ///
    /// ```
    /// use qcow2_image::{Disk, ImageFormat, NewDisk};
    ///
    /// let dir = tempfile::tempdir()?;
    /// Disk::create(dir.path().join("base.qcow2"), 1 << 30)?.close()?;
    /// let base = Disk::open(dir.path().join("base.qcow2"))?;
    /// let new = NewDisk::qcow2().backing_file("base.qcow2", ImageFormat::Qcow2);
    /// for id in 0..3 {
    ///     let overlay = new.create_on(dir.path().join(format!("{id}.qcow2")), &base)?;
    ///     overlay.write_at(0, &[id])?;
    ///     overlay.close()?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn create_on(&self, path: impl AsRef<Path>, base: &Disk) -> Result<Disk> {
        let path = path.as_ref();
        let refused = |why: &str| Error::new(ErrorKind::InvalidOption, path, format!("{MAKING}: {why}"));
        if self.options.data_file.is_some() || self.raw {
            return Err(refused("an overlay on an open disk is a qcow2 image without an external data file"));
        }
        if base.options.writable {
            return Err(refused("the disk below is opened for writing"));
        }
        if base.is_snapshot {
            return Err(refused("the disk below is a snapshot, which no name leads to"));
        }
        let named = |name| Reference::Backing { name, format: None };
        match self.locate(path, named, &self.options.backing_file)? {
            None => return Err(refused("the name of the backing file is not given")),
            // Without ids, as on some systems, the caller is trusted.
            Some(named) if base.source.id.is_some() && file_id(&named) != base.source.id => {
                return Err(refused("the name of the backing file is not that of the disk below"));
            }
            Some(_) => {}
        }
        let sized = self.or_size(base.size());
        let new = sized.plan(path, Some(&base.source))?;
        let file = NewFile::open(path, self.overwrite, &[base.source.id])?;
        let given = Given { backing: Some(base.source.clone()), data: None };
        let mut source = file.source().clone().with_resolver(given.into_resolver());
        source.format = ImageFormat::Qcow2;
        let options = self.engine();
        let below = Arc::clone(base.as_guest_disk());
        let image = Image::create_on(&source, &new, &options, below);
        let image = image.map_err(|cause| Error::from_cause(path, MAKING, cause))?;
        file.keep();
        Ok(Disk::new(path, image, source, options))
    }

    /// Like [`create`](Self::create), but the returned files are deleted when dropped, unless they are kept.
    /// `converted`: the source of a conversion, which must not be overwritten.
    pub(crate) fn make(&self, path: &Path, converted: Option<SourceId>) -> Result<(Disk, Vec<NewFile>)> {
        let failed = |cause| Error::from_cause(path, MAKING, cause);
        let backing = self.open_backing(path)?;
        let new = self.plan(path, backing.as_ref())?;
        let data_path = self.locate(path, |name| Reference::DataFile { name }, &new.data_file)?;
        let in_use = [converted, backing.as_ref().and_then(|backing| backing.id)];
        let file = NewFile::open(path, self.overwrite, &in_use)?;
        let in_use = [in_use[0], in_use[1], file.source().id];
        let data = data_path.map(|path| NewFile::open(&path, self.overwrite, &in_use)).transpose()?;
        let storage = Arc::clone(&file.source().storage);
        if self.raw {
            let raw = RawOptions { size: new.size, preallocation: new.preallocation };
            qcow2_core::create_raw(&storage, &raw).map_err(failed)?;
        } else {
            let data = data.as_ref().map(|data| &data.source().storage);
            qcow2_core::create(&storage, data, &new).map_err(failed)?;
        }
        let given = Given { backing, data: data.as_ref().map(|data| data.source().clone()) };
        let mut source = file.source().clone().with_resolver(given.into_resolver());
        source.format = if self.raw { ImageFormat::Raw } else { ImageFormat::Qcow2 };
        let disk = Disk::from_source(path, source, self.engine())?;
        Ok((disk, [file].into_iter().chain(data).collect()))
    }

    /// The options for opening the new image.
    fn engine(&self) -> OpenOptions {
        let mut options = self.below.clone().writable().engine();
        options.keys = self.below.passwords().clone().with_top(self.password.clone()).keyring();
        options
    }

    /// A copy with `size`, unless a size is already set.
    pub(crate) fn or_size(&self, size: u64) -> Self {
        Self { size: self.size.or(Some(size)), ..self.clone() }
    }

    /// The path for `name`, as seen from the image at `path`.
    fn locate<'a>(
        &self,
        path: &Path,
        reference: impl FnOnce(&'a str) -> Reference<'a>,
        name: &'a Option<String>,
    ) -> Result<Option<PathBuf>> {
        let Some(name) = name else { return Ok(None) };
        let located = FileResolver::new(path, Policy::Deny).locate(reference(name));
        located.map(Some).map_err(|e| Error::new(ErrorKind::InvalidOption, path, format!("{MAKING}: {e}")))
    }

    fn open_backing(&self, path: &Path) -> Result<Option<ResolvedSource>> {
        let backing = |name| Reference::Backing { name, format: None };
        let path = self.locate(path, backing, &self.options.backing_file)?;
        path.map(|path| self.below.open_backing(&path)).transpose()
    }

    /// Checks the options and creates the encryption header, which takes [`unlock_time`](Self::unlock_time).
    fn plan(&self, path: &Path, backing: Option<&ResolvedSource>) -> Result<CreateOptions> {
        let refused =
            |reason: &str| Error::new(ErrorKind::InvalidOption, path, format!("{MAKING}: {reason}"));
        let mut new = self.options.clone();
        new.size = match (self.size, backing) {
            (Some(size), _) => size,
            (None, Some(backing)) => size_of(backing).map_err(|e| Error::from_cause(path, MAKING, e))?,
            (None, None) => return Err(refused("no size is given")),
        };
        if self.password.is_some() {
            new.encryption = Some(NewEncryption::Pending);
        }
        new.backing_format = backing.map(|backing| backing.format.name().to_owned());
        let checked = if self.raw {
            let raw = RawOptions { size: new.size, preallocation: new.preallocation };
            if new != CreateOptions::new(raw.size).with_preallocation(raw.preallocation) {
                return Err(refused("a raw disk only has a size and preallocation"));
            }
            raw.check()
        } else {
            new.check()
        };
        checked.map_err(|e| Error::from_cause(path, MAKING, e))?;
        if let Some(made) = self.encryption().map_err(|e| Error::from_cause(path, MAKING, e))? {
            new.encryption = Some(made);
        }
        Ok(new)
    }

    fn encryption(&self) -> Result<Option<NewEncryption>, CryptError> {
        let Some(password) = &self.password else { return Ok(None) };
        let iter_time_ms = u64::try_from(self.unlock_time.as_millis()).unwrap_or(u64::MAX);
        let volume = NewVolume { iter_time_ms, ..NewVolume::default() };
        let clock = ThreadClock::start();
        let area = create_volume(&volume, password, &mut random_bytes, &|| clock.now())?;
        Ok(Some(NewEncryption::Luks(LuksArea(area.into()))))
    }
}

/// Virtual size of the disk in `source` in bytes; no key is needed.
fn size_of(source: &ResolvedSource) -> qcow2_ops::Result<u64> {
    qcow2_ops::info(&*source.storage, &source.format).map(|info| info.virtual_size)
}

const MAKING: &str = "creating the image";
