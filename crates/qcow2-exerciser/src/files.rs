//! Disks in files, for an [`Opener`](crate::Opener) that opens some: what a request's options ask for becomes
//! a name, the name a disk, and the disk gets what stands above it.

use crate::port::OpenedDisk;
use crate::request::{OpenRequest, RequestError};
use qcow2_blockdev::{
    FailureKind, ImageName, KeyValueError, KeyValues, Naming, OpenFailure, OpenOptions, OptionError,
    OptionErrorKind, Secrets, Tell, Warning, bitmaps_to_lose, escape_commas, open_bytes, open_scratch,
    open_telling,
};
use qcow2_core::{ImageFormat, ResolvedSource};
use qcow2_io::{CacheMode, CopyOnRead, GuardedRaw};
use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// A disk that [`open_files`] opened, and what the user should know of it.
#[non_exhaustive]
pub struct OpenedFiles {
    /// The disk, its own list of warnings empty.
    pub opened: OpenedDisk,
    /// The warnings, in the order in which they are told.
    pub warnings: Vec<Warning>,
}

/// Opens the files that `request` names. `secrets`: what options name; `how`: the policy for names inside
/// images and the files that this process has open; the rest of it comes from the request. `tell` hears that
/// an image was not closed cleanly, before that is put right.
///
/// A raw disk that was taken for one by its looks is guarded: its first sector cannot be made that of another
/// format. Disk: a scratch overlay is a temporary file without a name; else as
/// [`qcow2_blockdev::open`] for reading, or for changes. Errors: options that are not understood or exclude
/// each other, before anything is opened; `Open`.
pub fn open_files(
    request: &OpenRequest,
    secrets: &Secrets,
    how: OpenOptions,
    tell: Tell<'_>,
) -> Result<OpenedFiles, FilesError> {
    let (request, refused) = understood(request)?;
    let (typed, naming) = name_of(&request, secrets);
    let name = ImageName::parse(&typed, &naming)?;
    if let Some(kind @ FailureKind::SharedAndWritable) = refused {
        return Err(OpenFailure::new(&name.typed, kind).into());
    }
    // Durable writes are made by flushing after each, above the image; its own tables need no flush each.
    let cache = match request.cache {
        CacheMode::None | CacheMode::Directsync => CacheMode::None,
        CacheMode::Unsafe => CacheMode::Unsafe,
        _ => CacheMode::Writeback,
    };
    let allowed = || name.node.options.text("read-only").is_some_and(|text| text == "off");
    let writable = !request.read_only || allowed();
    let scratch = request.snapshot && writable;
    let mut how = how.with_cache(cache).with_force_share(request.force_share);
    how.writable = writable && !scratch;
    let unclean = |warning: &Warning, source: &ResolvedSource| {
        if how.writable && matches!(warning, Warning::NotClosedCleanly) {
            tell(warning, source);
        }
    };
    if let Some(kind @ FailureKind::QueuedThroughCache) = refused {
        // It is a fault of the file, which has to be there.
        open_bytes(&name, &how)?;
        return Err(OpenFailure::new(&name.typed, kind).into());
    }
    let opened = open_telling(&name, &how, &unclean)?;
    let keeps_nothing = request.copy_on_read && !writable;
    if let Some(kind) = refused.or(keeps_nothing.then_some(FailureKind::KeepsNothing)) {
        return Err(OpenFailure::new(&name.typed, kind).into());
    }
    let debugger = opened.debugger.clone();
    let (mut disk, format) = match scratch {
        true => {
            let size = opened.disk.size();
            drop(opened);
            let base = open_bytes(&name, &how)?.source;
            let disk = open_scratch(base, size, name.keys.above());
            (disk.map_err(|error| OpenFailure::new(&typed, error))?, ImageFormat::Qcow2)
        }
        false => (opened.disk, opened.format),
    };
    let mut warnings = Vec::new();
    if let Some(guess) = name.guess_warning(&format).filter(|_| writable) {
        disk = Arc::new(GuardedRaw::new(disk));
        warnings.push(guess);
    }
    if let Some(image) = disk.as_image().filter(|_| how.writable) {
        warnings.extend(bitmaps_to_lose(&**image.storage(), &image.header()));
    }
    if request.copy_on_read {
        disk = Arc::new(CopyOnRead::new(disk));
    }
    let mut opened = OpenedDisk::new(disk, writable);
    opened.durable_writes = request.cache.is_writethrough() && writable;
    opened.discards = match name.node.options.text("discard").as_deref() {
        Some(mode) => matches!(mode, "unmap" | "on"),
        None => request.discards,
    };
    opened.debugger = debugger;
    Ok(OpenedFiles { opened, warnings })
}

