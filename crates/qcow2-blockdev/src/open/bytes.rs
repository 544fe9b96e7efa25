//! From a tree of drivers to bytes: the one place where storages are chosen and stacked.

use super::chosen::ChosenFiles;
use super::filter::Filter;
use super::named::{NamedFiles, format_of};
use super::options::{OpenOptions, Sharing, default_codecs};
use super::record::{LayerFiles, Recorder};
use super::trail::Trail;
use crate::driver::{
    Driver, KEY_OPTIONS, check_values, debug_limits, debug_rules, is_window, nbd, not_a_device, null, window,
};
use crate::failure::FailureKind;
use crate::keys::{Keys, Secrets};
use crate::name::filename;
use crate::scalar::parse_switch;
use crate::tree::{Backing, Node};
use qcow2_core::format::HostOffset;
use qcow2_core::format::crypt::{LUKS_HEADER_LEN, LuksHeader};
use qcow2_core::walk::read_header;
use qcow2_core::{
    GuestDisk, ImageFormat, Layers, NoResolver, OpenOptions as EngineOptions, ResolvedSource, Resolver,
    SourceId, Storage,
};
use qcow2_io::{
    BlkdebugStorage, Debugger, DiskStorage, Locking, NbdStorage, OpenFile, OsError, RawEvents, SourceOptions,
    VerifyStorage, open_source, path_of, probe_format,
};
use std::sync::{Arc, PoisonError};

/// Bytes, and what is known of them.
pub(super) struct Bytes {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) id: Option<SourceId>,
    /// What opens plain names in them; `None`: nothing does.
    resolver: Option<Arc<dyn Resolver>>,
    /// The format, where opening has found it out.
    format: Option<ImageFormat>,
    /// From the outermost node to the bottom.
    pub(super) nodes: Vec<NodeFacts>,
    pub(super) debugger: Option<Arc<Debugger>>,
    /// The files of the image whose disk gives the bytes, if one does, top layer first.
    files: Vec<LayerFiles>,
}

/// What is told of one node.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NodeFacts {
    /// The driver's name.
    pub driver: &'static str,
    /// What the node above calls it.
    pub role: &'static str,
    /// Its name.
    pub filename: String,
    /// Its bytes.
    pub len: u64,
    /// Bytes of real space, where that is known.
    pub used: Option<u64>,
    /// Whether it is a file.
    pub is_file: bool,
    /// The other node that the one above needs, and those below it.
    pub sibling: Vec<Self>,
}

impl NodeFacts {
    /// Whether it is a null device, which stores nothing.
    pub(super) fn is_null(&self) -> bool {
        matches!(self.driver, "null-co" | "null-aio")
    }
}

type Opened<T> = Result<T, FailureKind>;

/// Bytes with their format, what is known of the nodes below it, the way to breakpoints, and the files of the
/// image whose disk gives the bytes.
type OpenedTree = (ResolvedSource, Vec<NodeFacts>, Option<Arc<Debugger>>, Vec<LayerFiles>);

/// How the bytes below a format are opened.
#[derive(Clone, Copy)]
pub(super) struct Opening<'a> {
    how: &'a OpenOptions,
    secrets: &'a Secrets,
    /// The format that stands on them, where it is known.
    format: Option<&'a ImageFormat>,
    /// Whether whoever stands on them relies on their length.
    is_part: bool,
    /// The filter right above, which an image's disk gets.
    filter: Option<&'a Filter>,
    /// How they were reached.
    trail: &'a Trail,
}

impl<'a> Opening<'a> {
    pub(super) fn new(
        how: &'a OpenOptions,
        secrets: &'a Secrets,
        format: Option<&'a ImageFormat>,
        trail: &'a Trail,
    ) -> Self {
        Self { how, secrets, format, is_part: false, filter: None, trail }
    }

    /// The same for somebody who relies on the length.
    pub(super) fn as_part(self) -> Self {
        Self { is_part: true, ..self }
    }
}

