//! `write` with all its options, and `discard`.

use super::{PIECE_LEN, Target, guest, report};
use crate::grammar::{Content, Manner, Place, Range, Style, Write};
use crate::outcome::Outcome;
use crate::reason::{INVALID_ARGUMENT, IO_ERROR, NOT_SUPPORTED, Reason};
use crate::source::Source;
use qcow2_core::{ErrorKind, ExtentState, GuestDisk, GuestOffset, Image, ZeroMode};
use std::time::Instant;

impl Target {
    /// Runs `write`, `writev` or `aio_write`. `source` has the data.
    pub(crate) fn write(&self, request: &Write, mut source: Source) -> Outcome {
        let started = Instant::now();
        let result = match (&request.content, request.place) {
            (_, Place::VmState) => self.write_vm_state(request.range, &mut source),
            // As in qemu-io, `-z` wins over `-c`: zeroes are never compressed.
            (Content::Zeroes { may_unmap, only_fast }, _) => self.zero(request.range, *may_unmap, *only_fast),
            (_, Place::Compressed) => self.write_compressed(request.range, &mut source),
            (_, Place::Disk) => self.write_data(request.range, &mut source),
        };
        let durable = self.durable_writes || request.durable;
        let result = result.and_then(|()| match durable && request.range.len > 0 {
            true => Ok(self.disk.flush()?),
            false => Ok(()),
        });
        match result {
            Ok(()) => Outcome::success(report("wrote", request.range, started.elapsed(), request.style)),
            Err(reason) => {
                let name = match request.manner {
                    Manner::Plain => "write",
                    Manner::Vectored => "writev",
                    Manner::Background => "aio_write",
                };
                Outcome::refused(name, reason)
            }
        }
    }

    fn write_data(&self, range: Range, source: &mut Source) -> Result<(), Reason> {
        self.complete_last_sector(range)?;
        let mut done = 0;
        while done < range.len {
            let len = PIECE_LEN.min(range.len - done);
            let bytes = source.next(len)?;
            self.disk.write_at(GuestOffset::new(range.offset + done), bytes)?;
            done += len;
        }
        Ok(())
    }

    fn zero(&self, range: Range, may_unmap: bool, only_fast: bool) -> Result<(), Reason> {
        self.complete_last_sector(range)?;
        if only_fast && !self.can_zero_fast(range)? {
            return Err(Reason::System(NOT_SUPPORTED));
        }
        let mode = if may_unmap { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
        Ok(self.disk.write_zeroes(guest(range)?, mode)?)
    }

    /// True if `range` can become zeroes by metadata alone: its partial first and last clusters (subclusters,
    /// if the image has them) read as zeroes already.
    fn can_zero_fast(&self, range: Range) -> Result<bool, Reason> {
        let Some(image) = self.disk.as_image() else {
            return Ok(true);
        };
        let step = image.zero_granularity();
        let end = range.offset + range.len;
        let mut edges = Vec::new();
        if !range.offset.is_multiple_of(step) {
            edges.push(range.offset - range.offset % step);
        }
        if !end.is_multiple_of(step) && end < self.len() {
            edges.push(end - end % step);
        }
        for start in edges {
            if !reads_as_zeroes(&*self.disk, Range { offset: start, len: step })? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn write_compressed(&self, range: Range, source: &mut Source) -> Result<(), Reason> {
        self.check_range(range.offset, range.len)?;
        let image = self.image()?;
        if image.header().has_data_file() {
            return Err(Reason::System(NOT_SUPPORTED));
        }
        let cluster_size = image.cluster_size();
        let end = range.offset + range.len;
        if !range.offset.is_multiple_of(cluster_size)
            || (!end.is_multiple_of(cluster_size) && end != self.disk.size())
        {
            return Err(Reason::System(INVALID_ARGUMENT));
        }
        let mut done = 0;
        while done < range.len {
            let offset = range.offset + done;
            let len = cluster_size.min(range.len - done);
            write_cluster(image, Range { offset, len }, source.next(len)?)?;
            done += len;
        }
        Ok(())
    }

    /// Runs `discard`. A disabled discard (`-d ignore`) succeeds without effect, but the range is checked.
    pub(crate) fn discard(&self, range: Range, style: Style) -> Outcome {
        let started = Instant::now();
        match self.discard_there(range) {
            Ok(()) => Outcome::success(report("discard", range, started.elapsed(), style)),
            Err(reason) => Outcome::refused("discard", reason),
        }
    }

    fn discard_there(&self, range: Range) -> Result<(), Reason> {
        self.check_range(range.offset, range.len)?;
        // The padding after the end of the disk is no part of it.
        let there = self.disk.size().saturating_sub(range.offset).min(range.len);
        match self.discards {
            true => Ok(self.disk.discard(guest(Range { len: there, ..range })?)?),
            false => Ok(()),
        }
    }

    /// Checks the range of a write. If the write reaches into the padding of a disk that ends inside a
    /// sector, grows the disk to whole sectors first.
    fn complete_last_sector(&self, range: Range) -> Result<(), Reason> {
        self.check_range(range.offset, range.len)?;
        if range.offset + range.len > self.disk.size() {
            self.disk.resize(self.len())?;
        }
        Ok(())
    }
}

/// True if metadata alone shows that `range`, up to the end of the disk, reads as zeroes.
fn reads_as_zeroes(disk: &dyn GuestDisk, range: Range) -> Result<bool, Reason> {
    let end = disk.size().min(range.offset + range.len);
    let mut at = range.offset;
    while at < end {
        let rest = Range { offset: at, len: end - at };
        let extent = disk.extent_at(guest(rest)?)?;
        let run = Range { offset: at, len: extent.len };
        let is_zero = match (extent.state, disk.backing()) {
            (ExtentState::Zero { .. }, _) | (ExtentState::Unallocated, None) => true,
            (ExtentState::Unallocated, Some(backing)) => reads_as_zeroes(&**backing, run)?,
            _ => false,
        };
        if !is_zero {
            return Ok(false);
        }
        at += extent.len;
    }
    Ok(true)
}

// The engine compresses only into clusters that are not allocated yet; qemu-io reports EIO for others.
fn write_cluster(image: &Image, range: Range, bytes: &[u8]) -> Result<(), Reason> {
    image.write_compressed(GuestOffset::new(range.offset), bytes).map_err(|error| {
        let taken = error.kind() == ErrorKind::Unsupported && is_stored(image, range);
        if taken { Reason::System(IO_ERROR) } else { error.into() }
    })
}

/// True if the image stores any part of `range`: of a cluster with subclusters that may be a later one.
fn is_stored(image: &Image, range: Range) -> bool {
    let mut done = 0;
    while done < range.len {
        let rest = Range { offset: range.offset + done, len: range.len - done };
        let Some(extent) = guest(rest).ok().and_then(|rest| image.extent_at(rest).ok()) else { return false };
        if matches!(extent.state, ExtentState::Data { .. } | ExtentState::Compressed) {
            return true;
        }
        done += extent.len;
    }
    false
}
