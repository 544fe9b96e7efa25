//! Operating system calls, one module per system with the same function names.
//!
//! Every function makes one call and reports the system's own error. The error kind `Unsupported` means that
//! the file system or device cannot do it; the caller then uses a slower way.

#[cfg(all(target_os = "linux", feature = "guest-memory"))]
pub(crate) mod guest;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(not(target_os = "linux"))]
mod other;
#[cfg(all(target_os = "linux", feature = "uring"))]
pub(crate) mod uring;

#[cfg(target_os = "linux")]
pub(crate) use linux::*;
#[cfg(not(target_os = "linux"))]
pub(crate) use other::*;

use std::fs::File;
use std::io;

/// A copy of a descriptor that this process was started with. Errors: there is no such descriptor.
#[cfg(unix)]
#[allow(unsafe_code, reason = "nothing else makes a descriptor of its number")]
pub(crate) fn inherited(number: i32) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::BorrowedFd;
    if number < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number is not -1, and it is used for one call only, which fails if there is no such
    // descriptor. What is copied stays open: whoever has started this process has given it away.
    unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned()
}

/// An extent of a file, as the file system reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_os = "linux"), allow(dead_code))]
pub(crate) enum Run {
    /// Data from the queried offset up to this one (exclusive, larger than the queried offset).
    DataUntil(u64),
    /// A hole from the queried offset up to this one (exclusive, larger than the queried offset).
    HoleUntil(u64),
    /// A hole from the queried offset to the end of the file.
    HoleToEnd,
}

/// Reads until `buf` is full or the file ends; returns the number of bytes read.
pub(crate) fn read_full(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match read_some(file, offset + done as u64, &mut buf[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Writes all of `buf`, repeating short writes.
pub(crate) fn write_full(file: &File, offset: u64, buf: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match write_some(file, offset + done as u64, &buf[done..]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