/// The request with the options that are about opening taken out of its option strings, and why it is refused
/// once its name is understood (`SharedAndWritable`) or its files are there.
fn understood(request: &OpenRequest) -> Result<(OpenRequest, Option<FailureKind>), FilesError> {
    let mut request = request.clone();
    let list = match request.options.is_empty() {
        true => KeyValues::default(),
        false => KeyValues::parse_pairs(&request.options.join(","), None)?,
    };
    let mut rest = Vec::new();
    let (mut direct, mut no_flush, mut read_only) = (None, None, None);
    for pair in list.pairs() {
        // The other spellings of on and off are for options of drivers.
        let on = || match &*pair.value {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => {
                let (option, value) = (pair.key.clone(), pair.value.clone());
                Err(OptionError { option, value, kind: OptionErrorKind::NotASwitch })
            }
        };
        match &*pair.key {
            "read-only" => read_only = Some(on()?),
            "force-share" => request.force_share = on()?,
            "cache.direct" => direct = Some(on()?),
            "cache.no-flush" => no_flush = Some(on()?),
            "discard" => request.set_discard(Some(&pair.value))?,
            _ => rest.push(format!("{}={}", pair.key, escape_commas(&pair.value))),
        }
    }
    request.options = rest;
    request.cache = request.cache.with_flags(direct, no_flush);
    // The option decides, but a disk to write to is not opened as one that cannot be written to.
    let is_read_only_node = read_only == Some(true) && !request.read_only;
    request.read_only = read_only.unwrap_or(request.read_only);
    let refused = if request.force_share && !request.read_only {
        Some(FailureKind::SharedAndWritable)
    } else if request.native_aio && !request.cache.is_direct() {
        Some(FailureKind::QueuedThroughCache)
    } else {
        is_read_only_node.then_some(FailureKind::ReadOnlyNode)
    };
    Ok((request, refused))
}

/// What the request's name is, and how it is meant.
fn name_of(request: &OpenRequest, secrets: &Secrets) -> (String, Naming) {
    let naming = Naming::new(secrets);
    let path = request.path.clone().unwrap_or_default();
    let format = || naming.clone().with_format(request.format.clone());
    match &request.path {
        _ if request.options.is_empty() => (path, format().as_list(request.image_opts)),
        Some(path) if !request.image_opts => {
            (path.clone(), format().with_options(&request.options.join(",")))
        }
        _ => {
            let driver = request.format.as_ref().map(|format| format!("driver={format}"));
            let parts: Vec<_> =
                request.path.iter().chain(&driver).chain(&request.options).map(String::as_str).collect();
            (parts.join(","), naming.as_list(true))
        }
    }
}

/// Why files are not opened.
#[derive(Debug)]
#[non_exhaustive]
pub enum FilesError {
    /// The options are no list of `key=value`.
    List(KeyValueError),
    /// A value that its option does not take.
    Option(OptionError),
    /// The same of an option that the program has too.
    Request(RequestError),
    /// The disk is not opened.
    Open(OpenFailure),
}

impl fmt::Display for FilesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::List(error) => error.fmt(f),
            Self::Option(error) => error.fmt(f),
            Self::Request(error) => error.fmt(f),
            Self::Open(failure) => failure.fmt(f),
        }
    }
}

impl Error for FilesError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::List(error) => error.source(),
            Self::Option(error) => error.source(),
            Self::Request(error) => error.source(),
            Self::Open(failure) => failure.source(),
        }
    }
}

impl From<KeyValueError> for FilesError {
    fn from(error: KeyValueError) -> Self {
        Self::List(error)
    }
}

impl From<OptionError> for FilesError {
    fn from(error: OptionError) -> Self {
        Self::Option(error)
    }
}

impl From<RequestError> for FilesError {
    fn from(error: RequestError) -> Self {
        Self::Request(error)
    }
}

impl From<OpenFailure> for FilesError {
    fn from(failure: OpenFailure) -> Self {
        Self::Open(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_options(options: &str) -> Result<(OpenRequest, Option<FailureKind>), FilesError> {
        let (path, options) = (Some("disk".to_owned()), vec![options.to_owned()]);
        understood(&OpenRequest { path, options, ..OpenRequest::default() })
    }

    #[test]
    fn options_about_opening_are_taken_out() {
        let request = with_options("cache.direct=on,driver=qcow2,discard=ignore,a=b,,c").unwrap().0;
        assert!(!request.read_only && !request.discards);
        assert_eq!(request.cache, CacheMode::Directsync);
        assert_eq!(request.options, ["driver=qcow2", "a=b,,c"]);
        let (typed, naming) = name_of(&request, &Secrets::default());
        assert_eq!((&*typed, naming.options.as_deref()), ("disk", Some("driver=qcow2,a=b,,c")));
        let request = with_options("cache.no-flush=on").unwrap().0;
        assert_eq!(request.cache, CacheMode::Unsafe);
    }

    #[test]
    fn the_option_read_only_decides_where_the_disk_may_be_written() {
        let request = |options: &str, read_only| {
            let (path, options) = (Some("disk".to_owned()), vec![options.to_owned()]);
            understood(&OpenRequest { path, options, read_only, ..OpenRequest::default() })
        };
        let (on, refused) = request("read-only=on", true).unwrap();
        assert!(on.read_only && refused.is_none());
        let (off, refused) = request("read-only=off", true).unwrap();
        assert!(!off.read_only && refused.is_none());
        let (_, refused) = request("read-only=on", false).unwrap();
        assert!(matches!(refused, Some(FailureKind::ReadOnlyNode)));
    }

    #[test]
    fn options_that_are_refused() {
        let refused = |options| with_options(options).map(|_| ()).unwrap_err();
        let (_, shared) = with_options("force-share=on").unwrap();
        assert!(matches!(shared, Some(FailureKind::SharedAndWritable)));
        let FilesError::Option(error) = refused("read-only=maybe") else { panic!("opened") };
        assert_eq!((&*error.option, error.kind), ("read-only", OptionErrorKind::NotASwitch));
        let FilesError::Request(error) = refused("discard=maybe") else { panic!("opened") };
        assert_eq!(error, RequestError::Discard("maybe".to_owned()));
    }
}
