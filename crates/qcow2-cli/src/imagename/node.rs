//! What an image is made of: a format on a protocol, perhaps with filters between them.

use super::nbd;
use super::options::Options;
use crate::crypt::{KEY_OPTIONS, LayerKey};
use qcow2_blockdev::parse_size;
use serde_json::Value;

/// One driver with its options, and what it stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// `None`: a format that is to be probed.
    driver: Option<Driver>,
    /// Its own options.
    pub(crate) options: Options,
    /// What it stands on.
    pub(crate) below: Below,
    /// What is opened instead of the backing file that the image names.
    pub(crate) backing: Backing,
    /// What is opened instead of the data file that the image names.
    pub(crate) data_file: Option<Box<Node>>,
}

/// What a node stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Below {
    /// Nothing of ours.
    Nothing,
    /// Another node.
    Node(Box<Node>),
}

/// The backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// The one that the image names.
    AsNamed,
    /// None, whatever the image names.
    Nothing,
    /// The same, said by an empty name.
    Empty,
    /// This one.
    Node(Box<Node>),
    /// The one that the image names, with these options for its secrets.
    Keys(Box<Node>),
}

/// The drivers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    Qcow2,
    Raw,
    Luks,
    File,
    HostDevice,
    NullCo,
    NullAio,
    Blkdebug,
    Nbd,
}

impl Driver {
    /// All names, in the order of letters.
    pub(crate) const NAMES: [&'static str; 9] =
        ["blkdebug", "file", "host_device", "luks", "nbd", "null-aio", "null-co", "qcow2", "raw"];

    /// The driver called `name`. Errors: the message.
    pub(crate) fn parse(name: &str) -> Result<Self, String> {
        Ok(match name {
            "qcow2" => Self::Qcow2,
            "raw" => Self::Raw,
            "luks" => Self::Luks,
            "file" => Self::File,
            "host_device" => Self::HostDevice,
            "null-co" => Self::NullCo,
            "null-aio" => Self::NullAio,
            "blkdebug" => Self::Blkdebug,
            "nbd" => Self::Nbd,
            _ => return Err(format!("Unknown driver '{name}'")),
        })
    }

    /// Its name.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Luks => "luks",
            Self::File => "file",
            Self::HostDevice => "host_device",
            Self::NullCo => "null-co",
            Self::NullAio => "null-aio",
            Self::Blkdebug => "blkdebug",
            Self::Nbd => "nbd",
        }
    }

    /// Whether it is about where bytes are, not about what they mean.
    pub(crate) fn is_protocol(&self) -> bool {
        !matches!(self, Self::Qcow2 | Self::Raw | Self::Luks)
    }

    /// What it calls the node that it stands on.
    pub(crate) fn child(&self) -> Option<&'static str> {
        match self {
            Self::Qcow2 | Self::Raw | Self::Luks => Some("file"),
            Self::Blkdebug => Some("image"),
            _ => None,
        }
    }

    /// Options that change what is read, and so belong to the name.
    pub(super) fn is_strong(&self, key: &str) -> bool {
        match self {
            Self::Qcow2 => key.starts_with("encrypt."),
            Self::Raw => matches!(key, "offset" | "size"),
            Self::Luks => KEY_OPTIONS.contains(&key),
            Self::File | Self::HostDevice => key == "filename",
            Self::NullCo | Self::NullAio => matches!(key, "size" | "read-zeroes"),
            Self::Blkdebug => {
                key == "config" || key.starts_with("inject-error.") || key.starts_with("set-state.")
            }
            Self::Nbd => !GENERAL.contains(&key),
        }
    }

    /// Whether it knows option `key`, which begins none of its children's.
    fn knows(&self, key: &str) -> bool {
        let own: &[&str] = match self {
            Self::Qcow2 => &QCOW2,
            Self::Raw => &["offset", "size"],
            Self::Luks => &[],
            Self::File | Self::HostDevice => &FILE,
            Self::NullCo | Self::NullAio => &["size", "read-zeroes", "latency-ns"],
            Self::Blkdebug => &BLKDEBUG,
            Self::Nbd => &NBD,
        };
        GENERAL.contains(&key)
            || own.contains(&key)
            || (*self != Self::Raw && self.is_strong(key) && *self != Self::Nbd)
            || (*self == Self::Nbd && key.starts_with("server."))
            || (*self == Self::Blkdebug && key.contains("-child-perms."))
    }
}

impl Node {
    /// A node on nothing, without options.
    pub(crate) fn new(driver: Option<Driver>) -> Self {
        Self {
            driver,
            options: Options::default(),
            below: Below::Nothing,
            backing: Backing::AsNamed,
            data_file: None,
        }
    }

