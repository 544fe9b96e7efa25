//! From a tree of drivers to bytes: the one place where storages are chosen and stacked.

use super::disk_storage::DiskStorage;
use super::named::NamedBacking;
use super::trail::Trail;
use super::{OpenAs, Sharing, codecs, is_block_device, open_files};
use crate::args::ImageArgs;
use crate::crypt::{KEY_OPTIONS, Keys};
use crate::failure::Failure;
use crate::imagename::{Driver, Node, debug_rules, filename, nbd_server};
use crate::render::qemu_text;
use qcow2_blockdev::{SizeError, parse_size};
use qcow2_core::{
    ImageFormat, Layers, NoResolver, OpenOptions, ResolveError, ResolvedSource, Resolver, SourceId, Storage,
};
use qcow2_io::{
    BlkdebugStorage, Debugger, LockConflict, Locking, MemoryStorage, NbdStorage, NullStorage, OpenFile,
    Policy, SourceOptions, WindowStorage, open_source, probe_format,
};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

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
}

/// What is told of one node.
#[derive(Clone, Debug)]
pub(crate) struct NodeFacts {
    /// The driver's name.
    pub(crate) driver: &'static str,
    /// What the node above calls it.
    pub(crate) role: &'static str,
    /// Its name.
    pub(crate) filename: String,
    /// Its bytes.
    pub(crate) len: u64,
    /// Bytes of real space, where that is known.
    pub(crate) used: Option<u64>,
    /// Whether it is a file.
    pub(crate) is_file: bool,
}

/// A failure that does not know yet which image it is about.
pub(super) struct Trouble {
    reason: String,
    hints: Vec<String>,
    /// The lock that was not to be had, where that is the reason.
    conflict: Option<LockConflict>,
}

impl Trouble {
    pub(super) fn about(self, typed: &str) -> Failure {
        self.hints.into_iter().fold(Failure::could_not_open(typed, &self.reason), Failure::hint)
    }

    /// The same for what an image names.
    pub(super) fn in_image(self) -> ResolveError {
        let lines: Vec<String> = std::iter::once(self.reason).chain(self.hints).collect();
        let error = ResolveError::failed(lines.join("\n"));
        match self.conflict {
            Some(conflict) => error.with_source(conflict),
            None => error,
        }
    }
}

impl From<String> for Trouble {
    fn from(reason: String) -> Self {
        Self { reason, hints: Vec::new(), conflict: None }
    }
}

type Opened<T> = Result<T, Trouble>;

/// How the bytes below a format are opened.
#[derive(Clone, Copy)]
pub(super) struct Opening<'a> {
    args: &'a ImageArgs,
    how: OpenAs,
    /// The format that stands on them, where it is known.
    format: Option<&'a ImageFormat>,
    /// Whether whoever stands on them relies on their length.
    is_part: bool,
    /// How they were reached.
    trail: &'a Trail,
}

impl<'a> Opening<'a> {
    pub(super) fn new(
        args: &'a ImageArgs,
        how: OpenAs,
        format: Option<&'a ImageFormat>,
        trail: &'a Trail,
    ) -> Self {
        Self { args, how, format, is_part: false, trail }
    }
}