impl Opening<'_> {
    fn file(&self) -> OpenFile {
        let file = if self.how.writable { OpenFile::writable() } else { OpenFile::read_only() };
        let mut file = file.with_cache(self.how.cache).with_locking(self.locking());
        file.open_files.clone_from(&self.how.open_files);
        file.resizes = self.how.resizes;
        file.metadata_only = self.how.layers == Layers::TopOnly;
        file
    }

    fn locking(&self) -> Locking {
        let has_metadata = self.format == Some(&ImageFormat::Qcow2);
        match self.how.sharing {
            Sharing::Held => Locking::Off,
            _ if self.how.force_share => Locking::Shared,
            Sharing::Alone | Sharing::TopAlone => Locking::NoOtherWriters,
            Sharing::ByFormat if self.is_part && !has_metadata => Locking::FixedLength,
            Sharing::ByFormat => Locking::Auto,
        }
    }

    /// That of the files which the image names.
    fn locking_below(&self) -> Locking {
        Opening { how: &self.how.below(false), is_part: false, ..*self }.locking()
    }

    /// Opens the whole tree. The format on top is probed where it is not given.
    pub(super) fn open(&self, top: &Node) -> Opened<OpenedTree> {
        check_aio(top, self.how.cache.is_direct())?;
        let shared = check_access(top, self.how.writable)?;
        let how = self.how.clone().with_force_share(self.how.force_share || shared);
        Opening { how: &how, ..*self }.open_tree(top)
    }

    fn open_tree(&self, top: &Node) -> Opened<OpenedTree> {
        // A filter shows bytes without a format, as a protocol does.
        let has_format = top.driver().format().is_some();
        let mut bytes = match (has_format, top.child()) {
            (true, Some(child)) => self.on(top).bytes(child, "file")?,
            _ => self.bytes(top, "")?,
        };
        let format = match (self.format, bytes.format.take()) {
            (Some(format), _) => format.clone(),
            (None, _) if !has_format => ImageFormat::Raw,
            (None, Some(format)) => format,
            (None, None) => probe_format(&*bytes.storage).map_err(FailureKind::Probe)?,
        };
        // A format that no driver reads is refused where the disk is opened, by its name.
        let probed = Driver::of_format(&format).unwrap_or(Driver::Raw);
        if has_format {
            if probed == Driver::Raw {
                bytes.storage = window_of(top, bytes.storage)?;
            }
            let is_locked = top.driver() == Driver::Luks && top.options.text(KEY_OPTIONS[0]).is_none();
            // That there is no key is said first.
            if !is_locked || self.how.layers == Layers::TopOnly {
                let known = check_options(top, probed, self.how.layers == Layers::Follow);
                // That the bytes are no such image is said before what its options are not.
                known.or_else(|unknown| check_signature(&*bytes.storage, probed).and(Err(unknown)))?;
            }
        }
        let name = filename(top, probed.name());
        let resolver = self.resolver(top, &bytes, &name);
        let Bytes { storage, id, nodes, debugger, files, .. } = bytes;
        let source = ResolvedSource { storage, format, name, id, resolver };
        self.how.policy.check(&source, self.how.looks())?;
        Ok((source, nodes, debugger, files))
    }

    /// The same for what `node` stands on.
    fn on(&self, node: &Node) -> Self {
        Self { is_part: self.is_part || is_part(node), ..*self }
    }

    /// What opens the files of the image called `image`, which is `node` in `bytes`: those that it names, and
    /// those that the user has chosen for it.
    fn resolver(&self, node: &Node, bytes: &Bytes, image: &str) -> Arc<dyn Resolver> {
        let named =
            || (image.to_owned(), self.secrets.clone(), self.how.clone(), self.trail.with_file(bytes.id));
        let inner: Arc<dyn Resolver> = match bytes.resolver.clone() {
            None => Arc::new(NoResolver),
            Some(inner) if self.how.looks() => inner,
            Some(inner) => {
                let (image, secrets, how, trail) = named();
                Arc::new(NamedFiles { inner, image, secrets, how, trail })
            }
        };
        if node.backing == Backing::AsNamed && node.data_file.is_none() {
            return inner;
        }
        let (backing, data_file) = (node.backing.clone(), node.data_file.clone());
        let (image, secrets, how, trail) = named();
        Arc::new(ChosenFiles { inner, image, backing, data_file, secrets, how, trail })
    }

    /// Opens a node that gives bytes.
    fn bytes(&self, node: &Node, role: &'static str) -> Opened<Bytes> {
        let trail = &self.trail.deeper()?;
        let mut bytes = match node.driver() {
            Driver::Qcow2 | Driver::Luks => Opening { trail, ..*self }.driver_bytes(node)?,
            _ => Opening { trail, filter: None, ..*self }.driver_bytes(node)?,
        };
        check_options(node, node.driver(), role.is_empty() && self.how.layers == Layers::Follow)?;
        let facts = NodeFacts {
            driver: node.driver().name(),
            role,
            filename: filename(node, "raw"),
            len: bytes.storage.len().map_err(FailureKind::Storage)?,
            used: bytes.storage.used_bytes().map_err(FailureKind::Storage)?,
            is_file: node.driver().is_file(),
            sibling: Vec::new(),
        };
        bytes.nodes.insert(0, facts);
        Ok(bytes)
    }

    fn driver_bytes(&self, node: &Node) -> Opened<Bytes> {
        Ok(match node.driver() {
            Driver::File | Driver::HostDevice | Driver::HostCdrom => self.file_bytes(node)?,
            Driver::NullCo | Driver::NullAio => Bytes::of(Arc::new(null(&node.options)?)),
            Driver::Nbd => Bytes::of(self.nbd(node)?),
            Driver::Blkdebug => {
                let rules = debug_rules(&node.options)?;
                let mut bytes = self.bytes(below(node)?, "image")?;
                let limits = debug_limits(&node.options)?;
                let debug = BlkdebugStorage::new(bytes.storage, rules).with_limits(limits);
                bytes.debugger = Some(Arc::clone(debug.debugger()));
                bytes.storage = Arc::new(debug);
                bytes
            }
            Driver::Blkverify => self.compared_bytes(node)?,
            Driver::Raw => {
                let mut bytes = self.on(node).bytes(below(node)?, "file")?;
                bytes.storage = RawEvents::wrap(window_of(node, bytes.storage)?);
                bytes
            }
            Driver::Qcow2 => self.image_bytes(node, ImageFormat::Qcow2)?,
            Driver::Luks => self.image_bytes(node, ImageFormat::Luks)?,
            driver if driver.is_filter() => {
                let filter = Filter::of(node, self.how, self.secrets, None, &|node| self.target(node));
                let (child, writable) = (below(node)?, self.how.writable);
                let mut bytes = Opening { filter: filter.as_ref().ok(), ..*self }.bytes(child, "file")?;
                let filter = filter?;
                if !matches!(child.driver(), Driver::Qcow2 | Driver::Luks) {
                    bytes.storage = filter.on_storage(bytes.storage, writable)?;
                }
                bytes
            }
            driver => return Err(FailureKind::UnknownDriver(driver.name().to_owned())),
        })
    }

    /// The disk that gets old content, for writing.
    fn target(&self, node: &Node) -> Opened<Arc<dyn GuestDisk>> {
        let (how, format) = (self.how.below(true), format_of(node));
        let opening = Opening::new(&how, self.secrets, format.as_ref(), self.trail);
        let mut options = EngineOptions::default();
        options.writable = true;
        options.codecs = default_codecs();
        options.keys = Some(Arc::new(Keys::of(node, self.secrets)));
        Ok(qcow2_core::open_disk(opening.open(node)?.0, &options)?)
    }

    /// An image, and the raw copy that it is compared with.
    fn compared_bytes(&self, node: &Node) -> Opened<Bytes> {
        let mut bytes = self.bytes(below(node)?, "raw")?;
        let test = node.second().ok_or(FailureKind::NothingBelow("test"))?;
        let opening = Opening { format: None, filter: None, ..*self };
        let tested = match (test.is_probed(), test.child()) {
            (true, Some(child)) => {
                let found =
                    probe_format(&*opening.bytes(child, "file")?.storage).map_err(FailureKind::Probe)?;
                let driver = Driver::of_format(&found)
                    .ok_or_else(|| FailureKind::UnsupportedFormat(found.name().to_owned()))?;
                opening.bytes(&test.probed_as(driver), "test")?
            }
            _ => opening.bytes(test, "test")?,
        };
        let observer = self.how.mismatch_observer.clone();
        bytes.storage = Arc::new(VerifyStorage::new(tested.storage, bytes.storage, observer));
        bytes.format = None;
        if let Some(first) = bytes.nodes.first_mut() {
            first.sibling = tested.nodes;
        }
        Ok(bytes)
    }

    fn file_bytes(&self, node: &Node) -> Opened<Bytes> {
        let path = node.path().unwrap_or_default();
        let file_text = node.options.text("locking");
        let mut file = self.file();
        if file_text.as_deref() == Some("off") {
            file = file.with_locking(Locking::Off);
        }
        let is_device = node.driver() != Driver::File;
        if is_device {
            check_device(node.driver(), path, self.how.writable)?;
        }
        (file.allow_devices, file.allow_characters) = (is_device, is_device);
        let mut options = SourceOptions::new(file).with_policy(self.how.files());
        options.data_from_here = true;
        options.locking_below = Some(self.locking_below());
        if let Some(format) = self.format {
            options = options.with_format(format.clone());
        }
        let source = open_source(&path_of(path), &options)
            .map_err(|error| FailureKind::File { path: path.to_owned(), error: Box::new(error) })?;
        self.trail.check_new(source.id, &filename(node, "raw"))?;
        let mut bytes = Bytes::of(source.storage);
        (bytes.id, bytes.resolver, bytes.format) = (source.id, Some(source.resolver), Some(source.format));
        Ok(bytes)
    }

    fn nbd(&self, node: &Node) -> Opened<Arc<dyn Storage>> {
        let (address, mut options) = nbd::connection(&node.options, self.secrets)?;
        (options.writable, options.timeout) = (self.how.writable, self.how.policy.timeout);
        let storage =
            NbdStorage::open(&address, &options).map_err(|error| FailureKind::Connect(Box::new(error)))?;
        Ok(self.how.cache.wrap(Arc::new(storage)))
    }

    /// An image's guest disk as the bytes of what stands on it.
    fn image_bytes(&self, node: &Node, format: ImageFormat) -> Opened<Bytes> {
        let inner = Opening { format: Some(&format), filter: None, ..*self };
        let mut bytes = inner.bytes(below(node)?, "file")?;
        let name = filename(node, node.driver().name());
        let (resolver, files) = Recorder::on(
            self.resolver(node, &bytes, &name),
            LayerFiles {
                image: bytes.nodes.first().map_or_else(|| name.clone(), |below| below.filename.clone()),
                ..LayerFiles::default()
            },
        );
        let (storage, format, id) = (bytes.storage, format.clone(), bytes.id);
        let source = ResolvedSource { storage, format, name, id, resolver };
        self.how.policy.check(&source, false)?;
        let mut options = EngineOptions::default();
        options.writable = self.how.writable;
        options.codecs = default_codecs();
        options.keys = Some(Arc::new(Keys::of(node, self.secrets)));
        let disk = qcow2_core::open_disk(source, &options)?;
        let disk = self.filter.map_or(disk.clone(), |filter| filter.on(disk, options.writable));
        bytes.storage = Arc::new(DiskStorage::new(disk));
        bytes.files = files.lock().unwrap_or_else(PoisonError::into_inner).clone();
        bytes.format = None;
        Ok(bytes)
    }
}

