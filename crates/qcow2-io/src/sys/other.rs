//! Systems without a module of their own: positional I/O from the standard library; no holes, no locks.

use super::{Run, write_full};
use std::fs::File;
use std::io::{self, Seek};

/// One positional read; may return fewer bytes.
pub(crate) fn read_some(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_at(file, buf, offset);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_read(file, buf, offset);
}

/// One positional write; may write fewer bytes.
pub(crate) fn write_some(file: &File, offset: u64, buf: &[u8]) -> io::Result<usize> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::write_at(file, buf, offset);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_write(file, buf, offset);
}

/// Writes the buffers back to back from `offset` on.
pub(crate) fn write_vectored_full(file: &File, offset: u64, bufs: &[&[u8]]) -> io::Result<()> {
    let mut at = offset;
    for buf in bufs {
        write_full(file, at, buf)?;
        at += buf.len() as u64;
    }
    Ok(())
}

/// Not supported.
pub(crate) fn punch_hole(_file: &File, _offset: u64, _len: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not supported.
pub(crate) fn zero_range(_file: &File, _offset: u64, _len: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not supported.
pub(crate) fn reserve(_file: &File, _offset: u64, _len: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not supported.
pub(crate) fn start_writeback(_file: &File, _offset: u64, _len: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not supported: the whole file is reported as data.
pub(crate) fn run_at(_file: &File, _offset: u64) -> io::Result<Run> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not supported.
pub(crate) fn copy_range(
    _source: &File,
    _from: u64,
    _target: &File,
    _offset: u64,
    _len: u64,
) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Makes content and length durable. On macOS the standard library asks for a full flush to the medium.
pub(crate) fn sync(file: &File) -> io::Result<()> {
    file.sync_data()
}

/// The length of a block device in bytes, by seeking to its end.
pub(crate) fn device_len(file: &File) -> io::Result<u64> {
    let mut file = file;
    file.seek(io::SeekFrom::End(0))
}

/// Not supported: opening a pipe blocks.
pub(crate) fn set_open_flags(_options: &mut std::fs::OpenOptions, _direct: bool, _follow_links: bool) {}

/// Not supported: links are always followed.
pub(crate) fn is_link_refusal(_error: &io::Error) -> bool {
    false
}

/// Direct I/O is not supported.
pub(crate) fn direct_alignment(_file: &File) -> io::Result<crate::direct::Alignment> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not supported.
pub(crate) fn lock_byte(_file: &File, _byte: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not supported.
pub(crate) fn unlock_byte(_file: &File, _byte: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not supported.
pub(crate) fn is_byte_locked(_file: &File, _byte: u64) -> io::Result<bool> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not supported.
pub(crate) fn set_extent_size_hint(_file: &File, _bytes: u32) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Not supported.
pub(crate) fn set_no_cow(_file: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
