//! Linux: positional and vectored I/O, extents, hole punching, zeroing, preallocation, sync, locks.

use super::Run;
use crate::direct::Alignment;
use rustix::fs::{
    AtFlags, FallocateFlags, IFlags, OFlags, SeekFrom, StatxFlags, copy_file_range, fallocate, fdatasync,
    ioctl_blksszget, ioctl_getflags, ioctl_setflags, seek, statx,
};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// One `pread`; may return fewer bytes.
pub(crate) fn read_some(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    file.read_at(buf, offset)
}

/// One `pwrite`; may write fewer bytes.
pub(crate) fn write_some(file: &File, offset: u64, buf: &[u8]) -> io::Result<usize> {
    file.write_at(buf, offset)
}

/// The most buffers in one vectored call (`IOV_MAX`).
const MAX_VECTOR_COUNT: usize = 1024;

/// Writes the buffers back to back from `offset` on.
pub(crate) fn write_vectored_full(file: &File, offset: u64, bufs: &[&[u8]]) -> io::Result<()> {
    let mut slices: Vec<IoSlice<'_>> = bufs.iter().map(|buf| IoSlice::new(buf)).collect();
    let mut rest = &mut slices[..];
    let mut at = offset;
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        let count = rest.len().min(MAX_VECTOR_COUNT);
        match rustix::io::pwritev(file, &rest[..count], at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                at += written as u64;
                IoSlice::advance_slices(&mut rest, written);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Punches a hole: the range is deallocated and reads as zeroes. The length stays.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    change_space(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
}

/// Zeroes a range and keeps it allocated; grows the file if the range ends past it.
pub(crate) fn zero_range(file: &File, offset: u64, len: u64) -> io::Result<()> {
    change_space(file, FallocateFlags::ZERO_RANGE, offset, len)
}

/// Reserves space for a range; grows the file if the range ends past it.
pub(crate) fn reserve(file: &File, offset: u64, len: u64) -> io::Result<()> {
    change_space(file, FallocateFlags::empty(), offset, len)
}

/// One `fallocate`. All refusals become `Unsupported`: file systems answer `EOPNOTSUPP`, block devices
/// `EINVAL` or `ENODEV` for modes or alignments they do not know, old kernels `ENOSYS`.
fn change_space(file: &File, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    loop {
        return match fallocate(file, mode, offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::INTR) => continue,
            Err(Errno::INVAL | Errno::NODEV | Errno::NOSYS | Errno::NOTTY) => Err(Errno::OPNOTSUPP.into()),
            Err(error) => Err(error.into()),
        };
    }
}

/// Starts writeback of a range, without waiting for it. Errors are not consumed: the next `fdatasync` reports
/// them.
#[allow(unsafe_code, reason = "a system call that rustix does not have")]
pub(crate) fn start_writeback(file: &File, offset: u64, len: u64) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let range = |number: u64| i64::try_from(number).map_err(|_| io::Error::from(Errno::INVAL));
    let (offset, len) = (range(offset)?, range(len)?);
    // SAFETY: the descriptor is open for as long as `file` is borrowed; the call takes no memory.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The extent at `offset`, which must lie before the end of the file.
pub(crate) fn run_at(file: &File, offset: u64) -> io::Result<Run> {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data > offset => return Ok(Run::HoleUntil(data)),
        Ok(_) => {}
        Err(Errno::NXIO) => return Ok(Run::HoleToEnd),
        Err(error) => return Err(cannot_seek(error)),
    }
    match seek(file, SeekFrom::Hole(offset)) {
        // The hole was punched between the two calls.
        Ok(hole) if hole <= offset => Ok(Run::DataUntil(offset + 1)),
        Ok(hole) => Ok(Run::DataUntil(hole)),
        Err(error) => Err(cannot_seek(error)),
    }
}

fn cannot_seek(error: Errno) -> io::Error {
    match error {
        Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::SPIPE => Errno::OPNOTSUPP.into(),
        other => other.into(),
    }
}

