//! qemu-nbd's words for what fails.

use crate::export::ExportError;
use crate::nbd::{Address, ListenError};
use std::io;

/// Nobody can connect.
pub fn not_bound(failed: &ListenError) -> String {
    let reason = system_text(&failed.error);
    match &failed.address {
        Address::Unix(path) => format!("Failed to bind socket to {}: {reason}", path.display()),
        Address::Tcp { host, port } if failed.error.raw_os_error().is_none() => {
            format!("address resolution failed for {host}:{port}: Name or service not known")
        }
        Address::Tcp { .. } => format!("Failed to bind socket: {reason}"),
    }
}

/// An export cannot be made of a disk.
pub fn no_export(error: &ExportError) -> String {
    match error {
        ExportError::NoBitmap(name) => format!("Bitmap '{name}' is not found"),
        ExportError::Start { start, size } => {
            format!("Offset ({start}) cannot be greater than size of the containing file ({size})")
        }
        ExportError::Bitmap(error) => error.to_string(),
    }
}

/// The system's text for an error, without its number.
pub fn system_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error ") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}
