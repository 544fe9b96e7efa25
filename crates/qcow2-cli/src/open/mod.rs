//! From names and options to opened images: the one place where adapters are chosen.

mod cut_short;
mod disk_storage;
mod named;
mod node;
mod trail;
mod tuning;
mod values;

pub(crate) use cut_short::warn_of_missing_end;
pub(crate) use node::NodeFacts;
pub(crate) use values::NATIVE_NEEDS_DIRECT;

use crate::args::ImageArgs;
use crate::compression::Compression;
use crate::failure::Failure;
use crate::findings::tell_of_recovery;
use crate::imagename::{Driver, ImageName, Node, filename};
use crate::render::qemu_text;
use crate::session::Session;
use crate::throttle::Throttle;
use node::{Opening, OtherBacking, OtherDataFile};
use qcow2_codec::{Deflate, Zstd};
use qcow2_core::{
    Codecs, ErrorKind, GuestDisk, Image, ImageFormat, Layers, OpenOptions, Reference, ResolveError,
    ResolvedSource, Resolver, Storage,
};
use qcow2_io::{CacheMode, Debugger, LockConflict, OpenError, OpenErrorKind, OpenFiles};
use qcow2_ops::snapshot::SnapshotName;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use trail::Trail;

/// An open disk and the names of the files it is made of.
pub(crate) struct OpenedDisk {
    /// The disk with its chain.
    pub(crate) disk: Arc<dyn GuestDisk>,
    /// Its own format.
    pub(crate) format: ImageFormat,
    /// The bytes that the format stands on.
    pub(crate) storage: Arc<dyn Storage>,
    /// The files, top layer first.
    pub(crate) files: Vec<LayerFiles>,
    /// What has to be added to the places of raw bytes.
    pub(crate) host_start: u64,
    /// Whether it is nothing, which is stored nowhere.
    pub(crate) is_null: bool,
    /// The way to breakpoints, where there is one.
    pub(crate) debugger: Option<Arc<Debugger>>,
}

/// The files of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LayerFiles {
    /// The image file.
    pub(crate) image: String,
    /// The external data file.
    pub(crate) data: Option<String>,
    /// Whether the image file is a raw disk.
    pub(crate) raw: bool,
    /// The name by which the layer above calls it.
    pub(crate) recorded: String,
}

impl LayerFiles {
    /// The file that holds the guest's bytes.
    pub(crate) fn data_file(&self) -> &str {
        self.data.as_deref().unwrap_or(&self.image)
    }
}

/// How an image is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenAs {
    /// Whether it is changed.
    pub(crate) writable: bool,
    /// How changes reach the medium.
    pub(crate) cache: CacheMode,
    /// Which of the files that it names are opened.
    pub(crate) layers: Layers,
    /// How many bytes a second are written at most.
    pub(crate) bytes_per_second: Option<u64>,
    /// How clusters are compressed.
    pub(crate) compression: Compression,
    /// Whether damaged images are opened for writing too.
    pub(crate) for_repair: bool,
    /// Who else may write to its files meanwhile.
    pub(crate) sharing: Sharing,
    /// Whether a raw disk's length is changed.
    pub(crate) resizes: bool,
}

/// Who else may write to the files of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// As QEMU has it for each format: others may write to raw disks, and keep the length of data files.
    #[default]
    ByFormat,
    /// Nobody to the image itself, whatever it is.
    TopAlone,
    /// Nobody to any of them.
    Alone,
}

impl OpenAs {
    /// For reading, with all that it names.
    pub(crate) const READ: Self = Self {
        writable: false,
        cache: CacheMode::Writeback,
        layers: Layers::Follow,
        bytes_per_second: None,
        compression: Compression::DEFAULT,
        for_repair: false,
        sharing: Sharing::ByFormat,
        resizes: false,
    };
    /// For looking at it, and at nothing that it names.
    pub(crate) const LOOK: Self = Self { layers: Layers::TopOnly, ..Self::READ };
    /// For copying all of it, which nobody is to change meanwhile.
    pub(crate) const COPY: Self = Self { sharing: Sharing::Alone, ..Self::READ };

    /// The same for the backing file; a writable one is changed below other disks, which do not expect it.
    fn below(self, writable: bool) -> Self {
        let sharing = match self.sharing {
            Sharing::Alone => Sharing::Alone,
            _ if writable => Sharing::TopAlone,
            _ => Sharing::ByFormat,
        };
        Self { writable, sharing, resizes: false, ..self }
    }
}

/// The files that this process has open, with that of its output: whatever a verb writes to is opened among
/// them, so that it is none that the same verb reads.
pub(crate) fn open_files() -> &'static OpenFiles {
    static FILES: OnceLock<OpenFiles> = OnceLock::new();
    FILES.get_or_init(OpenFiles::with_output)
}