impl Opening<'_> {
    fn file(&self) -> OpenFile {
        let file = if self.how.writable { OpenFile::writable() } else { OpenFile::read_only() };
        let mut file = file.with_cache(self.how.cache).with_locking(self.locking()).among(open_files());
        file.resizes = self.how.resizes;
        file.metadata_only = self.how.layers == Layers::TopOnly;
        file
    }

    fn locking(&self) -> Locking {
        let has_metadata = self.format == Some(&ImageFormat::Qcow2);
        match self.how.sharing {
            _ if self.args.force_share => Locking::Shared,
            Sharing::Alone | Sharing::TopAlone => Locking::NoOtherWriters,
            Sharing::ByFormat if self.is_part && !has_metadata => Locking::FixedLength,
            Sharing::ByFormat => Locking::Auto,
        }
    }

    /// That of the files which the image names.
    fn locking_below(&self) -> Locking {
        Opening { how: self.how.below(false), is_part: false, ..*self }.locking()
    }

    fn policy(&self) -> Policy {
        if self.how.layers == Layers::TopOnly { Policy::Deny } else { Policy::Allow }
    }

    /// Opens the whole tree. The format on top is probed where it is not given.
    pub(super) fn open(&self, top: &Node) -> Opened<(ResolvedSource, Vec<NodeFacts>, Option<Arc<Debugger>>)> {
        check_aio(top, self.how.cache.is_direct())?;
        let shared = check_access(top, self.how.writable)?;
        let args = ImageArgs { force_share: self.args.force_share || shared, ..self.args.clone() };
        Opening { args: &args, ..*self }.open_tree(top)
    }

    fn open_tree(&self, top: &Node) -> Opened<(ResolvedSource, Vec<NodeFacts>, Option<Arc<Debugger>>)> {
        let mut bytes = match (top.driver().is_protocol(), top.child()) {
            (false, Some(child)) => self.on(top).bytes(child, "file")?,
            _ => self.bytes(top, "")?,
        };
        let format = match (self.format, bytes.format.take()) {
            (Some(format), _) => format.clone(),
            (None, _) if top.driver().is_protocol() => ImageFormat::Raw,
            (None, Some(format)) => format,
            (None, None) => probe_format(&*bytes.storage).map_err(|error| {
                format!("Could not read image for determining its format: {}", qemu_text::storage(&error))
            })?,
        };
        let probed = match format {
            ImageFormat::Qcow2 => Driver::Qcow2,
            ImageFormat::Luks => Driver::Luks,
            _ => Driver::Raw,
        };
        if !top.driver().is_protocol() {
            if probed == Driver::Raw {
                bytes.storage = window(top, bytes.storage)?;
            }
            let is_locked = *top.driver() == Driver::Luks && top.options.text(KEY_OPTIONS[0]).is_none();
            // That there is no key is said first.
            if !is_locked || self.how.layers == Layers::TopOnly {
                check_options(top, &probed, self.how.layers == Layers::Follow)?;
            }
        }
        let resolver = self.resolver(&bytes);
        let Bytes { storage, id, nodes, debugger, .. } = bytes;
        Ok((
            ResolvedSource { storage, format, name: filename(top, probed.name()), id, resolver },
            nodes,
            debugger,
        ))
    }

    /// The same for what `node` stands on.
    fn on(&self, node: &Node) -> Self {
        Self { is_part: self.is_part || is_window(node), ..*self }
    }

    /// What opens the names in `bytes`.
    fn resolver(&self, bytes: &Bytes) -> Arc<dyn Resolver> {
        let Some(inner) = bytes.resolver.clone() else { return Arc::new(NoResolver) };
        if self.policy() != Policy::Allow {
            return inner;
        }
        let (args, how) = (self.args.clone(), self.how);
        Arc::new(NamedBacking { inner, args, how, trail: self.trail.with_file(bytes.id) })
    }

    /// Opens a node that gives bytes.
    fn bytes(&self, node: &Node, role: &'static str) -> Opened<Bytes> {
        let trail = &self.trail.deeper()?;
        let mut bytes = Opening { trail, ..*self }.driver_bytes(node)?;
        check_options(node, node.driver(), role.is_empty() && self.how.layers == Layers::Follow)?;
        let failed = |error| Trouble::from(qemu_text::storage(&error));
        let is_file = matches!(node.driver(), Driver::File | Driver::HostDevice);
        let path = node.path().filter(|_| is_file);
        let facts = NodeFacts {
            driver: if path.is_some_and(is_block_device) { "host_device" } else { node.driver().name() },
            role,
            filename: filename(node, "raw"),
            len: bytes.storage.len().map_err(failed)?,
            used: bytes.storage.used_bytes().map_err(failed)?,
            is_file,
        };
        bytes.nodes.insert(0, facts);
        Ok(bytes)
    }

    fn driver_bytes(&self, node: &Node) -> Opened<Bytes> {
        Ok(match node.driver() {
            Driver::File | Driver::HostDevice => self.file_bytes(node)?,
            Driver::NullCo | Driver::NullAio => Bytes::of(Arc::new(null(node)?)),
            Driver::Nbd => Bytes::of(self.nbd(node)?),
            Driver::Blkdebug => {
                let rules = debug_rules(&node.options)?;
                let mut bytes = self.bytes(below(node)?, "image")?;
                let debug = BlkdebugStorage::new(bytes.storage, rules);
                bytes.debugger = Some(Arc::clone(debug.debugger()));
                bytes.storage = Arc::new(debug);
                bytes
            }
            Driver::Raw => {
                let mut bytes = self.on(node).bytes(below(node)?, "file")?;
                bytes.storage = window(node, bytes.storage)?;
                bytes
            }
            Driver::Qcow2 => self.image_bytes(node, ImageFormat::Qcow2)?,
            Driver::Luks => self.image_bytes(node, ImageFormat::Luks)?,
        })
    }

    fn file_bytes(&self, node: &Node) -> Opened<Bytes> {
        let path = node.path().unwrap_or_default();
        let file_text = node.options.text("locking");
        let mut file = self.file();
        if file_text.as_deref() == Some("off") {
            file = file.with_locking(Locking::Off);
        }
        if let Some(reason) = super::not_a_device(path).filter(|_| *node.driver() == Driver::HostDevice) {
            return Err(reason.into());
        }
        let mut options = SourceOptions::new(file).with_policy(self.policy());
        options.locking_below = Some(self.locking_below());
        if let Some(format) = self.format {
            options = options.with_format(format.clone());
        }
        let source = open_source(Path::new(path), &options).map_err(|error| {
            let (reason, hint) = qemu_text::source_reason(&error, path);
            let conflict = qemu_text::find(&error).copied();
            Trouble { reason, hints: hint.into_iter().collect(), conflict }
        })?;
        self.trail.check_new(source.id, &filename(node, "raw"))?;
        let mut bytes = Bytes::of(source.storage);
        (bytes.id, bytes.resolver, bytes.format) = (source.id, Some(source.resolver), Some(source.format));
        Ok(bytes)
    }

    fn nbd(&self, node: &Node) -> Opened<Arc<dyn Storage>> {
        let (address, export) = nbd_server(&node.options)?;
        let storage = NbdStorage::connect(&address, &export, self.how.writable).map_err(|error| {
            let server = error.server_message().map(|text| format!("server reported: {text}"));
            Trouble { hints: server.into_iter().collect(), ..Trouble::from(error.to_string()) }
        })?;
        Ok(self.how.cache.wrap(Arc::new(storage)))
    }

    /// An image's guest disk as the bytes of what stands on it.
    fn image_bytes(&self, node: &Node, format: ImageFormat) -> Opened<Bytes> {
        let inner = Opening { format: Some(&format), ..*self };
        let mut bytes = inner.bytes(below(node)?, "file")?;
        let resolver = self.resolver(&bytes);
        let source = ResolvedSource {
            storage: bytes.storage,
            format: format.clone(),
            name: filename(node, node.driver().name()),
            id: bytes.id,
            resolver,
        };
        let mut options = OpenOptions::default();
        options.writable = self.how.writable;
        options.codecs = codecs();
        options.keys = Some(Arc::new(Keys::new(node.layer_keys(), &self.args.objects)));
        let disk = qcow2_core::open_disk(source, &options).map_err(|error| {
            let (reason, hint) = qemu_text::engine_reason(&error);
            Trouble { reason, hints: hint.into_iter().collect(), conflict: qemu_text::find(&error).copied() }
        })?;
        bytes.storage = Arc::new(DiskStorage::new(disk));
        bytes.format = None;
        Ok(bytes)
    }
}