    /// A file.
    pub(crate) fn file(path: &str) -> Self {
        let mut node = Self::new(Some(Driver::File));
        node.options.set("filename", Value::String(path.to_owned()));
        node
    }

    /// A node on another one.
    pub(super) fn on(driver: Option<Driver>, below: Self) -> Self {
        Self { below: Below::Node(Box::new(below)), ..Self::new(driver) }
    }

    /// Its driver; raw where that is to be probed.
    pub(crate) fn driver(&self) -> &Driver {
        self.driver.as_ref().unwrap_or(&Driver::Raw)
    }

    /// Whether the format is to be probed.
    pub(crate) fn is_probed(&self) -> bool {
        self.driver.is_none()
    }

    /// What the options say of the secrets of this layer and of those below it.
    pub(crate) fn layer_keys(&self) -> Vec<LayerKey> {
        let (mut keys, mut next) = (Vec::new(), Some(self));
        while let Some(node) = next {
            let option =
                |key: &str| node.options.text(&format!("encrypt.{key}")).or_else(|| node.options.text(key));
            keys.push(LayerKey { secret: option(KEY_OPTIONS[0]), max_iterations: option(KEY_OPTIONS[1]) });
            next = match &node.backing {
                Backing::Node(below) | Backing::Keys(below) => Some(below),
                Backing::AsNamed | Backing::Nothing | Backing::Empty => None,
            };
        }
        keys
    }

    /// What the options say of the backing file: nothing, that there is none, or which one.
    pub(crate) fn other_backing(&self) -> Option<Option<Self>> {
        match &self.backing {
            Backing::AsNamed | Backing::Keys(_) => None,
            Backing::Nothing | Backing::Empty => Some(None),
            Backing::Node(node) => Some(Some((**node).clone())),
        }
    }

    /// Whether a layer is said to have no backing file by an empty name for it.
    pub(super) fn names_empty_backing(&self) -> bool {
        match &self.backing {
            Backing::Empty => true,
            Backing::Node(below) | Backing::Keys(below) => below.names_empty_backing(),
            Backing::AsNamed | Backing::Nothing => false,
        }
    }

    /// The complaint about an option that one of the layers below does not have.
    pub(crate) fn unknown_below(&self) -> Option<String> {
        match &self.backing {
            Backing::Keys(below) => {
                below.unknown_option(&Driver::Qcow2, true).or_else(|| below.unknown_below())
            }
            _ => None,
        }
    }

    /// The node below.
    pub(crate) fn child(&self) -> Option<&Self> {
        match &self.below {
            Below::Nothing => None,
            Below::Node(node) => Some(node),
        }
    }

    /// The file at the bottom, if there is one.
    pub(crate) fn path(&self) -> Option<&str> {
        match (self.child(), self.driver()) {
            (Some(child), _) => child.path(),
            (None, Driver::File | Driver::HostDevice) => {
                self.options.iter().find(|(key, _)| *key == "filename").and_then(|(_, value)| value.as_str())
            }
            _ => None,
        }
    }

    /// Where the first byte of a raw node is, in what is at the bottom of nothing but raw nodes and filters.
    pub(crate) fn raw_start(&self) -> u64 {
        let own = match self.driver() {
            Driver::Raw => self.options.text("offset").and_then(|text| parse_size(&text).ok()).unwrap_or(0),
            Driver::Blkdebug => 0,
            _ => return 0,
        };
        self.child().map_or(own, |child| own.saturating_add(child.raw_start()))
    }

    /// Options that change what is read.
    pub(super) fn strong(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.options.iter().filter(|(key, _)| self.driver().is_strong(key))
    }

    /// An option about the layer below.
    fn backing_option(&self) -> Option<String> {
        match &self.backing {
            Backing::Node(below) if below.is_probed() => Some("backing.file.filename".to_owned()),
            Backing::Node(_) => Some("backing.driver".to_owned()),
            Backing::Keys(below) => below.options.iter().next().map(|(key, _)| format!("backing.{key}")),
            Backing::AsNamed | Backing::Nothing | Backing::Empty => None,
        }
    }

    /// The complaint about an option that the driver does not have. `probed`: the driver where none is named;
    /// `follows`: whether backing files are opened too.
    pub(crate) fn unknown_option(&self, probed: &Driver, follows: bool) -> Option<String> {
        let driver = self.driver.as_ref().unwrap_or(probed);
        let unknown = |key: &&str| !driver.knows(key);
        let own = || self.options.iter().map(|(key, _)| key).filter(unknown);
        let below = self.backing_option().filter(|_| *driver != Driver::Qcow2);
        let is_below = |key: &str| key == "backing" || key.starts_with("backing.");
        if follows && (below.is_some() || own().any(is_below)) {
            return Some("Driver doesn't support backing files".to_owned());
        }
        let key = own().next().map(str::to_owned).or(below)?;
        let name = driver.name();
        Some(match driver.is_protocol() {
            true => format!("Block protocol '{name}' doesn't support the option '{key}'"),
            false => format!("Block format '{name}' does not support the option '{key}'"),
        })
    }
}

