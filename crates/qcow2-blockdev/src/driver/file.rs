//! Files and devices.

use qcow2_io::path_of;
use std::fs;
use std::io;

/// Whether `path` leads to a device, which has a size of its own and a content from before.
pub fn is_device(path: &str) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = fs::metadata(path_of(path)).map(|metadata| metadata.file_type());
        kind.is_ok_and(|kind| kind.is_block_device() || kind.is_char_device())
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        false
    }
}

/// Whether a pipe is at `path`, which has no size and no offsets.
pub fn is_fifo(path: &str) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        fs::metadata(path_of(path)).is_ok_and(|data| data.file_type().is_fifo())
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        false
    }
}

/// Why `path` leads to no device, if it does not: it leads nowhere, or (`None` inside) to something else.
/// `writable`: whether it is to be written to, which a directory is not.
pub(crate) fn not_a_device(path: &str, writable: bool) -> Option<Option<io::Error>> {
    if is_device(path) {
        return None;
    }
    match fs::metadata(path_of(path)) {
        Ok(data) if data.is_dir() && writable => Some(Some(io::Error::from_raw_os_error(IS_A_DIRECTORY))),
        Ok(_) => Some(None),
        Err(error) => Some(Some(error)),
    }
}

/// `EISDIR`, the same on every Unix.
const IS_A_DIRECTORY: i32 = 21;