/// The bytes of an image, and what is known of the nodes below it.
pub(crate) struct OpenedFile {
    /// The bytes and their format.
    pub(crate) source: ResolvedSource,
    /// The nodes that the format stands on, from the top; the protocol itself first, where there is no
    /// format.
    pub(crate) nodes: Vec<NodeFacts>,
    debugger: Option<Arc<Debugger>>,
}

/// Opens the file that `name` leads to and learns its format; opens no image yet.
pub(crate) fn open_file(name: &ImageName, args: &ImageArgs, how: OpenAs) -> Result<ResolvedSource, Failure> {
    open_nodes(name, args, how).map(|opened| opened.source)
}

/// The same, with what is known of each node.
pub(crate) fn open_nodes(name: &ImageName, args: &ImageArgs, how: OpenAs) -> Result<OpenedFile, Failure> {
    let format = format_of(&name.node);
    let trail = Trail::default();
    let opening = Opening::new(args, how, format.as_ref(), &trail);
    let opened = opening.open(&name.node).map_err(|trouble| trouble.about(&name.typed))?;
    let (mut source, nodes, debugger) = opened;
    if let ImageFormat::Other(other) = &source.format {
        let reason = format!("format '{other}' is not supported, only qcow2, raw and luks are");
        return Err(Failure::could_not_open(&name.typed, &reason));
    }
    if let Some(rate) = how.bytes_per_second {
        source.storage = Arc::new(Throttle::new(source.storage, rate));
    }
    Ok(OpenedFile { source, nodes, debugger })
}

/// Opens bytes that are there already, for writing. Errors: "Could not open".
pub(crate) fn open_existing(node: &Node) -> Result<Arc<dyn Storage>, Failure> {
    let (args, how) = (ImageArgs::default(), OpenAs { writable: true, ..OpenAs::READ });
    let trail = Trail::default();
    let opening = Opening::new(&args, how, Some(&ImageFormat::Raw), &trail);
    let opened = opening.open(node).map_err(|trouble| trouble.about(&filename(node, "raw")))?;
    Ok(opened.0.storage)
}

/// The format that a name gives.
fn format_of(node: &Node) -> Option<ImageFormat> {
    match node.driver() {
        _ if node.is_probed() => None,
        Driver::Qcow2 => Some(ImageFormat::Qcow2),
        Driver::Luks => Some(ImageFormat::Luks),
        Driver::Raw => Some(ImageFormat::Raw),
        _ => None,
    }
}

/// Opens the image that `name` leads to, with the files that it names as `how` says.
pub(crate) fn open_image(name: &ImageName, args: &ImageArgs, how: OpenAs) -> Result<OpenedDisk, Failure> {
    open_image_telling(name, args, how, &|_| {})
}

/// The same; `told` looks at the file before the image in it is opened.
fn open_image_telling(
    name: &ImageName,
    args: &ImageArgs,
    how: OpenAs,
    told: &dyn Fn(&ResolvedSource),
) -> Result<OpenedDisk, Failure> {
    let OpenedFile { mut source, debugger, nodes } = open_nodes(name, args, how)?;
    told(&source);
    if let Some(text) = name.node.unknown_below() {
        return Err(Failure::could_not_open(&name.typed, &text));
    }
    source.resolver = with_data_file(name, args, how, source.resolver);
    if let Some(node) = name.node.other_backing() {
        let inner = source.resolver;
        source.resolver = Arc::new(OtherBacking { inner, node, args: args.clone(), how });
    }
    let mut opened = OpenedDisk { debugger, ..open_layers(name, source, how, "")? };
    if opened.format == ImageFormat::Raw
        && let (Some(bottom), Some(top)) = (nodes.last(), opened.files.first_mut())
    {
        // The place of a raw byte is known down to the bottom.
        top.image = bottom.filename.clone();
        opened.host_start = name.node.raw_start();
        opened.is_null = matches!(bottom.driver, "null-co" | "null-aio");
    }
    Ok(opened)
}

/// Resolves as `inner` does, but for the data file, where the user has named it.
fn with_data_file(
    name: &ImageName,
    args: &ImageArgs,
    how: OpenAs,
    inner: Arc<dyn Resolver>,
) -> Arc<dyn Resolver> {
    match &name.node.data_file {
        None => inner,
        Some(node) => Arc::new(OtherDataFile { inner, node: (**node).clone(), args: args.clone(), how }),
    }
}

