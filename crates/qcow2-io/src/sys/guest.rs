//! Vectored I/O on the memory of a guest, which the guest may change at any moment: no slice of bytes may
//! refer to it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use vm_memory::VolatileSlice;

/// Ranges of memory in one call; the system takes up to 1024.
const VECTOR: usize = 64;

/// Fills `slices`, one after the other, with the bytes from `offset` on. Returns how many: fewer only at the
/// end of the file.
#[allow(unsafe_code, reason = "a call on memory that no slice of bytes may refer to")]
pub(crate) fn read_full(file: &File, offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    each_part(slices, |vector, done| {
        let count = vector.len() as libc::c_int;
        // SAFETY: each part lies inside a slice of guest memory, which is mapped and writable as long as the
        // slice is borrowed; that its bytes change at any time is allowed, since nothing refers to them.
        unsafe { libc::preadv64(file.as_raw_fd(), vector.as_ptr(), count, place(offset, done)?) }
            .try_into()
            .map_err(|_| io::Error::last_os_error())
    })
}

/// Writes `slices`, one after the other, from `offset` on.
#[allow(unsafe_code, reason = "a call on memory that no slice of bytes may refer to")]
pub(crate) fn write_full(file: &File, offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
    let written = each_part(slices, |vector, done| {
        let count = vector.len() as libc::c_int;
        // SAFETY: as in `read_full`; the system only reads the memory.
        unsafe { libc::pwritev64(file.as_raw_fd(), vector.as_ptr(), count, place(offset, done)?) }
            .try_into()
            .map_err(|_| io::Error::last_os_error())
    })?;
    match written == slices.iter().map(VolatileSlice::len).sum::<usize>() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

fn place(offset: u64, done: usize) -> io::Result<libc::off64_t> {
    let at = offset.checked_add(done as u64).and_then(|at| at.try_into().ok());
    at.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Calls `step` with what is left of `slices` and the bytes that are done, until all are or it moves none.
fn each_part(
    slices: &[VolatileSlice<'_>],
    mut step: impl FnMut(&[libc::iovec], usize) -> io::Result<usize>,
) -> io::Result<usize> {
    let total: usize = slices.iter().map(VolatileSlice::len).sum();
    let mut done = 0;
    while done < total {
        let mut vector = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; VECTOR];
        let (mut count, mut skip) = (0, done);
        for slice in slices {
            if count == VECTOR {
                break;
            }
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            let start = slice.ptr_guard_mut().as_ptr().wrapping_add(skip);
            vector[count] = libc::iovec { iov_base: start.cast(), iov_len: slice.len() - skip };
            (count, skip) = (count + 1, 0);
        }
        match step(&vector[..count], done) {
            Ok(0) => break,
            Ok(moved) => done += moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