impl Bytes {
    fn of(storage: Arc<dyn Storage>) -> Self {
        Self {
            storage,
            id: None,
            resolver: None,
            format: None,
            nodes: Vec::new(),
            debugger: None,
            files: Vec::new(),
        }
    }
}

fn below(node: &Node) -> Opened<&Node> {
    let role = node.driver().child().unwrap_or("file");
    node.child().ok_or(FailureKind::NothingBelow(role))
}

/// Refuses to change what the options want left alone. Returns whether they want no locks.
fn check_access(node: &Node, writable: bool) -> Opened<bool> {
    let is_on = |key: &str| node.options.text(key).and_then(|text| parse_switch(&text)).unwrap_or(false);
    if writable && is_on("read-only") {
        return Err(FailureKind::ReadOnlyNode);
    }
    let shared = is_on("force-share");
    if writable && shared {
        return Err(FailureKind::SharedAndWritable);
    }
    node.children().try_fold(shared, |shared, child| Ok(check_access(child, writable)? || shared))
}

/// Refuses requests that the system is to queue where its page cache stands between. `direct`: whether it
/// does not, as far as the nodes above say.
fn check_aio(node: &Node, direct: bool) -> Opened<()> {
    let said = node.options.text("cache.direct").and_then(|text| parse_switch(&text));
    let direct = said.unwrap_or(direct);
    if node.options.text("aio").as_deref() == Some("native") && !direct {
        return Err(FailureKind::QueuedThroughCache);
    }
    node.children().try_for_each(|child| check_aio(child, direct))
}