/// Opens the image that `name` leads to for changes; says so on standard error where it was taken for raw by
/// its looks.
pub(crate) fn open_to_change(
    session: &Session,
    name: &ImageName,
    args: &ImageArgs,
    how: OpenAs,
) -> Result<OpenedDisk, Failure> {
    let opened = open_target(session, name, args, OpenAs { writable: true, ..how })?;
    complain_of_guess(session, name, &opened.format);
    Ok(opened)
}

/// Opens the image that `name` leads to, and says what that puts right in one that was not closed cleanly.
pub(crate) fn open_target(
    session: &Session,
    name: &ImageName,
    args: &ImageArgs,
    how: OpenAs,
) -> Result<OpenedDisk, Failure> {
    open_image_telling(name, args, how, &|source| tell_of_recovery(session, source))
}

/// Says on standard error where a disk that is to be written was taken for raw by its looks.
pub(crate) fn complain_of_guess(session: &Session, name: &ImageName, format: &ImageFormat) {
    if name.node.is_probed() && *format == ImageFormat::Raw {
        guess_warning(&filename(&name.node, "raw")).iter().for_each(|line| session.complain(line));
    }
}

/// Makes all durable, as far as the cache mode wants it, and leaves a changed image clean. Errors: the
/// system's text.
pub(crate) fn close(disk: &dyn GuestDisk) -> Result<(), String> {
    let done = disk.flush().and_then(|()| disk.as_image().map_or(Ok(()), |image| image.close()));
    done.map_err(|error| qemu_text::cause(&error))
}

/// Opens the image that `name` leads to as it was when a snapshot was taken.
pub(crate) fn open_snapshot(
    name: &ImageName,
    args: &ImageArgs,
    how: OpenAs,
    wanted: &SnapshotName,
) -> Result<OpenedDisk, Failure> {
    let failed = |text: &str| Failure::new(format!("Failed to load snapshot: {text}"));
    let source = open_file(name, args, how)?;
    if source.format != ImageFormat::Qcow2 {
        return Err(failed(
            "Block format 'raw' used by device '' does not support temporarily loading internal snapshots",
        ));
    }
    let mut missing = false;
    let opened = open_layers_by(name, source, how, "", |source, options| {
        let opened = Image::open_snapshot(source, options, |snapshots| wanted.position(snapshots));
        missing = opened.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound);
        Ok(opened?)
    });
    if missing {
        // What else is wrong with the image comes first.
        open_image(name, args, how)?;
        return Err(failed("Can't find snapshot"));
    }
    opened
}

/// Opens the image in `source`, with the files that it names as `how` says. `context`: what is said before
/// the reason of a failure.
pub(crate) fn open_layers(
    name: &ImageName,
    source: ResolvedSource,
    how: OpenAs,
    context: &str,
) -> Result<OpenedDisk, Failure> {
    open_layers_by(name, source, how, context, qcow2_core::open_disk)
}

/// The same, the top layer being opened by `open`.
fn open_layers_by(
    name: &ImageName,
    mut source: ResolvedSource,
    how: OpenAs,
    context: &str,
    open: impl FnOnce(ResolvedSource, &OpenOptions) -> qcow2_core::Result<Arc<dyn GuestDisk>>,
) -> Result<OpenedDisk, Failure> {
    let (format, storage) = (source.format.clone(), Arc::clone(&source.storage));
    let files = Arc::new(Mutex::new(vec![LayerFiles {
        image: source.name.clone(),
        raw: format == ImageFormat::Raw,
        ..LayerFiles::default()
    }]));
    source.resolver = Arc::new(Recorder { inner: source.resolver, files: Arc::clone(&files) });
    let mut options = OpenOptions::default();
    options.writable = how.writable;
    options.for_repair = how.for_repair;
    options.layers = how.layers;
    options.codecs = how.compression.codecs()?;
    options.keys = Some(Arc::new(name.keys.clone()));
    options.discard_freed = how.writable;
    if format == ImageFormat::Qcow2 && (!name.node.options.is_empty() || name.node.data_file.is_some()) {
        let header = qcow2_core::walk::read_header(&*source.storage)
            .map_err(|error| qemu_text::open_failure(&name.typed, context, &error))?;
        if name.node.data_file.is_some() && !header.has_data_file() {
            let reason = "'data-file' can only be set for images with an external data file";
            return Err(Failure::could_not_open(&name.typed, reason));
        }
        tuning::tune(&mut options, &name.node.options, &header)
            .map_err(|failure| failure.on_opening(&name.typed))?;
    }
    let opened = open(source, &options);
    let files = files.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match opened {
        Ok(disk) => {
            Ok(OpenedDisk { disk, format, storage, files, is_null: false, debugger: None, host_start: 0 })
        }
        Err(error) => {
            let context = match how.sharing == Sharing::Alone && is_raw_in_use(&error, &files) {
                true => context.to_owned(),
                false => format!("{context}{}", BACKING.repeat(files.len() - 1)),
            };
            let failure = qemu_text::open_failure(&name.typed, &context, &error);
            Err(match (missing_backing(&error), &files[..]) {
                (true, [.., above, missing]) => failure.advise(format!(
                    "backing file '{}' not found; it was recorded relative to '{}'",
                    missing.recorded, above.image
                )),
                _ => failure,
            })
        }
    }
}

