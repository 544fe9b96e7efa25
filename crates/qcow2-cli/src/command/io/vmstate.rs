//! `read -b` and `write -b`: the machine's state that an image can hold behind its disk.

use super::command::Range;
use super::source::Source;
use super::target::{PIECE_LEN, Reason, Target, not_supported, reason};
use qcow2_core::{Error, ErrorKind};
use qcow2_io::os_error_text;

impl Target {
    /// Fills `buf` with the state from its byte `offset` on.
    pub(super) fn read_vm_state(&self, offset: u64, buf: &mut [u8]) -> Result<(), Reason> {
        let image = self.disk.as_image().ok_or_else(not_supported)?;
        image.read_vm_state(offset, buf).map_err(|error| state_reason(&error))
    }

    /// Writes the state's bytes in `range`.
    pub(super) fn write_vm_state(&self, range: Range, source: &mut Source) -> Result<(), Reason> {
        let image = self.disk.as_image().ok_or_else(not_supported)?;
        let mut done = 0;
        while done < range.len {
            let len = PIECE_LEN.min(range.len - done);
            let bytes = source.next(len)?;
            image.write_vm_state(range.offset + done, bytes).map_err(|error| state_reason(&error))?;
            done += len;
        }
        Ok(())
    }
}

/// A state that no table can map is too large for the file.
fn state_reason(error: &Error) -> Reason {
    const FILE_TOO_LARGE: i32 = 27;
    match error.kind() {
        ErrorKind::InvalidOption | ErrorKind::OutOfRange => os_error_text(FILE_TOO_LARGE),
        ErrorKind::Unsupported => not_supported(),
        _ => reason(error),
    }
}
