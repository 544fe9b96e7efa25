//! From bytes to a disk with its chain.

use super::bytes::{NodeFacts, Opening, check_signature};
use super::filter::Filter;
use super::look::{Tell, warnings_of_change};
use super::named::format_of;
use super::options::{OpenOptions, Sharing};
use super::record::{LayerFiles, Recorder};
use super::trail::Trail;
use crate::driver::{Driver, tune};
use crate::failure::{FailureKind, MissingBacking, OpenFailure};
use crate::name::{ImageName, filename};
use crate::tree::Node;
use qcow2_core::format::AutoclearFeatures;
use qcow2_core::format::snapshot::Snapshot;
use qcow2_core::open::{DEFAULT_L2_CACHE, DEFAULT_REFCOUNT_CACHE};
use qcow2_core::walk::read_header;
use qcow2_core::{
    Error, ErrorKind, GuestDisk, Image, ImageFormat, Layers, OpenOptions as EngineOptions, Reference,
    ResolvedSource, Storage, find_cause, shown_disk,
};
use qcow2_io::{Debugger, LockConflict, OpenError, OpenErrorKind, ShownDisk, ThrottleStorage};
use std::error::Error as _;
use std::sync::{Arc, PoisonError};

/// An open disk and the names of the files it is made of.
#[non_exhaustive]
pub struct OpenedDisk {
    /// The disk with its chain.
    pub disk: Arc<dyn GuestDisk>,
    /// Its own format.
    pub format: ImageFormat,
    /// The bytes that the format stands on.
    pub storage: Arc<dyn Storage>,
    /// The files, top layer first.
    pub files: Vec<LayerFiles>,
    /// Start of the raw window, in bytes: added to the host offsets of a raw disk, which are relative to it.
    pub host_start: u64,
    /// Whether it is a null device, which stores nothing.
    pub is_null: bool,
    /// The way to breakpoints, where there is one.
    pub debugger: Option<Arc<Debugger>>,
}

/// The bytes of an image, and what is known of the nodes below it.
#[non_exhaustive]
pub struct OpenedBytes {
    /// The bytes and their format.
    pub source: ResolvedSource,
    /// The nodes that the format stands on, from the top; the protocol itself first, where there is no
    /// format.
    pub nodes: Vec<NodeFacts>,
    debugger: Option<Arc<Debugger>>,
    files: Vec<LayerFiles>,
}

/// Opens the disk that `name` leads to, with the files that it names as `how` says.
///
/// Files are opened from the bottom of the tree up, then the backing chain from the top down, each with the
/// data file of its layer; every one is locked as QEMU locks it. Nothing is written, but by `how.writable` to
/// an image that was not closed cleanly. A disk that was opened for changes is closed by flushing it and then
/// closing its image. Errors: [`OpenFailure`]; whatever was opened before is closed again.
pub fn open(name: &ImageName, how: &OpenOptions) -> Result<OpenedDisk, OpenFailure> {
    open_with(name, how, None)
}

/// The same for changes; `tell` hears what opening the image is about to put right or to lose, before that.
/// Disk: reads the tables of bitmaps besides.
pub fn open_telling(name: &ImageName, how: &OpenOptions, tell: Tell<'_>) -> Result<OpenedDisk, OpenFailure> {
    open_with(name, how, Some(tell))
}

