//! What an image is made of: a format on a protocol, perhaps with filters between them.

use super::options::Options;
use super::scalar::Scalar;
use crate::driver::{Driver, is_device};
use crate::failure::FailureKind;
use crate::size::parse_size;

/// One driver with its options, and what it stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// `None`: a format that is to be probed.
    driver: Option<Driver>,
    /// Its own options.
    pub options: Options,
    /// What it stands on.
    pub(crate) below: Option<Box<Self>>,
    /// The other node that it needs.
    pub(crate) second: Option<Box<Self>>,
    /// What is opened instead of the backing file that the image names.
    pub backing: Backing,
    /// What is opened instead of the data file that the image names.
    pub data_file: Option<Box<Self>>,
}

/// The backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// The one that the image names.
    AsNamed,
    /// None, whatever the image names.
    Nothing,
    /// The same, said by an empty name.
    Empty,
    /// This one. Where the options have no `file.filename`, it is the one that the image names, opened with
    /// them.
    Given(Options),
}

impl Backing {
    /// What the options for it say of the backing file below.
    fn below(&self) -> Self {
        let Self::Given(options) = self else { return Self::AsNamed };
        match options.iter().find(|(key, _)| *key == "backing") {
            Some((_, Scalar::Null)) => Self::Nothing,
            Some((_, Scalar::Text(name))) if name.is_empty() => Self::Empty,
            _ => {
                let inner = options.clone().take_group("backing");
                if inner.is_empty() { Self::AsNamed } else { Self::Given(inner) }
            }
        }
    }

    /// Those of this layer and of the ones below, as far as options say something of them.
    pub(crate) fn layers(&self) -> impl Iterator<Item = Self> {
        let first = Some(self.clone()).filter(|layer| *layer != Self::AsNamed);
        std::iter::successors(first, |layer| Some(layer.below()).filter(|below| *below != Self::AsNamed))
    }
}

impl Node {
    /// A node on nothing, without options.
    pub fn new(driver: Option<Driver>) -> Self {
        Self {
            driver,
            options: Options::default(),
            below: None,
            second: None,
            backing: Backing::AsNamed,
            data_file: None,
        }
    }

    /// A file.
    pub fn file(path: &str) -> Self {
        let mut node = Self::new(Some(Driver::File));
        node.options.set("filename", Scalar::text(path));
        node
    }

    /// The node of a file or a device. Disk: looks which of both is there.
    pub fn of_path(path: &str) -> Self {
        let driver = if is_device(path) { Driver::HostDevice } else { Driver::File };
        Self { driver: Some(driver), ..Self::file(path) }
    }

    /// A node on another one.
    pub fn on(driver: Option<Driver>, below: Self) -> Self {
        Self { below: Some(Box::new(below)), ..Self::new(driver) }
    }

    /// Its driver; raw where that is to be probed.
    pub fn driver(&self) -> Driver {
        self.driver.unwrap_or(Driver::Raw)
    }

    /// Whether the format is to be probed.
    pub fn is_probed(&self) -> bool {
        self.driver.is_none()
    }

    /// Whether a layer is said to have no backing file by an empty name for it.
    pub(crate) fn names_empty_backing(&self) -> bool {
        self.backing.layers().any(|layer| layer == Backing::Empty)
    }

    /// The node below.
    pub fn child(&self) -> Option<&Self> {
        self.below.as_deref()
    }

    /// The other node that it needs: the image that `blkverify` tests, the target of old bytes.
    pub(crate) fn second(&self) -> Option<&Self> {
        self.second.as_deref()
    }

    /// Both.
    pub(crate) fn children(&self) -> impl Iterator<Item = &Self> {
        self.child().into_iter().chain(self.second())
    }

    /// The same as `driver`, where its format was to be probed.
    pub(crate) fn probed_as(&self, driver: Driver) -> Self {
        Self { driver: Some(self.driver.unwrap_or(driver)), ..self.clone() }
    }

    /// How many layers below this image the one called `name` is: 0 for itself, 1 for its backing file.
    pub(crate) fn layer_called(&self, name: &str) -> Option<usize> {
        let is_it = |options: &Options| options.text("node-name").as_deref() == Some(name);
        if is_it(&self.options) {
            return Some(0);
        }
        let below = self.backing.layers().position(|layer| match &layer {
            Backing::Given(options) => is_it(options),
            Backing::AsNamed | Backing::Nothing | Backing::Empty => false,
        });
        below.map(|layer| layer + 1)
    }

    /// The file at the bottom, if there is one.
    pub fn path(&self) -> Option<&str> {
        match (self.child(), self.driver()) {
            (Some(child), _) => child.path(),
            (None, driver) if driver.is_file() => {
                self.options.iter().find(|(key, _)| *key == "filename").and_then(|(_, value)| match value {
                    Scalar::Text(path) => Some(path.as_str()),
                    _ => None,
                })
            }
            _ => None,
        }
    }

    /// Where the first byte of a raw node is, in what is at the bottom of nothing but raw nodes and filters.
    pub(crate) fn raw_start(&self) -> u64 {
        let own = match self.driver() {
            Driver::Raw => self.options.text("offset").and_then(|text| parse_size(&text).ok()).unwrap_or(0),
            Driver::Blkdebug | Driver::Blkverify => 0,
            driver if driver.is_filter() => 0,
            _ => return 0,
        };
        self.child().map_or(own, |child| own.saturating_add(child.raw_start()))
    }

    /// Options that change what is read.
    pub(crate) fn strong(&self) -> impl Iterator<Item = (&str, &Scalar)> {
        self.options.iter().filter(|(key, _)| self.driver().is_strong(key))
    }

    /// An option about the layer below.
    fn backing_option(&self) -> Option<String> {
        match &self.backing {
            Backing::Given(options) => options.iter().next().map(|(key, _)| format!("backing.{key}")),
            Backing::AsNamed | Backing::Nothing | Backing::Empty => None,
        }
    }

    /// The failure for an option that the driver does not have. `probed`: the driver where none is named;
    /// `follows`: whether backing files are opened too.
    pub(crate) fn unknown_option(&self, probed: Driver, follows: bool) -> Option<FailureKind> {
        let driver = self.driver.unwrap_or(probed);
        let unknown = |key: &&str| !driver.knows(key);
        let own = || self.options.iter().map(|(key, _)| key).filter(unknown);
        let below = self.backing_option().filter(|_| driver != Driver::Qcow2 || !follows);
        let is_below = |key: &str| key == "backing" || key.starts_with("backing.");
        if follows && (below.is_some() || own().any(is_below)) {
            return Some(FailureKind::NoBackingFiles);
        }
        let option = own().next().map(str::to_owned).or(below)?;
        Some(FailureKind::UnknownOption { driver, option })
    }
}
