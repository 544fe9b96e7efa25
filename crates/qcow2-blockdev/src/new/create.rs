//! The making of an image: files made and emptied, devices and servers' disks fitted, what fails undone.

use super::encryption::Encryption;
use super::failure::{CreateFailure, CreateFailureKind};
use super::file::NewFile;
use super::format::bytes_driver;
use super::options::NewOptions;
use super::qcow2::{data_file, plan};
use super::target::NewTarget;
use super::unfinished::Unfinished;
use crate::driver::{Driver, is_device};
use crate::failure::FailureKind;
use crate::keys::Secrets;
use crate::open::{Follow, OpenOptions, open_existing};
use crate::tree::Node;
use crate::warning::Warning;
use qcow2_core::format::FormatErrorKind;
use qcow2_core::{
    BackingName, CreateOptions, HostOffset, ImageFormat, NewEncryption, Preallocation, RawOptions, Refusal,
    Storage, ZeroMode, create_container, create_raw, find_cause,
};
use qcow2_io::{Create, FileStorage, OpenFile, OpenFiles, OsError, SourceError, path_of};
use qcow2_ops::{CallerError, NewStorage};
use std::collections::VecDeque;
use std::sync::Arc;

/// What making an image takes besides its name and options.
#[derive(Default)]
pub struct CreateHow<'a> {
    secrets: Secrets,
    open_files: Option<OpenFiles>,
    unfinished: Unfinished,
    tell: Option<&'a dyn Fn(&Warning)>,
    agree: Option<&'a dyn Fn() -> bool>,
}

impl<'a> CreateHow<'a> {
    /// No secrets, nobody to warn.
    pub fn new() -> Self {
        Self::default()
    }

    /// With the secrets that options name.
    #[must_use]
    pub fn with_secrets(self, secrets: &Secrets) -> Self {
        Self { secrets: secrets.clone(), ..self }
    }

    /// With the files that are open meanwhile, none of which is written over.
    #[must_use]
    pub fn among(self, open_files: &OpenFiles) -> Self {
        Self { open_files: Some(open_files.clone()), ..self }
    }

    /// With a list that the files are on from the moment on that they are written. When the image is made
    /// they are still on it: their content may be to come.
    #[must_use]
    pub fn with_unfinished(self, unfinished: &Unfinished) -> Self {
        Self { unfinished: unfinished.clone(), ..self }
    }

    /// With somebody who may refuse, asked when all else is checked and nothing written yet.
    #[must_use]
    pub fn if_agreed(self, agree: &'a dyn Fn() -> bool) -> Self {
        Self { agree: Some(agree), ..self }
    }

    fn check_agreed(&self) -> Made<()> {
        match self.agree {
            Some(agree) if !agree() => Err(CreateFailureKind::Disagreed),
            _ => Ok(()),
        }
    }

    /// With somebody who hears what is worth a word though nothing has failed.
    #[must_use]
    pub fn telling(self, tell: &'a dyn Fn(&Warning)) -> Self {
        Self { tell: Some(tell), ..self }
    }
}

/// Makes the image that `options` describe at `target`, durably. Disk: makes or empties its files once
/// everything that can be checked beforehand is. If that fails, new files are deleted, and emptied ones stay
/// empty, as does everything else on the list of unfinished files.
///
/// ```
/// use qcow2_blockdev::{CreateHow, KeyValues, NewOptions, NewTarget, create};
/// use qcow2_core::ImageFormat;
///
/// # let folder = std::env::temp_dir().join(format!("qcow2-blockdev-new-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder)?;
/// let path = folder.join("disk.qcow2");
/// let list = KeyValues::parse_image_options(&["size=1G,cluster_size=1M".to_owned()]);
/// let options = NewOptions::parse(&ImageFormat::Qcow2, &list)?;
/// let target = NewTarget::parse(&path.to_string_lossy())?;
/// create(&target, &options, &CreateHow::new())?;
/// assert!(std::fs::read(&path)?.starts_with(b"QFI\xfb"));
/// # std::fs::remove_dir_all(&folder)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn create(target: &NewTarget, options: &NewOptions, how: &CreateHow<'_>) -> Result<(), CreateFailure> {
    make(target, options, how).map_err(|kind| {
        how.unfinished.discard();
        CreateFailure::new(options.format(), kind)
    })
}

