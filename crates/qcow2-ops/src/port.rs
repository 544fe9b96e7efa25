//! Ports: what only the caller can do. Open images, create a file, change key slots.

use qcow2_core::{GuestDisk, HostOffset, ResolvedSource, Storage};
use std::sync::Arc;

/// An error of the caller's own, returned by a port. It becomes the source of the procedure's error.
pub type CallerError = Box<dyn std::error::Error + Send + Sync>;

/// Opens the image of a procedure again, with the same options each time. Closures implement this trait.
///
/// The procedure drops the open image before it calls this, so that the locks on the file are free.
pub trait Reopen {
    /// Opens the image. Errors: the caller's; the procedure returns them as the source of an
    /// [`Open`](crate::ErrorKind::Open) error.
    fn reopen(&self) -> Result<Arc<dyn GuestDisk>, CallerError>;
}

impl<F: Fn() -> Result<Arc<dyn GuestDisk>, CallerError>> Reopen for F {
    fn reopen(&self) -> Result<Arc<dyn GuestDisk>, CallerError> {
        self()
    }
}

/// Opens the layers of a backing chain one by one, so that a layer below the top can be opened for writing.
/// The procedure decides in which order, where the chain ends, and which layers are writable; the caller
/// decides how files, locks and keys are handled, and which names inside images may be followed.
///
/// `depth` is the position in the chain: 0 is the top. All errors are the caller's; the procedure returns
/// them as the source of an [`Open`](crate::ErrorKind::Open) error.
pub trait OpenChain {
    /// Opens the file of the top image for writing, without opening the image in it.
    fn open_top(&self) -> Result<ResolvedSource, CallerError>;

    /// Reports what kind of layer is below `above`. `base`: the name of the layer to find, as the caller
    /// passed it to the procedure; `None`: the first layer below. Disk: reads the header of `above`; the file
    /// that it names need not be opened.
    fn look_below(
        &self,
        above: &ResolvedSource,
        depth: usize,
        base: Option<&str>,
    ) -> Result<NextLayer, CallerError>;

    /// Opens the backing file of `above`, without opening the image in it; for writing if it is the base.
    /// `depth`: its position.
    fn open_below(
        &self,
        above: &ResolvedSource,
        depth: usize,
        writable: bool,
    ) -> Result<ResolvedSource, CallerError>;

    /// Opens the image in `source` according to `role`.
    fn open_layer(
        &self,
        source: ResolvedSource,
        depth: usize,
        role: LayerRole,
    ) -> Result<Arc<dyn GuestDisk>, CallerError>;
}

/// What is below a layer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextLayer {
    /// Nothing: the layer has no backing file.
    None,
    /// A layer above the base.
    Middle,
    /// The base.
    Base,
}

/// The role of a layer, which decides how it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerRole {
    /// The top: writable, without its backing file.
    Top,
    /// A layer between the top and the base: read-only, without its backing file.
    Middle,
    /// The base: writable, with its own backing chain, which is read-only.
    Base,
}

/// Opens the new backing file of an overlay.
pub trait NewBacking {
    /// True if a file of this `format` can be opened as a backing file. Only such a format is recorded.
    fn is_format(&self, format: &str) -> bool;

    /// Opens the new backing file with its own chain, read-only. Errors: the caller's; the procedure returns
    /// them as the source of an [`Open`](crate::ErrorKind::Open) error.
    fn open(&self) -> Result<Chain, CallerError>;
}

/// An open disk with its backing chain, and the identity of each layer.
#[derive(Clone)]
pub struct Chain {
    /// The disk.
    pub disk: Arc<dyn GuestDisk>,
    /// For each layer, top first, a text that identifies the file and how it was opened: layers of two chains
    /// with equal texts have the same content. `None`: not known, so equal to no other. May be shorter than
    /// the chain.
    pub layers: Vec<Option<String>>,
}

impl Chain {
    /// A chain whose layers have no known identity.
    pub fn new(disk: Arc<dyn GuestDisk>) -> Self {
        Self { disk, layers: Vec::new() }
    }
}

/// Creates the file of a new image.
pub trait NewStorage {
    /// Creates an empty file. It must not exist yet, and after an error there must be no file. Errors: the
    /// caller's; the procedure returns them as the source of a [`Create`](crate::ErrorKind::Create) error.
    fn make(&self) -> Result<Arc<dyn Storage>, CallerError>;

    /// Deletes the created file. Called if the image in it cannot be completed.
    fn discard(&self);
}

/// Records which file is the top of a chain whose layers change while it is used, so that the caller opens
/// that one after a crash. Closures implement this trait.
pub trait RecordTop {
    /// Makes the new top durable wherever the caller looks for it. Called while requests are held back, after
    /// everything that the new top needs is durable and before anything is written to it. Errors: the
    /// caller's; then the old top must be what is recorded, and it stays in use.
    fn record(&self) -> Result<(), CallerError>;
}

impl<F: Fn() -> Result<(), CallerError>> RecordTop for F {
    fn record(&self) -> Result<(), CallerError> {
        self()
    }
}

/// Opens a layer below the top of a live disk for writing, while the same file is open for reading. Closures
/// implement this trait.
pub trait OpenLayer {
    /// Opens the layer on `below`, its own backing file, which is open already; see
    /// [`Image::open_on`](qcow2_core::Image::open_on). `None`: it has none. Errors: the caller's; the
    /// procedure returns them as the source of an [`Open`](crate::ErrorKind::Open) error.
    fn open(&self, below: Option<&Arc<dyn GuestDisk>>) -> Result<Arc<dyn GuestDisk>, CallerError>;
}

impl<F: Fn(Option<&Arc<dyn GuestDisk>>) -> Result<Arc<dyn GuestDisk>, CallerError>> OpenLayer for F {
    fn open(&self, below: Option<&Arc<dyn GuestDisk>>) -> Result<Arc<dyn GuestDisk>, CallerError> {
        self(below)
    }
}

/// Changes the key slots of an encrypted image: adds or erases a password. The procedure knows where the
/// encryption header is; the crate with the ciphers knows its contents.
pub trait KeySlots {
    /// Changes the slots of the LUKS header at `at` in `storage`. Disk: key material and header, each
    /// followed by a barrier, in an order that a crash cannot break. Errors: the caller's; the old passwords
    /// must still unlock the image then.
    fn change(&self, storage: &dyn Storage, at: HostOffset) -> Result<(), CallerError>;
}
