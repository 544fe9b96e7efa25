//! `read -b` and `write -b`: the VM state, which an image stores after the end of its disk.

use super::{PIECE_LEN, Target};
use crate::grammar::Range;
use crate::reason::{FILE_TOO_LARGE, NOT_SUPPORTED, Reason};
use crate::source::Source;
use qcow2_core::{Error, ErrorKind};

impl Target {
    /// Reads the VM state from its byte `offset` on.
    pub(super) fn read_vm_state(&self, offset: u64, buf: &mut [u8]) -> Result<(), Reason> {
        self.check_there()?;
        self.image()?.read_vm_state(offset, buf).map_err(state_reason)
    }

    /// Writes the range of the VM state.
    pub(super) fn write_vm_state(&self, range: Range, source: &mut Source) -> Result<(), Reason> {
        self.check_there()?;
        let image = self.image()?;
        let mut done = 0;
        while done < range.len {
            let len = PIECE_LEN.min(range.len - done);
            let bytes = source.next(len)?;
            image.write_vm_state(range.offset + done, bytes).map_err(state_reason)?;
            done += len;
        }
        Ok(())
    }

    /// Guest offset of the VM state: after the last L2 table that the disk needs. 0 for a raw disk, which has
    /// no VM state.
    pub(crate) fn vm_state_offset(&self) -> u64 {
        self.disk.as_image().map_or(0, |image| {
            let covered = image.geometry().l2_coverage();
            image.size().div_ceil(covered.max(1)).saturating_mul(covered)
        })
    }
}

/// A VM state that no L2 table can map gives "file too large", as in qemu-io.
fn state_reason(error: Error) -> Reason {
    match error.kind() {
        ErrorKind::InvalidOption | ErrorKind::OutOfRange => Reason::System(FILE_TOO_LARGE),
        ErrorKind::Unsupported => Reason::System(NOT_SUPPORTED),
        _ => error.into(),
    }
}