/// The file of an image that a procedure makes, in the layout of all new images.
pub struct NewImageFile<'a> {
    path: &'a str,
    files: Files<'a>,
}

impl<'a> NewImageFile<'a> {
    /// A file to be made at `path`.
    pub fn new(path: &'a str, how: &'a CreateHow<'a>) -> Self {
        let layout = Layout { extent_size: (Layout::EXTENT_SIZE, false), no_cow: false };
        Self { path, files: Files { how, layout } }
    }

    /// The failure that `error` of the procedure is. `backing`: the backing file that the image was to
    /// record. Errors: `error` itself, if it is about something else than the new image.
    pub fn failure(
        &self,
        error: qcow2_ops::Error,
        backing: BackingName,
    ) -> Result<CreateFailure, qcow2_ops::Error> {
        if let Some(&refusal) = find_cause::<Refusal>(&error) {
            return Ok(of_image(CreateFailureKind::Refused(refusal)));
        }
        let error = match error.caller_error::<CreateFailure>() {
            Ok(failure) => return Ok(failure),
            Err(error) => error,
        };
        let mut new = CreateOptions::new(0);
        (new.backing_file, new.backing_format) = (Some(backing.name), backing.format);
        error.caller_error::<qcow2_core::Error>().map(|error| of_image(of_qcow2(new, error)))
    }
}

impl NewStorage for NewImageFile<'_> {
    fn make(&self) -> Result<Arc<dyn Storage>, CallerError> {
        let mut prepared = Prepared::default();
        let made = prepared
            .add(self.path, &self.files.how.unfinished)
            .and_then(|()| self.files.open_empty(&mut prepared));
        Ok(made.inspect_err(|_| self.discard()).map_err(of_image)?)
    }

    fn discard(&self) {
        self.files.how.unfinished.discard();
    }
}

fn of_image(kind: CreateFailureKind) -> CreateFailure {
    CreateFailure::new(&ImageFormat::Qcow2, kind)
}

type Made<T> = Result<T, CreateFailureKind>;

fn make(target: &NewTarget, options: &NewOptions, how: &CreateHow<'_>) -> Made<()> {
    let path = match target {
        NewTarget::File(path) => path,
        NewTarget::Existing(node) => return make_in_existing(node, options, how),
        NewTarget::OutOfReach { driver, reason } => {
            return Err(CreateFailureKind::OutOfReach { driver: *driver, reason: Arc::clone(reason) });
        }
    };
    let files = Files { how, layout: Layout::of(options)? };
    match options.format() {
        ImageFormat::Raw => make_raw(path, options, &files),
        ImageFormat::Qcow2 => make_qcow2(path, options, &files),
        ImageFormat::Luks => make_container(path, options, &files),
        format if bytes_driver(format).is_some() => make_raw(path, options, &files),
        _ => Err(CreateFailureKind::UnknownFormat),
    }
}

fn make_raw(path: &str, options: &NewOptions, files: &Files<'_>) -> Made<()> {
    let raw = RawOptions { size: size(options), preallocation: options.preallocation()? };
    let mut prepared = Prepared::default();
    prepared.add(path, &files.how.unfinished)?;
    if !is_device(path) {
        raw.check().map_err(CreateFailureKind::Refused)?;
    }
    let storage = files.open_empty(&mut prepared)?;
    if is_device(path) {
        let driver = bytes_driver(options.format()).unwrap_or(Driver::HostDevice);
        return fit_raw(&*storage, &raw, driver);
    }
    create_raw(&storage, &raw).map_err(|error| of_raw(&raw, error))
}

fn make_qcow2(path: &str, options: &NewOptions, files: &Files<'_>) -> Made<()> {
    let mut prepared = Prepared::default();
    prepared.add(path, &files.how.unfinished)?;
    let data_path = data_file(options);
    if let Some(name) = options.text("data_file").filter(|name| !name.is_empty()) {
        match NewTarget::parse(name).map_err(|reason| CreateFailureKind::DataFileName(Arc::new(reason)))? {
            NewTarget::File(_) => {}
            NewTarget::Existing(_) => return Err(CreateFailureKind::DataFileOnServer),
            NewTarget::OutOfReach { driver, reason } => {
                return Err(CreateFailureKind::OutOfReach { driver, reason });
            }
        }
    }
    data_path.map(|path| prepared.add(path, &files.how.unfinished)).transpose()?;
    let new = plan(options, &files.how.secrets)?;
    let storage = files.open_empty(&mut prepared)?;
    let data = data_path.map(|_| files.open_empty(&mut prepared)).transpose()?;
    qcow2_core::create(&storage, data.as_ref(), &new).map_err(|error| of_qcow2(new, error))
}

