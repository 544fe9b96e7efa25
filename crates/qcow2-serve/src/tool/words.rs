//! qemu-nbd's words for what fails.

use crate::export::ExportError;
use crate::nbd::{Address, ListError, Listed, ListenError, SecurityError};
use qcow2_nbd::proto::{Mode, transmission_flag};
use std::fmt::Write;
use std::io;

/// Nobody can connect.
pub fn not_bound(failed: &ListenError) -> String {
    let reason = system_text(&failed.error);
    match &failed.address {
        Address::Unix(path) => format!("Failed to bind socket to {}: {reason}", path.display()),
        Address::Tcp { host, port } if failed.error.raw_os_error().is_none() => {
            format!("address resolution failed for {host}:{port}: Name or service not known")
        }
        Address::Tcp { .. } if failed.error.kind() == io::ErrorKind::AddrInUse => {
            format!("Failed to find an available port: {reason}")
        }
        Address::Tcp { .. } => format!("Failed to bind socket: {reason}"),
        Address::HandedOver(number) => {
            // Counted from the first one, 3.
            let number = u64::from(*number) + 3;
            format!("Socket activation failed: invalid file descriptor fd = {number}: {reason}")
        }
    }
}

/// An export cannot be made of a disk.
pub fn no_export(error: &ExportError) -> String {
    match error {
        ExportError::NoBitmap(name) => format!("Bitmap '{name}' is not found"),
        ExportError::Start { start, .. } if i64::try_from(*start).is_err() => {
            format!("Value '{}' is out of range for parameter 'offset'", start.cast_signed())
        }
        ExportError::Start { start, size } => {
            format!("Offset ({start}) cannot be greater than size of the containing file ({size})")
        }
        ExportError::Bitmap(error) => error.to_string(),
    }
}

/// TLS cannot be had.
pub fn no_tls(error: &SecurityError) -> String {
    match error {
        SecurityError::NoCredentials(_) | SecurityError::NotCredentials(_) | SecurityError::OtherEnd(_) => {
            format!("Failed to get TLS creds: {error}")
        }
        error => error.to_string(),
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

/// There is no list.
pub fn not_listed(error: &ListError) -> String {
    match error {
        ListError::Connect(Address::Unix(path), error) => {
            format!("Failed to connect to '{}': {}", path.display(), system_text(error))
        }
        ListError::Connect(Address::Tcp { host, port }, error) => {
            format!("Failed to connect to '{host}:{port}': {}", system_text(error))
        }
        ListError::Io(error) | ListError::Connect(Address::HandedOver(_), error) => system_text(error),
        error => error.to_string(),
    }
}

/// A list of exports.
pub fn listing(exports: &[Listed]) -> String {
    let mut text = format!("exports available: {}\n", exports.len());
    for export in exports {
        // Writing to text cannot fail.
        let _ = describe(&mut text, export);
    }
    text
}

fn describe(text: &mut String, export: &Listed) -> std::fmt::Result {
    writeln!(text, " export: '{}'", export.name)?;
    if let Some(description) = &export.description {
        writeln!(text, "  description: {description}")?;
    }
    if let Some((size, flags)) = export.export {
        writeln!(text, "  size:  {size}")?;
        let names = FLAGS.iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| *name);
        writeln!(text, "  flags: {flags:#x} ( {} )", names.collect::<Vec<_>>().join(" "))?;
    }
    if let Some(sizes) = export.sizes {
        writeln!(text, "  min block: {}", sizes.minimum)?;
        writeln!(text, "  opt block: {}", sizes.preferred)?;
        writeln!(text, "  max block: {}", sizes.maximum)?;
    }
    if export.export.is_some() {
        let bits = if export.mode == Mode::Extended { 64 } else { 32 };
        writeln!(text, "  transaction size: {bits}-bit")?;
    }
    if !export.contexts.is_empty() {
        writeln!(text, "  available meta contexts: {}", export.contexts.len())?;
        export.contexts.iter().try_for_each(|name| writeln!(text, "   {name}"))?;
    }
    Ok(())
}

const FLAGS: [(u16, &str); 12] = [
    (transmission_flag::READ_ONLY, "readonly"),
    (transmission_flag::SEND_FLUSH, "flush"),
    (transmission_flag::SEND_FUA, "fua"),
    (transmission_flag::ROTATIONAL, "rotational"),
    (transmission_flag::SEND_TRIM, "trim"),
    (transmission_flag::SEND_WRITE_ZEROES, "zeroes"),
    (transmission_flag::SEND_DF, "df"),
    (transmission_flag::CAN_MULTI_CONN, "multi"),
    (1 << 9, "resize"),
    (transmission_flag::SEND_CACHE, "cache"),
    (transmission_flag::SEND_FAST_ZERO, "fast-zero"),
    (transmission_flag::BLOCK_STATUS_PAYLOAD, "block-status-payload"),
];