fn open_with(name: &ImageName, how: &OpenOptions, tell: Option<Tell<'_>>) -> Result<OpenedDisk, OpenFailure> {
    if let Some(child) = name.node.child().filter(|_| name.node.driver().is_filter()) {
        return open_filter(name, child, how, tell);
    }
    let OpenedBytes { source, debugger, nodes, files } = open_bytes(name, how)?;
    if let Some(tell) = tell {
        warnings_of_change(&source).iter().for_each(|warning| tell(warning, &source));
    }
    let mut opened = OpenedDisk { debugger, ..open_layers(name, source, how, 0)? };
    if let (ImageFormat::Qcow2, Some(below), Some(top)) =
        (&opened.format, nodes.first(), opened.files.first_mut())
    {
        // Offsets in the image are those in the node below, by whatever longer name the whole goes.
        top.image.clone_from(&below.filename);
    }
    if opened.format == ImageFormat::Raw
        && let (Some(bottom), Some(top)) = (nodes.last(), opened.files.first_mut())
    {
        // The place of a raw byte is known down to the bottom.
        top.image = bottom.filename.clone();
        opened.host_start = name.node.raw_start();
        opened.is_null = bottom.is_null();
    }
    if let Some((shown, _)) = shown_disk(&*opened.storage).filter(|_| opened.format == ImageFormat::Raw) {
        // The image tells where the bytes are that a raw disk shows of it.
        (opened.files, opened.host_start) = (files, 0);
        if name.node.driver() == Driver::Blkdebug {
            opened.disk = Arc::new(ShownDisk::new(opened.disk, shown));
        }
    }
    Ok(opened)
}

/// Opens the disk that `name`, a filter, leads to: that of `child`, whose layers are seen through the filter.
fn open_filter(
    name: &ImageName,
    child: &Node,
    how: &OpenOptions,
    tell: Option<Tell<'_>>,
) -> Result<OpenedDisk, OpenFailure> {
    let failed = |kind| OpenFailure::new(&name.typed, kind);
    let inner = ImageName { node: child.clone(), ..name.clone() };
    let mut opened = open_with(&inner, how, tell)?;
    let secrets = name.keys.secrets();
    let open_target = |node: &Node| {
        let target = ImageName::of_node(&filename(node, "raw"), node.clone(), secrets);
        open(&target, &how.below(true)).map(|opened| opened.disk).map_err(OpenFailure::into_kind)
    };
    let filter = Filter::of(&name.node, how, secrets, Some(&*opened.disk), &open_target).map_err(failed)?;
    if let Some(unknown) = name.node.unknown_option(name.node.driver(), true) {
        return Err(failed(unknown));
    }
    opened.disk = filter.on(opened.disk, how.writable);
    Ok(opened)
}

/// Opens what `name` leads to below the format, and learns the format; opens no image yet. The first step of
/// [`open`], for whoever looks at the bytes.
pub fn open_bytes(name: &ImageName, how: &OpenOptions) -> Result<OpenedBytes, OpenFailure> {
    let format = format_of(&name.node);
    let trail = Trail::default();
    let opening = Opening::new(how, name.keys.secrets(), format.as_ref(), &trail);
    let failed = |kind| OpenFailure::new(&name.typed, kind);
    let (mut source, nodes, debugger, files) = opening.open(&name.node).map_err(failed)?;
    if let ImageFormat::Other(other) = &source.format {
        if let Some(driver) = Driver::of_format(&source.format) {
            check_signature(&*source.storage, driver).map_err(failed)?;
        }
        return Err(failed(FailureKind::UnsupportedFormat(other.clone())));
    }
    if let Some(rate) = how.bytes_per_second {
        source.storage = Arc::new(ThrottleStorage::new(source.storage, rate));
    }
    Ok(OpenedBytes { source, nodes, debugger, files })
}

/// Opens the bytes that `node` leads to, which are there already, for writing; they are locked as a raw disk.
pub fn open_existing(node: &Node, how: &OpenOptions) -> Result<Arc<dyn Storage>, OpenFailure> {
    let name = ImageName::of_node(&filename(node, "raw"), node.clone(), &Default::default());
    let (how, trail) = (how.clone().writable(), Trail::default());
    let opening = Opening::new(&how, name.keys.secrets(), Some(&ImageFormat::Raw), &trail);
    match opening.open(node) {
        Ok((source, ..)) => Ok(source.storage),
        Err(kind) => Err(OpenFailure::new(name.typed, kind)),
    }
}

