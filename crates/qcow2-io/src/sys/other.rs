//! Systems without a room of their own: positional I/O from the standard library, no holes, no locks.

use super::{Run, write_full};
use std::fs::File;
use std::io::{self, Seek};

/// Reads what one call gives.
pub(crate) fn read_some(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_at(file, buf, offset);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_read(file, buf, offset);
}

/// Writes what one call takes.
pub(crate) fn write_some(file: &File, offset: u64, buf: &[u8]) -> io::Result<usize> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::write_at(file, buf, offset);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_write(file, buf, offset);
}

/// Writes the buffers one after the other from `offset` on.
pub(crate) fn write_vectored_full(file: &File, offset: u64, bufs: &[&[u8]]) -> io::Result<()> {
    let mut at = offset;
    for buf in bufs {
        write_full(file, at, buf)?;
        at += buf.len() as u64;
    }
    Ok(())
}

/// Not known here.
pub(crate) fn punch_hole(_file: &File, _offset: u64, _len: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not known here.
pub(crate) fn zero_range(_file: &File, _offset: u64, _len: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not known here.
pub(crate) fn reserve(_file: &File, _offset: u64, _len: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not known here: all is data.
pub(crate) fn run_at(_file: &File, _offset: u64) -> io::Result<Run> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not known here.
pub(crate) fn copy_range(
    _source: &File,
    _from: u64,
    _target: &File,
    _offset: u64,
    _len: u64,
) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Makes content and length durable. The standard library asks macOS for a full flush to the medium.
pub(crate) fn sync(file: &File) -> io::Result<()> {
    file.sync_data()
}

/// The length of a block device in bytes, as seeking to its end tells it.
pub(crate) fn device_len(file: &File) -> io::Result<u64> {
    let mut file = file;
    file.seek(io::SeekFrom::End(0))
}

/// Not known here: a pipe makes the caller wait.
pub(crate) fn set_open_flags(_options: &mut std::fs::OpenOptions, _direct: bool, _follow_links: bool) {}

/// Links are followed here.
pub(crate) fn is_link_refusal(_error: &io::Error) -> bool {
    false
}

/// The page cache cannot be bypassed here.
pub(crate) fn direct_alignment(_file: &File) -> io::Result<crate::direct::Alignment> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not known here.
pub(crate) fn lock_byte(_file: &File, _byte: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not known here.
pub(crate) fn unlock_byte(_file: &File, _byte: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not known here.
pub(crate) fn is_byte_locked(_file: &File, _byte: u64) -> io::Result<bool> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not known here.
pub(crate) fn set_extent_size_hint(_file: &File, _bytes: u32) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not known here.
pub(crate) fn set_no_cow(_file: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