impl Bytes {
    fn of(storage: Arc<dyn Storage>) -> Self {
        Self { storage, id: None, resolver: None, format: None, nodes: Vec::new(), debugger: None }
    }
}

fn below(node: &Node) -> Opened<&Node> {
    let role = node.driver().child().unwrap_or("file");
    node.child().ok_or_else(|| format!("A block device must be specified for \"{role}\"").into())
}

/// Refuses to change what the options want left alone. Returns whether they want no locks.
fn check_access(node: &Node, writable: bool) -> Opened<bool> {
    let is_on = |key: &str| {
        node.options.text(key).and_then(|text| crate::imageopts::parse_switch(&text)).unwrap_or(false)
    };
    if writable && is_on("read-only") {
        return Err("Block node is read-only".to_owned().into());
    }
    let shared = is_on("force-share");
    if writable && shared {
        return Err("force-share=on can only be used with read-only images".to_owned().into());
    }
    Ok(node.child().map_or(Ok(false), |child| check_access(child, writable))? || shared)
}

/// Refuses requests that the system is to queue where its page cache stands between. `direct`: whether it
/// does not, as far as the nodes above say.
fn check_aio(node: &Node, direct: bool) -> Opened<()> {
    let said = node.options.text("cache.direct").and_then(|text| crate::imageopts::parse_switch(&text));
    let direct = said.unwrap_or(direct);
    if node.options.text("aio").as_deref() == Some("native") && !direct {
        return Err(super::NATIVE_NEEDS_DIRECT.to_owned().into());
    }
    node.child().map_or(Ok(()), |child| check_aio(child, direct))
}

fn check_options(node: &Node, probed: &Driver, follows: bool) -> Opened<()> {
    if let Some(text) = node.unknown_option(probed, follows) {
        return Err(text.into());
    }
    super::values::check(node).map_err(|failure| failure.to_string().into())
}

/// Whether the options of `node` choose a part of what it stands on.
fn is_window(node: &Node) -> bool {
    *node.driver() == Driver::Raw
        && (node.options.text("offset").is_some() || node.options.text("size").is_some())
}