/// Opens the image that `name` leads to as it was when the snapshot was taken whose position among all
/// `position` gives.
pub fn open_snapshot(
    name: &ImageName,
    how: &OpenOptions,
    position: impl Fn(&[Snapshot]) -> Option<usize>,
) -> Result<OpenedDisk, OpenFailure> {
    let source = open_bytes(name, how)?.source;
    if source.format != ImageFormat::Qcow2 {
        // What else is wrong with the image comes first: a container without its key.
        open(name, how)?;
        return Err(OpenFailure::new(&name.typed, FailureKind::NoSnapshots));
    }
    let mut missing = false;
    let opened = open_layers_by(name, source, how, 0, |source, options| {
        let opened = Image::open_snapshot(source, options, position);
        missing = opened.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound);
        Ok(opened?)
    });
    if missing {
        // What else is wrong with the image comes first.
        open(name, how)?;
        return Err(OpenFailure::new(&name.typed, FailureKind::NoSuchSnapshot));
    }
    opened
}

/// Opens the layer that `name` leads to on `below`, a disk that is open already, whatever backing file it
/// records; `None`: on nothing. For layers that are exchanged while a disk is used.
pub fn open_on(
    name: &ImageName,
    how: &OpenOptions,
    below: Option<&Arc<dyn GuestDisk>>,
) -> Result<Arc<dyn GuestDisk>, OpenFailure> {
    let source = open_bytes(name, how)?.source;
    let how = how.clone().with_layers(Layers::NoBacking);
    let opened = open_layers_by(name, source, &how, 0, |source, options| match below {
        Some(below) => Ok(Image::open_on(&source, options, Arc::clone(below))?),
        None => qcow2_core::open_disk(source, options),
    });
    Ok(opened?.disk)
}

/// Opens the image in `source`, with the files that it names as `how` says. The last step of [`open`].
/// `layer`: how many others stand on it, for failures.
pub fn open_layers(
    name: &ImageName,
    source: ResolvedSource,
    how: &OpenOptions,
    layer: usize,
) -> Result<OpenedDisk, OpenFailure> {
    open_layers_by(name, source, how, layer, qcow2_core::open_disk)
}

/// The same, the top layer being opened by `open`.
fn open_layers_by(
    name: &ImageName,
    mut source: ResolvedSource,
    how: &OpenOptions,
    layer: usize,
    open: impl FnOnce(ResolvedSource, &EngineOptions) -> qcow2_core::Result<Arc<dyn GuestDisk>>,
) -> Result<OpenedDisk, OpenFailure> {
    let (format, storage) = (source.format.clone(), Arc::clone(&source.storage));
    let (image, raw) = (source.name.clone(), format == ImageFormat::Raw);
    let (resolver, files) = Recorder::on(source.resolver, LayerFiles { image, raw, ..LayerFiles::default() });
    source.resolver = resolver;
    let options = engine_options(name, &source, how, layer)?;
    let opened = open(source, &options);
    let files = files.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match opened {
        Ok(disk) => {
            Ok(OpenedDisk { disk, format, storage, files, is_null: false, debugger: None, host_start: 0 })
        }
        Err(error) => Err(engine_failure(name, error, how, (layer, &files))),
    }
}

/// What the engine is told of the top layer, which is in `source`.
fn engine_options(
    name: &ImageName,
    source: &ResolvedSource,
    how: &OpenOptions,
    layer: usize,
) -> Result<EngineOptions, OpenFailure> {
    let mut options = EngineOptions::default();
    options.writable = how.writable;
    options.for_repair = how.for_repair;
    options.layers = how.layers;
    options.exchangeable = how.exchangeable;
    options.codecs = how.codecs();
    options.keys = Some(Arc::new(name.keys.clone()));
    options.discard_freed = how.writable;
    options.damage_observer = how.damage_observer.clone();
    if let Some(most) = how.policy.max_memory {
        options.l2_cache_size = Some(most).filter(|&most| most < DEFAULT_L2_CACHE);
        options.refcount_cache_size = Some(most).filter(|&most| most < DEFAULT_REFCOUNT_CACHE);
        options.bitmap_memory = options.bitmap_memory.min(most);
    }
    let node = &name.node;
    if source.format == ImageFormat::Qcow2 && (!node.options.is_empty() || node.data_file.is_some()) {
        let failed = |kind: FailureKind| OpenFailure::new(&name.typed, kind);
        let header = read_header(&*source.storage).map_err(|error| failed(error.into()).below(layer))?;
        if node.data_file.is_some() && !header.has_data_file() {
            // That it is not there is said first.
            let opened = source.resolver.resolve(Reference::DataFile { name: "" }, how.writable);
            opened.map_err(|error| failed(FailureKind::Engine(error.into())))?;
            return Err(failed(FailureKind::NoDataFile));
        }
        tune(&mut options, &node.options, &header).map_err(|error| failed(error.into()))?;
    }
    Ok(options)
}