/// Whether `error` is about a raw layer that others write to. Where nobody else may, QEMU asks for that from
/// the top when all layers are open, and so says nothing of backing files.
fn is_raw_in_use(error: &qcow2_core::Error, files: &[LayerFiles]) -> bool {
    qemu_text::find::<LockConflict>(error).is_some() && files.last().is_some_and(|layer| layer.raw)
}

/// Whether `error` is about a backing file that is not there.
fn missing_backing(error: &qcow2_core::Error) -> bool {
    qemu_text::find::<OpenError>(error).is_some_and(|error| error.kind() == OpenErrorKind::NotFound)
}

/// Opens, and closes again, the files that a qcow2 image names, for verbs that need them to be there.
pub(crate) fn open_below(name: &ImageName, source: &ResolvedSource, how: OpenAs) -> Result<(), Failure> {
    let header = qcow2_core::walk::read_header(&*source.storage)
        .map_err(|error| qemu_text::open_failure(&name.typed, "", &error))?;
    if let Some(data) = header.extensions.data_file_name().filter(|_| header.has_data_file()) {
        let opened = source.resolver.resolve(Reference::DataFile { name: &data }, false);
        opened.map_err(|error| qemu_text::open_failure(&name.typed, "", &error.into()))?;
    }
    let Some(backing) = header.backing_file_name() else { return Ok(()) };
    let format = header.extensions.backing_format_name();
    let reference = Reference::Backing { name: &backing, format: format.as_deref() };
    let below = source
        .resolver
        .resolve(reference, false)
        .map_err(|error| qemu_text::open_failure(&name.typed, BACKING, &error.into()))?;
    let name = &ImageName { keys: name.keys.below(), ..name.clone() };
    open_layers(name, below, how, BACKING).map(|_| ())
}

/// Whether `path` leads to a block device, which has a size of its own and a content from before.
pub(crate) fn is_block_device(path: &str) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        false
    }
}

/// Why `path` leads to no device, if it does not.
pub(crate) fn not_a_device(path: &str) -> Option<String> {
    if is_block_device(path) {
        return None;
    }
    Some(match std::fs::metadata(path) {
        Ok(_) => format!("'host_device' driver requires '{path}' to be either a character or block device"),
        Err(error) => {
            let reason = error.raw_os_error().map_or_else(|| error.to_string(), qcow2_io::os_error_text);
            format!("Could not open '{path}': {reason}")
        }
    })
}

/// What is said where a disk that is to be written was taken for raw by its looks.
pub(crate) fn guess_warning(name: &str) -> Vec<String> {
    vec![
        format!("WARNING: Image format was not specified for '{name}' and probing guessed raw."),
        "         Automatically detecting the format is dangerous for raw images, \
         write operations on block 0 will be restricted."
            .to_owned(),
        "         Specify the 'raw' format explicitly to remove the restrictions.".to_owned(),
    ]
}

/// Every compression method.
pub(crate) fn codecs() -> Codecs {
    Codecs::new(Arc::new(Deflate::default()), Arc::new(Zstd::default()))
}

/// Notes which files a chain is made of while it is opened.
struct Recorder {
    inner: Arc<dyn Resolver>,
    files: Arc<Mutex<Vec<LayerFiles>>>,
}

impl Resolver for Recorder {
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError> {
        let is_backing = matches!(reference, Reference::Backing { .. });
        if is_backing {
            // Noted before it is opened: a failure is then this layer's.
            let (recorded, raw) = match reference {
                Reference::Backing { name, format } => (name.to_owned(), format == Some("raw")),
                _ => (String::new(), false),
            };
            self.lock().push(LayerFiles { recorded, raw, ..LayerFiles::default() });
        }
        let mut source = self.inner.resolve(reference, writable)?;
        if let Some(layer) = self.lock().last_mut() {
            match is_backing {
                true => {
                    (layer.image, layer.raw) = (source.name.clone(), source.format == ImageFormat::Raw);
                }
                false => layer.data = Some(source.name.clone()),
            }
        }
        source.resolver = Arc::new(Self { inner: source.resolver, files: Arc::clone(&self.files) });
        Ok(source)
    }
}

impl Recorder {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<LayerFiles>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) const BACKING: &str = "Could not open backing file: ";
