//! The VM state: bytes past the end of the guest disk, for snapshots of a running machine.
//!
//! It starts at the first guest offset that none of the disk's L2 tables maps. Spec: "Snapshots" (VM state).

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::read::resolve::Place;
use crate::sync::{read, write};
use ::alloc::format;
use qcow2_format::GuestOffset;

impl Image {
    /// The guest offset at which the VM state starts: at or past the end of the disk.
    pub fn vm_state_offset(&self) -> u64 {
        let covered = self.file.geometry().l2_coverage();
        let offset = self.size().div_ceil(covered).saturating_mul(covered);
        debug_assert!(offset >= self.size(), "vm state at {offset:#x} is inside the disk");
        offset
    }

    /// Fills `buf` with the VM state from its byte `offset` on; unwritten bytes read as zeroes. Disk: may
    /// read L2 tables. Errors: `OutOfRange` past 2^63, `Unsupported` with an external data file, `Corrupt`,
    /// `Storage`.
    pub fn read_vm_state(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let start = self.state_range(offset, buf.len())?.0;
        let _structure = read(&self.structure);
        let _operation = self.flusher.enter();
        let (mut at, mut rest) = (start, buf);
        while !rest.is_empty() {
            let here = GuestOffset::new(at);
            let run = self.mapping().lookup(here, rest.len() as u64)?;
            let (part, next) = rest.split_at_mut(run.len as usize);
            match run.place {
                Place::Unallocated => part.fill(0),
                _ => self.read_range(here, part)?,
            }
            at += run.len;
            rest = next;
        }
        Ok(())
    }

    /// Writes `buf` to the VM state at its byte `offset`. Disk: as a guest write; first a longer L1 table, if
    /// the present one is too short. Errors: as [`read_vm_state`](Self::read_vm_state), `InvalidOption` for a
    /// state too large for any L1 table, `ReadOnly`, `Poisoned`, `NoSpace`.
    pub fn write_vm_state(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let (start, end) = self.state_range(offset, buf.len())?;
        self.file.check_writable()?;
        if self.file.geometry().l1_entries_for(end) > self.mapping().l1_len() {
            // The length was read without this lock; `cover_with_l1` reads it again.
            let _alone = write(&self.structure);
            self.begin_change()?;
            self.cover_with_l1(end)?;
        }
        {
            let _structure = read(&self.structure);
            let _operation = self.flusher.enter();
            self.begin_change()?;
            self.write_range(GuestOffset::new(start), buf)?;
        }
        self.flusher.flush_if_pressed()
    }

    /// Start and end of the VM state's bytes as guest offsets.
    fn state_range(&self, offset: u64, len: usize) -> Result<(u64, u64)> {
        if self.file.has_data_file() {
            let message = "vm state is not supported with an external data file";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let start = self.vm_state_offset().checked_add(offset);
        start
            .and_then(|start| Some((start, start.checked_add(len as u64)?)))
            .filter(|&(_, end)| end <= i64::MAX as u64)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::OutOfRange,
                    format!("{len} bytes at {offset:#x} of the vm state pass 2^63"),
                )
            })
    }
}
