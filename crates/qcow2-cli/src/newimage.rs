//! Making a new image from options: shared by `create` and `convert`.
//!
//! Nothing that was there before is touched until the options are known to be possible; what was made for an
//! image that fails is taken away.

use crate::crypt::{LUKS_NAMES, NewCrypt, QCOW2_NAMES, read_options};
use crate::drivers;
use crate::failure::Failure;
use crate::files::open_files;
use crate::imageopts::{ImageOptions, TargetFormat};
use crate::interrupt::Interrupts;
use crate::persona;
use crate::session::Session;
use qcow2_blockdev::{
    FailureKind, Follow, NewFile, NewTarget, Node, OpenOptions, is_block_device, open_existing,
};
use qcow2_core::format::{CompressionType, FormatErrorKind, Version};
use qcow2_core::{BackingName, NewEncryption, Preallocation, Storage, StorageError};
use qcow2_io::{Create, FileStorage, OpenFile, SourceError, os_error_text};
use qcow2_ops::create::{Qcow2Request, RawRequest, Refusal, plan, plan_raw};
use qcow2_ops::resize::MAX_DISK_SIZE;
use qcow2_ops::{CallerError, NewStorage};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// The format of a new image for which none was given: raw, as qemu-img has it; under our own name what the
/// ending of its name says. Errors: an ending of a format that is not made here, which raw bytes would belie.
pub(crate) fn format_of_name(session: &Session, filename: &str) -> Result<&'static str, Failure> {
    if session.is_drop_in() {
        return Ok("raw");
    }
    let ending = Path::new(filename).extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    match &*ending {
        "qcow2" => Ok("qcow2"),
        "luks" => Ok("luks"),
        "vmdk" | "vdi" | "vhd" | "vpc" | "vhdx" | "qed" | "qcow" | "parallels" => {
            let text =
                format!("no {ending} images can be made; for another format name it (raw, qcow2, luks)");
            Err(Failure::new(text))
        }
        _ => Ok("raw"),
    }
}

/// An image that was not made.
#[derive(Debug)]
pub(crate) struct NotMade {
    failure: Box<Failure>,
    /// Whether the file would be longer than its file system allows, and nothing else says so.
    too_long: bool,
}

impl NotMade {
    /// Why, as `create` says it, which has words of its own for what is too long.
    pub(crate) fn in_short(self, format: TargetFormat) -> Failure {
        if !self.too_long {
            return *self.failure;
        }
        let hint = if format == TargetFormat::Qcow2 { " (try using a larger cluster size)" } else { "" };
        Failure::new(format!("The image size is too large for file format '{}'{hint}", format.name()))
    }
}

impl From<Failure> for NotMade {
    fn from(failure: Failure) -> Self {
        Self { failure: Box::new(failure), too_long: false }
    }
}

impl From<NotMade> for Failure {
    fn from(not_made: NotMade) -> Self {
        *not_made.failure
    }
}

/// Of a container.
const TOO_LARGE: &str = "The requested file size is too large";

/// Makes the image that `target` names as `options` say. The files are noted with `interrupts` until they are
/// finished there. Errors: in QEMU's words, without the file's name.
pub(crate) fn make(
    session: &Session,
    target: &NewTarget,
    options: &ImageOptions,
    interrupts: &Interrupts,
) -> Result<(), NotMade> {
    let path = match target {
        NewTarget::File(path) => path,
        NewTarget::Existing(node) => return make_in_existing(node, options),
        NewTarget::OutOfReach { driver, reason } => {
            return Err(not_opened(driver.name(), &persona::in_one_line(reason)).into());
        }
    };
    let files = Files { session, interrupts, layout: Layout::of(options)? };
    match options.format() {
        TargetFormat::Raw => make_raw(path, options, &files),
        TargetFormat::Qcow2 => make_qcow2(path, options, &files),
        TargetFormat::Luks => make_luks(path, options, &files),
    }
}

/// A container: the header, and behind it as much as the disk has.
fn make_luks(path: &str, options: &ImageOptions, files: &Files<'_>) -> Result<(), NotMade> {
    let file = prepare(path)?;
    let planned = luks_request(options).and_then(|(request, crypt)| match plan_raw(&request) {
        Err(refusal) => Err(Failure::new(container_refusal(&refusal))),
        Ok(()) if request.size > MAX_DISK_SIZE => Err(Failure::new(exceeds(request.size))),
        Ok(()) => Ok((request, crypt.make()?)),
    });
    let (request, encryption) = match planned {
        Ok(planned) => planned,
        Err(failure) => {
            file.undo();
            return Err(failure.into());
        }
    };
    let storage = files.open_empty(path, file)?;
    if is_block_device(path) {
        fit_device(&*storage, request.size, "device files")?;
    }
    make_container(&storage, &request, &encryption)
}

