//! Converts operating system errors to [`StorageError`]: kind, call, offset, length, and the error number.

use qcow2_core::{HostOffset, StorageError, StorageErrorKind};
use std::fmt;
use std::io;

/// An operating system error that prints as its plain text ("No such file or directory"), without the number.
#[derive(Debug)]
pub struct OsError(io::Error);

impl OsError {
    /// Wraps an error of the standard library.
    pub fn new(error: io::Error) -> Self {
        Self(error)
    }

    /// The operating system's error number, if there is one.
    pub fn code(&self) -> Option<i32> {
        self.0.raw_os_error()
    }

    /// The standard library's error.
    pub fn as_io(&self) -> &io::Error {
        &self.0
    }
}

impl fmt::Display for OsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        let plain = match (self.0.raw_os_error(), text.rfind(" (os error ")) {
            (Some(_), Some(end)) => &text[..end],
            _ => &text,
        };
        f.write_str(plain)
    }
}

impl std::error::Error for OsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

/// The operating system's text for error number `code`, for example "Input/output error" for 5 on Linux.
///
/// ```
/// assert_eq!(qcow2_io::os_error_text(2), "No such file or directory");
/// ```
pub fn os_error_text(code: i32) -> String {
    OsError::new(io::Error::from_raw_os_error(code)).to_string()
}

/// A storage call as error messages name it: operation, length and host offset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) name: &'static str,
    pub(crate) offset: HostOffset,
    pub(crate) len: u64,
}

impl Call {
    pub(crate) fn new(name: &'static str, offset: HostOffset, len: u64) -> Self {
        Self { name, offset, len }
    }

    /// Converts `error`, which this call returned, to a storage error.
    pub(crate) fn failed(self, error: io::Error) -> StorageError {
        let kind = kind_of(&error);
        let code = error.raw_os_error();
        let message = format!("{} of {} bytes at {} failed", self.name, self.len, self.offset);
        let storage = StorageError::new(kind, message).with_source(OsError::new(error));
        match code {
            Some(code) => storage.with_os_code(code),
            None => storage,
        }
    }

    /// Returns the end of this call's range. Errors: `OutOfRange` past 2^63 - 1.
    pub(crate) fn end(self) -> Result<u64, StorageError> {
        match self.offset.value().checked_add(self.len) {
            Some(end) if end <= MAX_LEN => Ok(end),
            _ => Err(StorageError::new(
                StorageErrorKind::OutOfRange,
                format!("{} of {} bytes at {} ends past 2^63 - 1", self.name, self.len, self.offset),
            )),
        }
    }

    /// The error for a change of a storage that was opened read-only.
    pub(crate) fn read_only(self) -> StorageError {
        StorageError::new(
            StorageErrorKind::ReadOnly,
            format!("{} of {} bytes at {}: storage is opened read-only", self.name, self.len, self.offset),
        )
    }

    /// The error for a range past the end of a device, which is `len` bytes long: it is full.
    pub(crate) fn no_room(self, len: u64) -> StorageError {
        let message = format!(
            "{} of {} bytes at {} ends past the end of the device at {len}",
            self.name, self.len, self.offset
        );
        StorageError::new(StorageErrorKind::NoSpace, message).with_os_code(NO_SPACE)
    }

    /// The error for a range past the end of a storage of fixed size.
    pub(crate) fn past_end(self, len: u64) -> StorageError {
        StorageError::new(
            StorageErrorKind::OutOfRange,
            format!(
                "{} of {} bytes at {} ends past the fixed size of {len} bytes",
                self.name, self.len, self.offset
            ),
        )
        .with_os_code(INVALID)
    }
}

/// `EINVAL`: what servers say of a request past the end.
const INVALID: i32 = 22;
/// `ENOSPC`: what systems say of a write past the end of a device.
const NO_SPACE: i32 = 28;

/// The largest length of a storage: file offsets are signed 64-bit numbers on every system.
pub(crate) const MAX_LEN: u64 = i64::MAX as u64;

/// Classifies `error`.
fn kind_of(error: &io::Error) -> StorageErrorKind {
    use io::ErrorKind as Io;
    match error.kind() {
        Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => StorageErrorKind::NoSpace,
        Io::ReadOnlyFilesystem => StorageErrorKind::ReadOnly,
        Io::Unsupported => StorageErrorKind::Unsupported,
        _ => StorageErrorKind::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    fn kind_for(code: i32) -> StorageErrorKind {
        let call = Call::new("write", HostOffset::new(0x1000), 512);
        call.failed(io::Error::from_raw_os_error(code)).kind()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_error_numbers_map_to_kinds() {
        assert_eq!(kind_for(28), StorageErrorKind::NoSpace, "ENOSPC");
        assert_eq!(kind_for(122), StorageErrorKind::NoSpace, "EDQUOT");
        assert_eq!(kind_for(27), StorageErrorKind::NoSpace, "EFBIG");
        assert_eq!(kind_for(30), StorageErrorKind::ReadOnly, "EROFS");
        assert_eq!(kind_for(95), StorageErrorKind::Unsupported, "EOPNOTSUPP");
        assert_eq!(kind_for(5), StorageErrorKind::Io, "EIO");
    }

    #[test]
    fn messages_name_call_length_and_offset_and_keep_the_error_number() {
        let call = Call::new("write", HostOffset::new(0x1000), 512);
        let error = call.failed(io::Error::from_raw_os_error(5));
        assert_eq!(error.to_string(), "write of 512 bytes at 0x1000 failed");
        assert_eq!(error.os_code(), Some(5));
        let source = error.source().map(ToString::to_string);
        assert_eq!(source.as_deref(), Some(os_error_text(5).as_str()));
    }

    #[test]
    fn a_range_past_the_largest_offset_is_refused() {
        let call = Call::new("read", HostOffset::new(u64::MAX), 1);
        assert_eq!(call.end().map_err(|e| e.kind()), Err(StorageErrorKind::OutOfRange));
        let call = Call::new("read", HostOffset::new(MAX_LEN), 0);
        assert_eq!(call.end().ok(), Some(MAX_LEN));
    }
}