/// Copies a range between two files with `copy_file_range`; file systems with reflinks share the blocks.
/// Errors that mean "not for these files" become `Unsupported`, and so does a source that ends early.
pub(crate) fn copy_range(
    source: &File,
    mut from: u64,
    target: &File,
    mut offset: u64,
    len: u64,
) -> io::Result<()> {
    let mut left = len;
    while left > 0 {
        // Some kernels refuse counts near 2^63, so ask for at most 1 GiB per call.
        let count = left.min(1 << 30) as usize;
        match copy_file_range(source, Some(&mut from), target, Some(&mut offset), count) {
            Ok(0) => return Err(Errno::OPNOTSUPP.into()),
            Ok(copied) => left = left.saturating_sub(copied as u64),
            Err(Errno::INTR) => {}
            Err(
                Errno::XDEV
                | Errno::INVAL
                | Errno::NOSYS
                | Errno::PERM
                | Errno::BADF
                | Errno::TXTBSY
                | Errno::ISDIR,
            ) => return Err(Errno::OPNOTSUPP.into()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Makes content and length durable (`fdatasync`).
pub(crate) fn sync(file: &File) -> io::Result<()> {
    loop {
        match fdatasync(file) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// The length of a block device in bytes.
pub(crate) fn device_len(file: &File) -> io::Result<u64> {
    Ok(seek(file, SeekFrom::End(0))?)
}

/// Opens pipes without blocking, so that they can be identified and refused (regular files ignore the flag);
/// adds direct I/O and `O_NOFOLLOW` if asked for.
pub(crate) fn set_open_flags(options: &mut OpenOptions, direct: bool, follow_links: bool) {
    let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    flags.set(OFlags::DIRECT, direct);
    flags.set(OFlags::NOFOLLOW, !follow_links);
    options.custom_flags(flags.bits() as i32);
}

/// True if opening failed because the last component is a symbolic link and `O_NOFOLLOW` was set.
pub(crate) fn is_link_refusal(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::LOOP)
}

/// Alignment that direct I/O on `file` needs: from the kernel (`statx`, 6.1 and later), else a device's
/// logical block, else 4096 bytes, which satisfies every disk in use.
pub(crate) fn direct_alignment(file: &File) -> io::Result<Alignment> {
    const SAFE: usize = 4096;
    const LARGEST: usize = 64 * 1024;
    let told = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    if let Some(told) = told.filter(|told| told.stx_mask & StatxFlags::DIOALIGN.bits() != 0) {
        let block = told.stx_dio_offset_align as usize;
        let memory = told.stx_dio_mem_align as usize;
        if block == 0 {
            return Err(Errno::INVAL.into());
        }
        if block.is_power_of_two() && memory.is_power_of_two() && block.max(memory) <= LARGEST {
            return Ok(Alignment { block: block.max(512), memory: memory.max(512) });
        }
    }
    let block = match ioctl_blksszget(file) {
        Ok(block) if block.is_power_of_two() && block as usize <= LARGEST => block as usize,
        _ => SAFE,
    };
    Ok(Alignment { block: block.max(512), memory: SAFE })
}

/// Takes a shared lock on one byte, held until every copy of this open file description is closed. Shared
/// locks never wait for each other, and nobody takes exclusive ones.
pub(crate) fn lock_byte(file: &File, byte: u64) -> io::Result<()> {
    let mut lock = lock_request(libc::F_RDLCK, byte);
    byte_lock_call(file, libc::F_OFD_SETLK, &mut lock)
}

/// Releases the lock on one byte, for every copy of this open file description.
pub(crate) fn unlock_byte(file: &File, byte: u64) -> io::Result<()> {
    let mut lock = lock_request(libc::F_UNLCK, byte);
    byte_lock_call(file, libc::F_OFD_SETLK, &mut lock)
}

/// True if another open file description holds a lock on this byte.
pub(crate) fn is_byte_locked(file: &File, byte: u64) -> io::Result<bool> {
    let mut lock = lock_request(libc::F_WRLCK, byte);
    byte_lock_call(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn lock_request(kind: libc::c_int, byte: u64) -> libc::flock64 {
    libc::flock64 {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte as libc::off64_t,
        l_len: 1,
        l_pid: 0,
    }
}

/// One `fcntl` on the open file description. `F_OFD_*` takes the 64-bit structure on every architecture.
#[allow(unsafe_code, reason = "the one system call that rustix does not have")]
fn byte_lock_call(file: &File, command: libc::c_int, lock: &mut libc::flock64) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    loop {
        // SAFETY: the descriptor is open for as long as `file` is borrowed; `lock` is a valid, exclusively
        // borrowed structure of the type that both commands read and F_OFD_GETLK writes.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, lock as *mut libc::flock64) };
        if result != -1 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP) => {
                return Err(Errno::OPNOTSUPP.into());
            }
            _ => return Err(error),
        }
    }
}

/// The kernel's `struct fsxattr`.
#[repr(C)]
struct FileAttributes {
    flags: u32,
    extent_size: u32,
    extent_count: u32,
    project: u32,
    cow_extent_size: u32,
    reserved: [u8; 8],
}

const GET_ATTRIBUTES: Opcode = opcode::read::<FileAttributes>(b'X', 31);
const SET_ATTRIBUTES: Opcode = opcode::write::<FileAttributes>(b'X', 32);
/// `FS_XFLAG_EXTSIZE`: `extent_size` is valid.
const EXTENT_SIZE_COUNTS: u32 = 0x800;

/// Sets the extent size hint, in bytes.
#[allow(unsafe_code, reason = "calls that rustix has no functions for")]
pub(crate) fn set_extent_size_hint(file: &File, bytes: u32) -> io::Result<()> {
    // SAFETY: for this ioctl the kernel writes exactly one such structure.
    let told = unsafe { ioctl(file, Getter::<GET_ATTRIBUTES, FileAttributes>::new()) };
    let Ok(mut attributes) = told else { return Err(io::ErrorKind::Unsupported.into()) };
    attributes.flags |= EXTENT_SIZE_COUNTS;
    attributes.extent_size = bytes;
    // SAFETY: for this ioctl the kernel reads exactly one such structure.
    unsafe { ioctl(file, Setter::<SET_ATTRIBUTES, FileAttributes>::new(attributes)) }.map_err(io::Error::from)
}

/// Sets the no-copy-on-write attribute (`FS_NOCOW_FL`).
pub(crate) fn set_no_cow(file: &File) -> io::Result<()> {
    let flags = ioctl_getflags(file)?;
    ioctl_setflags(file, flags | IFlags::NOCOW).map_err(io::Error::from)
}