fn check_options(node: &Node, probed: Driver, follows: bool) -> Opened<()> {
    match node.unknown_option(probed, follows) {
        Some(unknown) => Err(unknown),
        None => Ok(check_values(&node.options)?),
    }
}

/// Refuses bytes that are no image of `driver`.
pub(super) fn check_signature(storage: &dyn Storage, driver: Driver) -> Opened<()> {
    match driver {
        Driver::Qcow2 => drop(read_header(storage)?),
        Driver::Luks => {
            let mut bytes = [0; LUKS_HEADER_LEN];
            storage.read_padded(HostOffset::new(0), &mut bytes).map_err(FailureKind::Storage)?;
            LuksHeader::parse(&bytes).map_err(FailureKind::Container)?;
        }
        Driver::Qcow => {
            let mut bytes = [0; 8];
            storage.read_padded(HostOffset::new(0), &mut bytes).map_err(FailureKind::Storage)?;
            let [m0, m1, m2, m3, version @ ..] = bytes;
            match u32::from_be_bytes(version) {
                _ if [m0, m1, m2, m3] != *b"QFI\xfb" => return Err(FailureKind::NotQcow),
                1 => {}
                version => return Err(FailureKind::QcowVersion(version)),
            }
        }
        _ => {}
    }
    Ok(())
}

/// Whether `node` is a part of what it stands on.
fn is_part(node: &Node) -> bool {
    node.driver() == Driver::Raw && is_window(&node.options)
}

/// The part of `storage` that `node` is.
fn window_of(node: &Node, storage: Arc<dyn Storage>) -> Opened<Arc<dyn Storage>> {
    if is_part(node) { Ok(window(&node.options, storage)?) } else { Ok(storage) }
}

/// Refuses a name of `driver` that leads to no device. `writable`: whether it is to be written to.
pub(crate) fn check_device(driver: Driver, path: &str, writable: bool) -> Result<(), FailureKind> {
    match not_a_device(path, writable) {
        None => Ok(()),
        Some(None) => Err(FailureKind::NotADevice { driver, path: path.to_owned() }),
        Some(Some(error)) => Err(FailureKind::NoDevice { path: path.to_owned(), error: OsError::new(error) }),
    }
}