/// Why a container cannot be, in QEMU's words.
fn container_refusal(refusal: &Refusal) -> String {
    match refusal {
        Refusal::SizeTooLarge(_) => TOO_LARGE.to_owned(),
        other => persona::refusal(other),
    }
}

fn exceeds(size: u64) -> String {
    format!("offset({}) exceeds maximum({MAX_DISK_SIZE})", size.next_multiple_of(512))
}

/// The whole container as a file, and its encryption.
fn luks_request(options: &ImageOptions) -> Result<(RawRequest, NewCrypt), Failure> {
    let crypt = read_options(options, "luks", &LUKS_NAMES, options.objects())?.with_secret()?;
    let preallocation =
        preallocation(options).map_err(|text| Failure::new(format!("invalid parameter value: {text}")))?;
    let size = options.number("size").unwrap_or(0).saturating_add(crypt.area_len());
    Ok((RawRequest { size, preallocation }, crypt))
}

fn make_container(
    storage: &Arc<dyn Storage>,
    request: &RawRequest,
    encryption: &NewEncryption,
) -> Result<(), NotMade> {
    let NewEncryption::Luks(area) = encryption else { return Ok(()) };
    qcow2_ops::create::create_container(storage, request, area).map_err(|error| {
        let not_made = failed(&error, &persona::no_space(request.preallocation, false), "");
        if not_made.too_long { Failure::new(TOO_LARGE).into() } else { not_made }
    })
}

/// How the new image is to be encrypted, if it is. Errors: in QEMU's words, nothing having been made; not
/// that the secret is not named, which is said last.
fn new_crypt(options: &ImageOptions) -> Result<Option<NewCrypt>, Failure> {
    let format = match options.text("encrypt.format") {
        Some(_) if options.given("encryption") => {
            let text = "'encrypt.format' and its alias 'encryption' can't be used at the same time";
            return Err(Failure::new(text));
        }
        Some(format @ ("luks" | "aes")) => format,
        Some(other) => {
            return Err(Failure::new(format!("Parameter 'format' does not accept value '{other}'")));
        }
        None if options.switch("encryption") => "aes",
        None if QCOW2_NAMES.iter().any(|name| options.given(name)) => {
            return Err(Failure::new("Parameter 'encrypt.format' is missing"));
        }
        None => return Ok(None),
    };
    read_options(options, format, &QCOW2_NAMES, options.objects()).map(Some)
}

fn make_raw(path: &str, options: &ImageOptions, files: &Files<'_>) -> Result<(), NotMade> {
    let size = options.number("size").unwrap_or(0);
    let preallocation =
        preallocation(options).map_err(|text| Failure::new(format!("invalid parameter value: {text}")))?;
    let request = RawRequest { size, preallocation };
    let file = prepare(path)?;
    if let Err(refusal) = plan_raw(&request) {
        file.undo();
        return Err(Failure::new(match refusal {
            Refusal::SizeTooLarge(_) => "Could not resize file: Invalid argument".to_owned(),
            other => persona::refusal(&other),
        })
        .into());
    }
    let storage = files.open_empty(path, file)?;
    if is_block_device(path) {
        return Ok(fit_device(&*storage, size, "device files")?);
    }
    let step = persona::no_space(preallocation, false);
    qcow2_ops::create_raw(&storage, &request).map_err(|error| failed(&error, &step, ""))
}

/// A server's disk is there already: it must be large enough, and loses the beginning that an older image may
/// have.
fn make_in_existing(node: &Node, options: &ImageOptions) -> Result<(), NotMade> {
    let size = options.number("size").unwrap_or(0);
    let how = OpenOptions::new().with_follow(Follow::All).among(open_files());
    let unreachable = |kind: &FailureKind| not_opened(node.driver().name(), &persona::in_one_line(kind));
    let storage = open_existing(node, &how).map_err(|failure| unreachable(failure.kind()))?;
    match options.format() {
        TargetFormat::Raw => Ok(fit_device(&*storage, size, "NBD nodes")?),
        TargetFormat::Luks => {
            let (request, crypt) = luks_request(options)?;
            fit_device(&*storage, request.size, "NBD nodes")?;
            make_container(&storage, &RawRequest { size: 0, ..request }, &crypt.make()?)
        }
        TargetFormat::Qcow2 => {
            if options.text("data_file").is_some() {
                return Err(Failure::new("A data file is a file beside the image, which is none here").into());
            }
            let request = planned(options)?;
            qcow2_ops::create(&storage, None, &request)
                .map_err(|error| failed(&error, &step_words(&request), &backing_words(&request)))
        }
    }
}

fn not_opened(driver: &str, reason: &str) -> Failure {
    Failure::new(format!(
        "Protocol driver '{driver}' does not support creating new images, \
         so an existing image must be selected as the target; \
         however, opening the given target as an existing image failed: {reason}"
    ))
}