/// A container: the header, and behind it as much as the disk has.
fn make_container(path: &str, options: &NewOptions, files: &Files<'_>) -> Made<()> {
    let mut prepared = Prepared::default();
    prepared.add(path, &files.how.unfinished)?;
    let (raw, encryption) = plan_container(options, files.how)?;
    let refusal = match raw.preallocation {
        mode @ (Preallocation::Falloc | Preallocation::Full) if is_device(path) => {
            Err(Refusal::PreallocationOnDevice(mode))
        }
        _ => raw.check_container(),
    };
    refusal.map_err(CreateFailureKind::Refused)?;
    let encryption = encryption.make()?;
    let storage = files.open_empty(&mut prepared)?;
    if is_device(path) {
        fit(&*storage, raw.size, Driver::HostDevice)?;
    }
    write_container(&storage, &raw, &encryption)
}

/// A server's disk is there already: it must be large enough, and loses the beginning that an older image may
/// have.
fn make_in_existing(node: &Node, options: &NewOptions, how: &CreateHow<'_>) -> Made<()> {
    let mut opening = OpenOptions::new().with_follow(Follow::All);
    opening.open_files = how.open_files.clone();
    let storage = open_existing(node, &opening).map_err(|failure| CreateFailureKind::OutOfReach {
        driver: node.driver(),
        reason: Arc::new(failure.into_kind()),
    })?;
    match options.format() {
        ImageFormat::Luks => {
            let (raw, encryption) = plan_container(options, how)?;
            how.check_agreed()?;
            fit(&*storage, raw.size, Driver::Nbd)?;
            write_container(&storage, &RawOptions { size: 0, ..raw }, &encryption.make()?)
        }
        ImageFormat::Qcow2 if options.given("data_file") => Err(CreateFailureKind::DataFileOnServer),
        ImageFormat::Qcow2 => {
            let new = plan(options, &how.secrets)?;
            how.check_agreed()?;
            qcow2_core::create(&storage, None, &new).map_err(|error| of_qcow2(new, error))
        }
        _ => {
            let raw = RawOptions { size: size(options), preallocation: options.preallocation()? };
            fit_raw(&*storage, &raw, Driver::Nbd)
        }
    }
}

fn size(options: &NewOptions) -> u64 {
    options.number("size").unwrap_or(0)
}

/// The file of a container, header included, and its encryption.
fn plan_container(options: &NewOptions, how: &CreateHow<'_>) -> Made<(RawOptions, Encryption)> {
    let encryption = Encryption::of_container(options, &how.secrets)?;
    let preallocation = options.preallocation()?;
    let size = size(options).saturating_add(encryption.area_len());
    Ok((RawOptions { size, preallocation }, encryption))
}

fn write_container(storage: &Arc<dyn Storage>, raw: &RawOptions, encryption: &NewEncryption) -> Made<()> {
    let NewEncryption::Luks(area) = encryption else { return Ok(()) };
    create_container(storage, raw, area).map_err(|error| of_raw(raw, error))
}

/// Like [`fit`], and the first sector is zeroed: what was there before must not pass for an image.
fn fit_raw(storage: &dyn Storage, raw: &RawOptions, driver: Driver) -> Made<()> {
    if raw.preallocation != Preallocation::Off {
        return Err(CreateFailureKind::NothingToPreallocate(raw.preallocation));
    }
    fit(storage, raw.size, driver)?;
    let forget = || {
        storage.write_zeroes(HostOffset::new(0), storage.len()?.min(SECTOR), ZeroMode::MayUnmap)?;
        storage.flush()
    };
    forget().map_err(CreateFailureKind::Storage)
}

const SECTOR: u64 = 512;

/// What is there already is taken as it is, if it is large enough.
fn fit(storage: &dyn Storage, size: u64, driver: Driver) -> Made<()> {
    match storage.len() {
        Ok(len) if len >= size => Ok(()),
        Ok(_) => Err(CreateFailureKind::TooSmall(driver)),
        Err(error) => Err(CreateFailureKind::Storage(error)),
    }
}

