//! Requests on an open disk: each makes calls of the disk and says how it went.

mod read;
mod vmstate;
mod write;

use crate::grammar::{Range, Style};
use crate::reason::{IO_ERROR, NOT_SUPPORTED, Reason};
use crate::report::Finished;
use qcow2_core::{ExtentState, GuestDisk, GuestOffset, GuestRange, Image, Preallocation};
use qcow2_ops::{NewSize, ResizeOptions};
use std::sync::Arc;
use std::time::Duration;

/// What requests need to know of an open disk; cheap to copy for requests in the background.
#[derive(Clone)]
pub(crate) struct Target {
    /// The disk with its chain.
    pub(crate) disk: Arc<dyn GuestDisk>,
    /// Whether every write is durable when it is reported.
    pub(crate) durable_writes: bool,
    /// Whether discards reach the disk.
    pub(crate) discards: bool,
}

/// Bytes that are moved at once where a request may go in pieces.
const PIECE_LEN: u64 = 32 << 20;

impl Target {
    /// Bytes of the disk as the tools see it: whole sectors.
    pub(crate) fn len(&self) -> u64 {
        let size = self.disk.size();
        size.checked_next_multiple_of(512).unwrap_or(size)
    }

    /// How much of the range is allocated in the top layer, and how much of it is on the disk at all.
    pub(crate) fn allocated(&self, range: Range) -> Result<(u64, u64), Reason> {
        let len = range.len.min(self.len().saturating_sub(range.offset));
        let mut sum = 0;
        let mut done = 0;
        while done < len {
            let run = self.run_at(Range { offset: range.offset + done, len: len - done })?;
            sum += if run.1 { run.0 } else { 0 };
            done += run.0;
        }
        Ok((sum, len))
    }

    /// The runs of the whole disk that are allocated in the top layer, or are not.
    pub(crate) fn map(&self, visit: &mut dyn FnMut(Range, bool)) -> Result<(), Reason> {
        let len = self.len();
        let (mut start, mut at, mut state) = (0, 0, false);
        while at < len {
            let (run, allocated) = self.run_at(Range { offset: at, len: len - at })?;
            if at > start && allocated != state {
                visit(Range { offset: start, len: at - start }, state);
                start = at;
            }
            state = allocated;
            at += run;
        }
        if len > start {
            visit(Range { offset: start, len: len - start }, state);
        }
        Ok(())
    }

    /// The first bytes of `range`, and whether they are allocated.
    fn run_at(&self, range: Range) -> Result<(u64, bool), Reason> {
        let there = self.disk.size().saturating_sub(range.offset).min(range.len);
        if there == 0 {
            return Ok((range.len, true));
        }
        let extent = self.disk.extent_at(guest(Range { len: there, ..range })?)?;
        Ok((extent.len, extent.state != ExtentState::Unallocated))
    }

    /// Why the disk cannot be made `size` bytes in this way, where that is plain before it is tried.
    pub(crate) fn refuse_resize(&self, size: u64, preallocation: Option<&str>) -> Result<(), &'static str> {
        let shrinks = size < self.disk.size() && preallocation.is_some();
        match self.disk.as_image() {
            Some(_) if !size.is_multiple_of(512) => Err("The new size must be a multiple of 512"),
            Some(_) if shrinks => Err("Preallocation can't be used for shrinking an image"),
            None if shrinks => Err("Cannot use preallocation for shrinking files"),
            None if preallocation == Some("metadata") => Err("Unsupported preallocation mode: metadata"),
            _ => Ok(()),
        }
    }

    /// Changes the size of the disk; what is new gets its space as `preallocation` says.
    pub(crate) fn resize(&self, size: u64, preallocation: Option<&str>) -> Result<(), Reason> {
        let mode = match preallocation {
            Some("metadata") => Preallocation::Metadata,
            Some("falloc") => Preallocation::Falloc,
            Some(_) => Preallocation::Full,
            None => Preallocation::Off,
        };
        if mode == Preallocation::Off || size <= self.disk.size() {
            return Ok(self.disk.resize(size)?);
        }
        let mut options = ResizeOptions::new(NewSize::Exactly(size));
        options.preallocation = mode;
        Ok(qcow2_ops::resize(&*self.disk, &options, &qcow2_ops::Silent)?)
    }

    /// The disk as an image, for what only images can do.
    fn image(&self) -> Result<&Image, Reason> {
        self.disk.as_image().ok_or(Reason::System(NOT_SUPPORTED))
    }

    /// Requests past the end are failures of the device.
    fn check_range(&self, offset: u64, len: u64) -> Result<(), Reason> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(Reason::System(IO_ERROR)),
        }
    }
}

fn told(verb: &'static str, range: Range, elapsed: Duration, style: Style) -> String {
    let finished = Finished { verb, offset: range.offset, len: range.len, elapsed };
    match style {
        Style { quiet: true, .. } => String::new(),
        Style { csv: true, .. } => finished.csv(),
        Style { .. } => finished.text(),
    }
}

fn guest(range: Range) -> Result<GuestRange, Reason> {
    GuestRange::new(GuestOffset::new(range.offset), range.len).ok_or(Reason::System(IO_ERROR))
}