/// A raw image on a device is the device as it is, if that is large enough.
fn fit_device(device: &dyn Storage, size: u64, what: &str) -> Result<(), Failure> {
    match device.len() {
        Ok(len) if len >= size => Ok(()),
        Ok(_) => Err(Failure::new(format!("Cannot grow {what}"))),
        Err(error) => Err(Failure::new(persona::storage(&error))),
    }
}

fn make_qcow2(path: &str, options: &ImageOptions, files: &Files<'_>) -> Result<(), NotMade> {
    let file = prepare(path)?;
    let data_path = options.text("data_file").map(|name| name.strip_prefix("file:").unwrap_or(name));
    let data_file = match data_path.map(prepare).transpose() {
        Ok(data_file) => data_file,
        Err(failure) => {
            file.undo();
            return Err(failure.into());
        }
    };
    let request = match planned(options) {
        Ok(request) => request,
        Err(failure) => {
            file.undo();
            data_file.into_iter().for_each(NewFile::undo);
            return Err(failure.into());
        }
    };
    let storage = files.open_empty(path, file)?;
    let data = match data_path.zip(data_file) {
        Some((path, file)) => Some(files.open_empty(path, file)?),
        None => None,
    };
    qcow2_ops::create(&storage, data.as_ref(), &request)
        .map_err(|error| failed(&error, &step_words(&request), &backing_words(&request)))
}

/// Everything that is known to be possible, the encryption header included, which takes its time.
fn planned(options: &ImageOptions) -> Result<Qcow2Request, Failure> {
    let (mut request, crypt) = qcow2_request(options)?;
    request.encrypted = crypt.is_some();
    plan(&request).map_err(|refusal| Failure::new(persona::refusal(&refusal)))?;
    request.encryption = crypt.map(|crypt| crypt.make()).transpose()?;
    Ok(request)
}

/// Reads the options that name one of several choices, in QEMU's order.
fn qcow2_request(options: &ImageOptions) -> Result<(Qcow2Request, Option<NewCrypt>), Failure> {
    let no_such =
        |name: &str, value: &str| Failure::new(format!("Parameter '{name}' does not accept value '{value}'"));
    let mut request = Qcow2Request::new(options.number("size").unwrap_or(0));
    request.version = match options.text("compat") {
        None | Some("1.1" | "v3") => Version::V3,
        Some("0.10" | "v2") => Version::V2,
        Some(other) => return Err(no_such("version", other)),
    };
    request.backing_file = options.text("backing_file").map(str::to_owned);
    request.backing_format = options.text("backing_fmt").map(str::to_owned);
    if let Some(other) = request.backing_format.as_ref().filter(|name| !drivers::may_be_recorded(name)) {
        return Err(no_such("backing-fmt", other));
    }
    let crypt = new_crypt(options)?;
    request.cluster_size = options.number("cluster_size").unwrap_or(request.cluster_size);
    request.preallocation = preallocation(options).map_err(|text| no_such("preallocation", &text))?;
    request.lazy_refcounts = options.switch("lazy_refcounts");
    request.refcount_bits = options.number("refcount_bits").unwrap_or(request.refcount_bits);
    request.extended_l2 = options.switch("extended_l2");
    request.compression_type = match options.text("compression_type") {
        None | Some("zlib") => CompressionType::Deflate,
        Some("zstd") => CompressionType::Zstd,
        Some(other) => return Err(no_such("compression-type", other)),
    };
    let data_file = options.text("data_file");
    request.data_file = data_file.map(|name| name.strip_prefix("file:").unwrap_or(name).to_owned());
    request.data_file_raw = options.switch("data_file_raw");
    Ok((request, crypt))
}

fn preallocation(options: &ImageOptions) -> Result<Preallocation, String> {
    match options.text("preallocation") {
        None | Some("off") => Ok(Preallocation::Off),
        Some("metadata") => Ok(Preallocation::Metadata),
        Some("falloc") => Ok(Preallocation::Falloc),
        Some("full") => Ok(Preallocation::Full),
        Some(other) => Err(other.to_owned()),
    }
}

fn prepare(path: &str) -> Result<NewFile, Failure> {
    NewFile::prepare(Path::new(path)).map_err(|error| {
        let reason = error.raw_os_error().map_or_else(|| error.to_string(), os_error_text);
        Failure::new(format!("Could not create '{path}': {reason}"))
    })
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

    fn of(options: &ImageOptions) -> Result<Self, Failure> {
        let asked = options.number("extent_size_hint").map(u32::try_from).transpose();
        let asked = asked.map_err(|_| Failure::new("Extent size hint is too large"))?;
        let extent_size = (asked.unwrap_or(Self::EXTENT_SIZE), asked.is_some());
        Ok(Self { extent_size, no_cow: options.switch("nocow") })
    }
}