fn of_raw(raw: &RawOptions, error: qcow2_core::Error) -> CreateFailureKind {
    CreateFailureKind::Writing { preallocation: raw.preallocation, in_image: false, error }
}

/// What the engine's error on a new image is: its layout may turn out impossible, a name may not fit.
fn of_qcow2(new: CreateOptions, error: qcow2_core::Error) -> CreateFailureKind {
    if let Some(&refusal) = find_cause::<Refusal>(&error) {
        return CreateFailureKind::Refused(refusal);
    }
    match error.format_error().map(|error| error.kind()) {
        Some(FormatErrorKind::HeaderFull { .. } | FormatErrorKind::BackingNameTooLong(_)) => {
            let format = new.backing_format;
            let backing = new.backing_file.map(|name| BackingName { name, format });
            CreateFailureKind::Name { backing, error }
        }
        _ => {
            let (preallocation, in_image) = (new.preallocation, new.data_file.is_none());
            CreateFailureKind::Writing { preallocation, in_image, error }
        }
    }
}

/// Files that can be written to and were not touched yet. The ones made for it are on the list of unfinished
/// files, which takes them away if the image is not made.
#[derive(Default)]
struct Prepared<'a>(VecDeque<(&'a str, NewFile)>);

impl<'a> Prepared<'a> {
    fn add(&mut self, path: &'a str, unfinished: &Unfinished) -> Made<()> {
        let file = unfinished.prepare(&path_of(path)).map_err(|error| CreateFailureKind::NotWritable {
            path: path.to_owned(),
            error: OsError::new(error),
        })?;
        self.0.push_back((path, file));
        Ok(())
    }
}

/// How the files of a new image are to lie on the disk.
struct Layout {
    /// Bytes that the file system is to take at once for a file, and whether somebody asked for that.
    extent_size: (u32, bool),
    no_cow: bool,
}

impl Layout {
    /// QEMU's default, which only XFS heeds.
    const EXTENT_SIZE: u32 = 1 << 20;

    fn of(options: &NewOptions) -> Made<Self> {
        let extent_size = match options.number("extent_size_hint") {
            None => (Self::EXTENT_SIZE, false),
            Some(asked) => {
                (u32::try_from(asked).map_err(|_| CreateFailureKind::ExtentSizeHint(asked))?, true)
            }
        };
        Ok(Self { extent_size, no_cow: options.switch("nocow") })
    }
}

/// What opening a new file takes.
struct Files<'a> {
    how: &'a CreateHow<'a>,
    layout: Layout,
}

impl Files<'_> {
    /// Opens the next of the prepared files for writing and empties it; from here on a failure takes it away.
    fn open_empty(&self, prepared: &mut Prepared<'_>) -> Made<Arc<dyn Storage>> {
        self.how.check_agreed()?;
        let Some(&(path, _)) = prepared.0.front() else { unreachable!("more files opened than prepared") };
        let mut opening = OpenFile::writable().with_create(Create::Truncate);
        opening.allow_characters = true;
        if let Some(files) = &self.how.open_files {
            opening = opening.among(files);
        }
        let storage = opening.open_file(&path_of(path)).map_err(|error| {
            let (path, error) = (path.to_owned(), Box::new(SourceError::Open(error)));
            match is_device(&path) {
                true => CreateFailureKind::OutOfReach {
                    driver: Driver::HostDevice,
                    reason: Arc::new(FailureKind::File { path, error }),
                },
                false => CreateFailureKind::File { path, error },
            }
        })?;
        prepared.0.pop_front().into_iter().for_each(|(_, file)| self.how.unfinished.add(file));
        if storage.is_regular() {
            self.lay_out(&storage);
        }
        Ok(Arc::new(storage))
    }

    /// Tells the file system of an empty file. That it does not listen is no failure, and is said where
    /// somebody asked for it.
    fn lay_out(&self, file: &FileStorage) {
        if self.layout.no_cow {
            let _ = file.set_no_cow();
        }
        let (bytes, asked) = self.layout.extent_size;
        match (file.set_extent_size_hint(bytes), self.how.tell) {
            (Err(error), Some(tell)) if asked && bytes > 0 => {
                tell(&Warning::NoExtentSizeHint(Arc::new(OsError::new(error))));
            }
            _ => {}
        }
    }
}
