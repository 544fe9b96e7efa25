//! The machine's state: bytes that the image holds behind the guest disk, for snapshots of a running machine.
//!
//! The state begins where the first L2 table begins that maps nothing of the disk. Spec: "Snapshots" (VM
//! state).

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::read::resolve::Place;
use crate::sync::{read, write};
use ::alloc::format;
use qcow2_format::GuestOffset;

impl Image {
    /// Where the machine's state begins: a guest offset at or behind the end of the disk.
    pub fn vm_state_offset(&self) -> u64 {
        let covered = self.file.geometry().l2_coverage();
        let offset = self.size().div_ceil(covered).saturating_mul(covered);
        debug_assert!(offset >= self.size(), "a machine's state at {offset:#x} is inside the disk");
        offset
    }

    /// Fills `buf` with the state from its byte `offset` on; what was never written reads as zeroes. Disk:
    /// may read L2 tables. Errors: `OutOfRange` past 2^63, `Unsupported` with an external data file,
    /// `Corrupt`, `Storage`.
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

    /// Writes `buf` as the state from its byte `offset` on. Disk: as a guest write; a longer L1 table first,
    /// where the present one ends before. Errors: as [`read_vm_state`](Self::read_vm_state), `InvalidOption`
    /// for a state that no L1 table can map, `ReadOnly`, `Poisoned`, `NoSpace`.
    pub fn write_vm_state(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let (start, end) = self.state_range(offset, buf.len())?;
        self.file.check_writable()?;
        if self.file.geometry().l1_entries_for(end) > self.mapping().l1_len() {
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

    /// The guest offsets of the state's bytes.
    fn state_range(&self, offset: u64, len: usize) -> Result<(u64, u64)> {
        if self.file.has_data_file() {
            let message = "a machine's state cannot be kept with an external data file";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let start = self.vm_state_offset().checked_add(offset);
        start
            .and_then(|start| Some((start, start.checked_add(len as u64)?)))
            .filter(|&(_, end)| end <= i64::MAX as u64)
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::OutOfRange,
                    format!("{len} bytes at {offset:#x} of the machine's state pass 2^63"),
                )
            })
    }
}