/// Understands a plain name. `format`: that of the image, where it is given. Errors: the reason.
pub(super) fn from_name(name: &str, format: Option<&str>) -> Result<Node, String> {
    let format = format.map(Driver::parse).transpose()?;
    if let Some(text) = name.strip_prefix("json:") {
        let mut options = Options::from_json(text)?;
        if let Some(format) = format {
            options.set("driver", Value::String(format.name().to_owned()));
        }
        return from_options(options, false, 0);
    }
    match format {
        Some(driver) if driver.is_protocol() => protocol(driver, name, 0),
        format => Ok(Node::on(format, protocol_from_name(name)?)),
    }
}

/// Understands an option string; adds to `warnings`. Errors: the reason.
pub(super) fn from_option_string(text: &str, warnings: &mut Vec<String>) -> Result<Node, String> {
    if text.is_empty() || text.starts_with('=') {
        return from_options(Options::default(), false, 0);
    }
    if !text.contains('=') {
        let name = Options::lone_name(text);
        return Err(format!("Cannot find device='{name}' nor node-name='{name}'"));
    }
    from_options(Options::from_string(text, warnings)?, false, 0)
}

/// Understands the name of bytes, whatever they mean. Errors: the reason.
pub(super) fn protocol_from_name(name: &str) -> Result<Node, String> {
    protocol_below(name, 0)
}

/// The same below `depth` other nodes.
fn protocol_below(name: &str, depth: usize) -> Result<Node, String> {
    if name.is_empty() {
        return Err(NO_NAME.to_owned());
    }
    protocol(protocol_of(name)?, name, depth)
}

/// The driver that the beginning of `name` asks for; a plain path is a file's. Errors: the reason.
pub(super) fn protocol_of(name: &str) -> Result<Driver, String> {
    match name.split_once(':') {
        Some((prefix, _)) if !prefix.contains('/') => match prefix {
            "nbd+tcp" | "nbd+unix" => Ok(Driver::Nbd),
            "raw" | "qcow2" | "luks" => Err(format!("Unknown protocol '{prefix}'")),
            _ => Driver::parse(prefix).map_err(|_| format!("Unknown protocol '{prefix}'")),
        },
        _ => Ok(Driver::File),
    }
}

/// The node of protocol `driver` that `name` means, below `depth` others.
fn protocol(driver: Driver, name: &str, depth: usize) -> Result<Node, String> {
    let depth = deeper(depth)?;
    let mut node = Node::new(Some(driver.clone()));
    let own = name.strip_prefix(driver.name()).and_then(|rest| rest.strip_prefix(':'));
    match driver {
        Driver::File | Driver::HostDevice => {
            let path = own.unwrap_or(name);
            if path.is_empty() {
                return Err(NO_NAME.to_owned());
            }
            node.options.set("filename", Value::String(path.to_owned()));
        }
        Driver::NullCo | Driver::NullAio if own == Some("//") => {}
        Driver::NullCo | Driver::NullAio => {
            let scheme = driver.name();
            return Err(format!("The only allowed filename for this driver is '{scheme}://'"));
        }
        Driver::Blkdebug => {
            let image = match own.map(|rest| rest.split_once(':')) {
                None => name,
                Some(None) => return Err("blkdebug requires both config file and image path".to_owned()),
                Some(Some((config, image))) => {
                    if !config.is_empty() {
                        node.options.set("config", Value::String(config.to_owned()));
                    }
                    image
                }
            };
            node.below = Below::Node(Box::new(protocol_below(image, depth)?));
        }
        Driver::Nbd => node.options = nbd::from_name(name)?,
        Driver::Raw | Driver::Qcow2 | Driver::Luks => {
            return Err(format!("Unknown protocol '{}'", driver.name()));
        }
    }
    Ok(node)
}

/// One node more. Errors: a name has too many, each below the one before.
fn deeper(depth: usize) -> Result<usize, String> {
    if depth >= MAX_NODES {
        return Err(format!("More than {MAX_NODES} images and filters stand below one another"));
    }
    Ok(depth + 1)
}

