//! What a procedure asks of its caller, who alone knows how an image was opened.

use qcow2_core::{GuestDisk, HostOffset, Storage};
use std::sync::Arc;

/// Why a caller could not do what a procedure asked: its own error, found again below the procedure's.
pub type CallerError = Box<dyn std::error::Error + Send + Sync>;

/// Opens the image of a procedure, with the same options each time. A closure is one.
///
/// A procedure drops what it had open before it asks, so that locks on the file are free.
pub trait Reopen {
    /// Opens the image. Errors: the caller's; the procedure ends with them below an
    /// [`Open`](crate::ErrorKind::Open) error.
    fn reopen(&self) -> Result<Arc<dyn GuestDisk>, CallerError>;
}

impl<F: Fn() -> Result<Arc<dyn GuestDisk>, CallerError>> Reopen for F {
    fn reopen(&self) -> Result<Arc<dyn GuestDisk>, CallerError> {
        self()
    }
}

/// Changes the key slots of an encrypted image: adds a password or erases one. The procedures know where the
/// encryption header is; what stands in it is known to the crate that has the ciphers.
pub trait KeySlots {
    /// Changes the slots of the LUKS header at `at` in `storage`. Disk: the slots' key material, a barrier,
    /// the header, a barrier. Errors: the caller's; nothing has been written then, or the image opens with
    /// the old passwords.
    fn change(&self, storage: &dyn Storage, at: HostOffset) -> Result<(), CallerError>;
}