/// What opening a new file takes.
struct Files<'a> {
    session: &'a Session,
    interrupts: &'a Interrupts,
    layout: Layout,
}

impl Files<'_> {
    /// Opens `path` for writing and empties it; from here on a failure takes it away.
    fn open_empty(&self, path: &str, file: NewFile) -> Result<Arc<dyn Storage>, Failure> {
        let how = OpenFile::writable().with_create(Create::Truncate).among(open_files());
        match how.open_file(Path::new(path)) {
            Ok(storage) => {
                self.interrupts.add_file(file);
                if storage.is_regular() {
                    self.lay_out(&storage);
                }
                Ok(Arc::new(storage))
            }
            Err(error) => {
                file.undo();
                let (reason, hint) = persona::source_reason(&SourceError::Open(error), path);
                let failure = match is_block_device(path) {
                    true => not_opened("host_device", &reason),
                    false => Failure::new(reason),
                };
                Err(hint.into_iter().fold(failure, Failure::hint))
            }
        }
    }

    /// Tells the file system of an empty file. That it does not listen is no failure, and is said where
    /// somebody asked for it.
    fn lay_out(&self, file: &FileStorage) {
        if self.layout.no_cow {
            let _ = file.set_no_cow();
        }
        let (bytes, asked) = self.layout.extent_size;
        match file.set_extent_size_hint(bytes) {
            Err(error) if asked && bytes > 0 => {
                let reason = error.raw_os_error().map_or_else(|| error.to_string(), os_error_text);
                self.session.warn(&format!("Failed to set extent size hint: {reason}"));
            }
            _ => {}
        }
    }
}

/// The file of an image that a procedure makes, in the usual layout.
pub(crate) struct NewImageFile<'a> {
    files: Files<'a>,
    path: &'a str,
}

impl<'a> NewImageFile<'a> {
    /// A file that is to be made at `path`.
    pub(crate) fn new(session: &'a Session, interrupts: &'a Interrupts, path: &'a str) -> Self {
        let layout = Layout { extent_size: (Layout::EXTENT_SIZE, false), no_cow: false };
        Self { files: Files { session, interrupts, layout }, path }
    }

    /// The failure that `error` of the procedure is. `backing`: what the image records as its backing file.
    pub(crate) fn failure(&self, error: qcow2_ops::Error, backing: BackingName) -> Failure {
        let error = match error.caller_error::<Failure>() {
            Ok(failure) => return failure,
            Err(error) => error,
        };
        let mut request = Qcow2Request::new(0);
        (request.backing_file, request.backing_format) = (Some(backing.name), backing.format);
        failed(&error, &step_words(&request), &backing_words(&request)).into()
    }
}

impl NewStorage for NewImageFile<'_> {
    fn make(&self) -> Result<Arc<dyn Storage>, CallerError> {
        Ok(self.files.open_empty(self.path, prepare(self.path)?)?)
    }

    fn discard(&self) {
        self.files.interrupts.discard_files();
    }
}

/// A procedure that failed: a refused option, a name that does not fit (`naming` says what could not be done
/// with it), or a storage that does not take it (`step` says what).
fn failed(error: &qcow2_ops::Error, step: &str, naming: &str) -> NotMade {
    if let Some(refusal) = persona::find::<Refusal>(error) {
        return Failure::new(persona::refusal(refusal)).into();
    }
    match error.core_error().and_then(|error| error.format_error()).map(|error| error.kind()) {
        Some(FormatErrorKind::HeaderFull { .. }) => {
            Failure::new(format!("{naming}: No space left on device")).into()
        }
        Some(FormatErrorKind::BackingNameTooLong(_)) => {
            Failure::new(format!("{naming}: Invalid argument")).into()
        }
        _ => match persona::find::<StorageError>(error) {
            Some(storage) => NotMade {
                failure: Box::new(Failure::new(format!("{step}: {}", persona::storage(storage)))),
                too_long: storage.os_code().is_some_and(is_too_long),
            },
            None => Failure::new(persona::chain(error)).into(),
        },
    }
}

fn is_too_long(code: i32) -> bool {
    io::Error::from_raw_os_error(code).kind() == io::ErrorKind::FileTooLarge
}

/// What making an image comes down to where it fails.
fn step_words(request: &Qcow2Request) -> String {
    let own_file = request.data_file.is_none();
    match request.preallocation {
        Preallocation::Off if own_file => "Could not write the image".to_owned(),
        preallocation => format!("Could not resize image: {}", persona::no_space(preallocation, own_file)),
    }
}

fn backing_words(request: &Qcow2Request) -> String {
    match (&request.backing_file, &request.backing_format) {
        (Some(name), Some(format)) => {
            format!("Could not assign backing file '{name}' with format '{format}'")
        }
        _ => "Could not write the image header".to_owned(),
    }
}
