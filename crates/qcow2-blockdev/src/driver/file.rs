//! Files and block devices.

use std::fs;
use std::io;

/// Whether `path` leads to a block device, which has a size of its own and a content from before.
pub fn is_block_device(path: &str) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        false
    }
}

/// Why `path` leads to no device, if it does not: it leads nowhere, or (`None` inside) to something else.
pub(crate) fn not_a_device(path: &str) -> Option<Option<io::Error>> {
    if is_block_device(path) {
        return None;
    }
    Some(fs::metadata(path).err())
}