/// The part of `storage` that a raw node's options choose.
fn window(node: &Node, storage: Arc<dyn Storage>) -> Opened<Arc<dyn Storage>> {
    if !is_window(node) {
        return Ok(storage);
    }
    let (offset, size) = (size_option(node, "offset")?.unwrap_or(0), size_option(node, "size")?);
    let len = storage.len().map_err(|error| qemu_text::storage(&error))?;
    // A file counts in whole sectors.
    let len = len.checked_next_multiple_of(512).unwrap_or(len);
    if offset > len {
        let what = format!("Offset ({offset}) cannot be greater than size of the containing file ({len})");
        return Err(what.into());
    }
    if let Some(size) = size {
        if size > len - offset {
            return Err(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of \
                 the containing file ({len})"
            )
            .into());
        }
        if !size.is_multiple_of(512) {
            return Err("Specified size is not multiple of 512".to_owned().into());
        }
    }
    let window = WindowStorage::new(storage, offset, size).map_err(|error| qemu_text::storage(&error))?;
    Ok(Arc::new(window))
}

fn null(node: &Node) -> Opened<NullStorage> {
    let mut storage = NullStorage::new(size_option(node, "size")?.unwrap_or(DEFAULT_NULL_SIZE));
    storage.latency = match node.options.text("latency-ns").map(|text| text.parse()) {
        None => Duration::ZERO,
        Some(Ok(nanoseconds)) => Duration::from_nanos(nanoseconds),
        Some(Err(_)) => return Err("Parameter 'latency-ns' expects a number".to_owned().into()),
    };
    storage.promises_zeroes =
        match node.options.text("read-zeroes").as_deref().map(crate::imageopts::parse_switch) {
            None => false,
            Some(Some(on)) => on,
            Some(None) => return Err("Parameter 'read-zeroes' expects 'on' or 'off'".to_owned().into()),
        };
    Ok(storage)
}

fn size_option(node: &Node, key: &str) -> Opened<Option<u64>> {
    let given = node.options.iter().any(|(known, value)| known == key && !value.is_null());
    let Some(text) = node.options.text(key).filter(|_| given) else { return Ok(None) };
    match parse_size(&text) {
        Ok(size) => Ok(Some(size)),
        Err(SizeError::Range) => Err(format!("Value '{text}' is out of range for parameter '{key}'").into()),
        Err(SizeError::Syntax) => Err(Trouble {
            hints: vec![
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-".to_owned(),
                "and exabytes, respectively.".to_owned(),
            ],
            ..Trouble::from(format!("Parameter '{key}' expects a non-negative number below 2^64"))
        }),
    }
}

/// Resolves what an image names, but for the backing file, which the user has named.
pub(super) struct OtherBacking {
    pub(super) inner: Arc<dyn Resolver>,
    /// `None`: none at all.
    pub(super) node: Option<Node>,
    pub(super) args: ImageArgs,
    pub(super) how: OpenAs,
}

impl Resolver for OtherBacking {
    fn resolve(
        &self,
        reference: qcow2_core::Reference<'_>,
        writable: bool,
    ) -> Result<ResolvedSource, ResolveError> {
        if !matches!(reference, qcow2_core::Reference::Backing { .. }) {
            return self.inner.resolve(reference, writable);
        }
        let Some(node) = &self.node else {
            // A backing file without a byte hides nothing and shows nothing.
            return Ok(ResolvedSource {
                storage: Arc::new(MemoryStorage::new()),
                format: ImageFormat::Raw,
                name: String::new(),
                id: None,
                resolver: Arc::new(NoResolver),
            });
        };
        let (format, trail) = (super::format_of(node), Trail::default());
        let opening = Opening::new(&self.args, self.how.below(false), format.as_ref(), &trail);
        let opened = opening.open(node).map(|(source, ..)| source);
        opened.map_err(Trouble::in_image)
    }
}

/// Resolves what an image names, but for the data file, which the user has named.
pub(super) struct OtherDataFile {
    pub(super) inner: Arc<dyn Resolver>,
    pub(super) node: Node,
    pub(super) args: ImageArgs,
    pub(super) how: OpenAs,
}

impl Resolver for OtherDataFile {
    fn resolve(
        &self,
        reference: qcow2_core::Reference<'_>,
        writable: bool,
    ) -> Result<ResolvedSource, ResolveError> {
        if !matches!(reference, qcow2_core::Reference::DataFile { .. }) {
            return self.inner.resolve(reference, writable);
        }
        let how = OpenAs { writable, resizes: true, ..self.how.below(false) };
        let trail = Trail::default();
        let opening = Opening::new(&self.args, how, Some(&ImageFormat::Raw), &trail);
        let opening = Opening { is_part: true, ..opening };
        let opened = opening.open(&self.node).map(|(source, ..)| source);
        opened.map_err(Trouble::in_image)
    }
}

/// Bytes of a disk of nothing whose size is not given.
const DEFAULT_NULL_SIZE: u64 = 1 << 30;