/// Makes the tree of an image's options, below `depth` other nodes. `inner`: it is what another node stands
/// on.
fn from_options(mut options: Options, inner: bool, depth: usize) -> Result<Node, String> {
    let depth = deeper(depth)?;
    let driver = match options.take_text("driver") {
        Some(name) => Some(Driver::parse(&name)?),
        None if inner => match options.text("filename") {
            Some(path) if crate::open::is_block_device(&path) => Some(Driver::HostDevice),
            Some(_) => Some(Driver::File),
            None => return Err(NO_DRIVER.to_owned()),
        },
        None if options.iter().any(|(key, _)| key == "file" || key.starts_with("file.")) => None,
        None => return Err(NO_DRIVER.to_owned()),
    };
    let mut node = Node::new(driver);
    if let Some(role) = node.driver().child() {
        node.below = Below::Node(Box::new(child(&mut options, role, depth)?));
    }
    if *node.driver() == Driver::Qcow2 || node.is_probed() {
        node.backing = backing(&mut options, depth)?;
        if let Some(name) = options.take_text("data-file") {
            return Err(no_such_node(&name));
        }
        let data_file = options.take_group("data-file");
        if !data_file.is_empty() {
            node.data_file = Some(Box::new(from_options(data_file, true, depth)?));
        }
    }
    let needs_name = matches!(node.driver(), Driver::File | Driver::HostDevice);
    if needs_name && options.text("filename").is_none_or(|path| path.is_empty()) {
        return Err(format!("The '{}' block driver requires a file name", node.driver().name()));
    }
    node.options = options;
    Ok(node)
}

/// The node that `role` names: `role` alone is the name of a node, of which there are none.
fn child(options: &mut Options, role: &str, depth: usize) -> Result<Node, String> {
    if let Some(name) = options.take_text(role) {
        return Err(no_such_node(&name));
    }
    if role == "image"
        && let Some(name) = options.take_text("x-image")
    {
        return protocol_below(&name, depth);
    }
    let inner = options.take_group(role);
    match inner.is_empty() {
        true => Err(format!("A block device must be specified for \"{role}\"")),
        false => from_options(inner, true, depth),
    }
}

/// What `options` say of the backing file of a node that is the `depth`-th from the top.
fn backing(options: &mut Options, depth: usize) -> Result<Backing, String> {
    match options.take("backing") {
        Some(Value::Null) => return Ok(Backing::Nothing),
        Some(Value::String(name)) if name.is_empty() => return Ok(Backing::Empty),
        Some(Value::String(name)) => {
            return Err(format!("Could not open backing file: {}", no_such_node(&name)));
        }
        _ => {}
    }
    let mut inner = options.take_group("backing");
    let names = |key: &str| key == "file" || key.starts_with("file.");
    // Without a name it is that of the file which the image names.
    if let Some(name) = inner.text("driver").filter(|_| !inner.iter().any(|(key, _)| names(key))) {
        let driver = Driver::parse(&name)?;
        if driver.is_protocol() {
            return Ok(Backing::Node(Box::new(from_options(inner, false, depth)?)));
        }
        inner.take("driver");
        if inner.is_empty() {
            return Ok(Backing::AsNamed);
        }
    }
    match inner.is_empty() {
        true => Ok(Backing::AsNamed),
        false if !inner.iter().any(|(key, _)| names(key)) => {
            let mut node = Node::new(None);
            node.backing = backing(&mut inner, deeper(depth)?)?;
            node.options = inner;
            Ok(Backing::Keys(Box::new(node)))
        }
        false => Ok(Backing::Node(Box::new(from_options(inner, false, depth)?))),
    }
}

fn no_such_node(name: &str) -> String {
    format!("Cannot find device='{name}' nor node-name='{name}'")
}

/// Nodes of a name one below the other, at most. Origin: ours; QEMU has no limit.
const MAX_NODES: usize = 256;
const NO_NAME: &str = "The 'file' block driver requires a file name";
const NO_DRIVER: &str = "Must specify either driver or file";

/// What every driver takes.
const GENERAL: [&str; 9] = [
    "node-name",
    "read-only",
    "auto-read-only",
    "discard",
    "detect-zeroes",
    "force-share",
    "cache.direct",
    "cache.no-flush",
    "cache.writeback",
];
/// What a file takes; none of it but the name changes what is read.
const FILE: [&str; 7] =
    ["filename", "locking", "aio", "aio-max-batch", "drop-cache", "pr-manager", "x-check-cache-dropped"];
/// What a qcow2 image takes; none of it changes what is read.
const QCOW2: [&str; 21] = [
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "overlap-check.template",
    "overlap-check.main-header",
    "overlap-check.active-l1",
    "overlap-check.active-l2",
    "overlap-check.refcount-table",
    "overlap-check.refcount-block",
    "overlap-check.snapshot-table",
    "overlap-check.inactive-l1",
    "overlap-check.inactive-l2",
    "overlap-check.bitmap-directory",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
];
const BLKDEBUG: [&str; 7] =
    ["config", "align", "max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard"];
const NBD: [&str; 9] = [
    "host",
    "port",
    "path",
    "export",
    "tls-creds",
    "tls-hostname",
    "x-dirty-bitmap",
    "reconnect-delay",
    "open-timeout",
];
