//! Ports for what only the caller can do: open the image again, and change key slots.

use qcow2_core::{GuestDisk, HostOffset, Storage};
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

/// Changes the key slots of an encrypted image: adds or erases a password. The procedure knows where the
/// encryption header is; the crate with the ciphers knows its contents.
pub trait KeySlots {
    /// Changes the slots of the LUKS header at `at` in `storage`. Disk: key material and header, each
    /// followed by a barrier, in an order that a crash cannot break. Errors: the caller's; the old passwords
    /// must still unlock the image then.
    fn change(&self, storage: &dyn Storage, at: HostOffset) -> Result<(), CallerError>;
}
