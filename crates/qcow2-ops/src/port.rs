//! Ports for what only the caller can do: open images, make a file, and change key slots.

use qcow2_core::{GuestDisk, HostOffset, ResolvedSource, Storage};
use std::sync::Arc;

/// The caller's own error, returned through a port. It becomes the source of the procedure's error.
pub type CallerError = Box<dyn std::error::Error + Send + Sync>;

/// Opens the image of a procedure again, with the same options each time. Closures implement it.
///
/// A procedure drops the open image first, so that the locks on its file are free.
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

/// Opens the layers of a backing chain one by one, so that one below the top can be changed. The procedure
/// decides the order, where the chain ends, and which layer is writable; the caller knows files, locks, keys,
/// and which names inside images may be followed.
///
/// In all methods `depth` counts layers: 0 is the top. Errors are the caller's; the procedure returns them as
/// the source of an [`Open`](crate::ErrorKind::Open) error.
pub trait OpenChain {
    /// Opens the file of the top image for writing; not the image in it.
    fn open_top(&self) -> Result<ResolvedSource, CallerError>;

    /// Looks what is below the layer in `above`. `base`: the caller's name of the layer to find; `None`: the
    /// first one below. Disk: reads the header; opens nothing that is named there.
    fn look_below(
        &self,
        above: &ResolvedSource,
        depth: usize,
        base: Option<&str>,
    ) -> Result<NextLayer, CallerError>;

    /// Opens the file of the backing file of `above`, itself at `depth`; for writing if it is the base.
    fn open_below(
        &self,
        above: &ResolvedSource,
        depth: usize,
        writable: bool,
    ) -> Result<ResolvedSource, CallerError>;

    /// Opens the image in `source` as `role` needs it.
    fn open_layer(
        &self,
        source: ResolvedSource,
        depth: usize,
        role: LayerRole,
    ) -> Result<Arc<dyn GuestDisk>, CallerError>;
}

/// What is below a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextLayer {
    /// No backing file.
    None,
    /// A layer that is not the base.
    Middle,
    /// The base.
    Base,
}

/// What a layer of a chain is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerRole {
    /// The top: for writing, without its backing file.
    Top,
    /// A layer between the top and the base: for reading, without its backing file.
    Middle,
    /// The base: for writing, with its own chain below it for reading.
    Base,
}

/// The backing file that an overlay is to get.
pub trait NewBacking {
    /// Whether `format` is one that can be recorded.
    fn is_format(&self, format: &str) -> bool;

    /// Opens the new backing file with its chain, for reading. Errors: the caller's; the procedure returns
    /// them as the source of an [`Open`](crate::ErrorKind::Open) error.
    fn open(&self) -> Result<Chain, CallerError>;
}

/// An open disk with its backing chain, and what makes its layers the same as those of another chain.
#[derive(Clone)]
pub struct Chain {
    /// The disk.
    pub disk: Arc<dyn GuestDisk>,
    /// For each layer from the top down a text that another chain's layer has only if it is the same file,
    /// opened in the same way; `None`: not known. May be shorter than the chain.
    pub layers: Vec<Option<String>>,
}

impl Chain {
    /// A chain about whose layers nothing is known.
    pub fn new(disk: Arc<dyn GuestDisk>) -> Self {
        Self { disk, layers: Vec::new() }
    }
}

/// The file of a new image.
pub trait NewStorage {
    /// Makes the file, empty, or fails without a trace; a file that exists is not touched. Errors: the
    /// caller's; the procedure returns them as the source of a [`Create`](crate::ErrorKind::Create) error.
    fn make(&self) -> Result<Arc<dyn Storage>, CallerError>;

    /// Deletes the file that was made. Called if the image in it cannot be completed.
    fn discard(&self);
}

/// Changes the key slots of an encrypted image: adds or erases a password. The procedure knows where the
/// encryption header is; the crate with the ciphers knows its contents.
pub trait KeySlots {
    /// Changes the slots of the LUKS header at `at` in `storage`. Disk: key material and header, each
    /// followed by a barrier, in an order that a crash cannot break. Errors: the caller's; the old passwords
    /// must still unlock the image then.
    fn change(&self, storage: &dyn Storage, at: HostOffset) -> Result<(), CallerError>;
}