/// The failure for `error`, met while the chain was opened from its layer `top` on as far as `files` say.
fn engine_failure(
    name: &ImageName,
    error: Error,
    how: &OpenOptions,
    (top, files): (usize, &[LayerFiles]),
) -> OpenFailure {
    let below = match how.sharing == Sharing::Alone && is_raw_in_use(&error, files) {
        true => 0,
        false => files.len() - 1,
    };
    let missing = match (is_not_there(&error), files) {
        (true, [.., above, missing]) => {
            Some(MissingBacking { recorded: missing.recorded.clone(), above: above.image.clone() })
        }
        _ => None,
    };
    let failure = OpenFailure::new(&name.typed, error).below(top + below);
    missing.into_iter().fold(failure, OpenFailure::with_missing_backing)
}

/// Whether `error` is about a raw layer that others write to. Where nobody else may, QEMU asks for that from
/// the top when all layers are open, and so says nothing of backing files.
fn is_raw_in_use(error: &Error, files: &[LayerFiles]) -> bool {
    find_cause::<LockConflict>(error).is_some() && files.last().is_some_and(|layer| layer.raw)
}

/// Whether `error` is about a file that an image names by its path and that is not there.
fn is_not_there(error: &Error) -> bool {
    let mut next = error.source();
    while let Some(error) = next {
        if error.is::<FailureKind>() {
            return false;
        }
        if let Some(open) = error.downcast_ref::<OpenError>() {
            return open.kind() == OpenErrorKind::NotFound;
        }
        next = error.source();
    }
    false
}

/// Opens, and closes again, the files that the qcow2 image in `source` names, as far as `how.layers` says,
/// for whoever needs them to be there.
pub fn open_below(name: &ImageName, source: &ResolvedSource, how: &OpenOptions) -> Result<(), OpenFailure> {
    let failed = |error: Error| OpenFailure::new(&name.typed, error);
    let header = read_header(&*source.storage).map_err(failed)?;
    let chosen = |reference| source.resolver.has_chosen(reference).then(String::new);
    let data = header.extensions.data_file_name().or_else(|| chosen(Reference::DataFile { name: "" }));
    if header.has_data_file() && data.is_none() {
        return Err(OpenFailure::new(&name.typed, FailureKind::UnnamedDataFile));
    }
    if !header.has_data_file() && header.features.autoclear.contains(AutoclearFeatures::RAW_DATA_FILE) {
        return Err(OpenFailure::new(&name.typed, FailureKind::RawWithoutDataFile));
    }
    if let Some(data) = data.filter(|_| header.has_data_file()) {
        let opened = source.resolver.resolve(Reference::DataFile { name: &data }, false);
        opened.map_err(|error| failed(error.into()))?;
    }
    let backing = header.backing_file_name();
    let backing = backing.or_else(|| chosen(Reference::Backing { name: "", format: None }));
    let backing = backing.filter(|_| how.layers == Layers::Follow);
    let Some(backing) = backing else { return Ok(()) };
    let format = header.extensions.backing_format_name();
    let reference = Reference::Backing { name: &backing, format: format.as_deref() };
    let below = source.resolver.resolve(reference, false).map_err(|error| failed(error.into()).below(1))?;
    let name = &ImageName { keys: name.keys.below(), ..name.clone() };
    open_layers(name, below, how, 1).map(|_| ())
}
