//! Requests on an open disk: each calls the disk and returns an outcome.

mod read;
mod vmstate;
mod write;

use crate::grammar::{Range, Style};
use crate::reason::{IO_ERROR, NO_MEDIUM, NOT_SUPPORTED, Reason};
use crate::report::Finished;
use qcow2_core::format::{Bitmap, Version};
use qcow2_core::{GuestDisk, GuestOffset, GuestRange, Image, Length, Preallocation, allocated_at};
use std::sync::Arc;
use std::time::Duration;

/// The part of an open disk that requests need; cheap to clone for background requests.
#[derive(Clone)]
pub(crate) struct Target {
    /// The disk with its backing chain.
    pub(crate) disk: Arc<dyn GuestDisk>,
    /// True if every write is flushed before it is reported.
    pub(crate) durable_writes: bool,
    /// True if discards reach the disk.
    pub(crate) discards: bool,
    /// True if an image that is marked as corrupt is gone.
    pub(crate) goes_when_corrupt: bool,
}

/// Bytes per call for requests that may be split.
const PIECE_LEN: u64 = 32 << 20;

impl Target {
    /// Size of the disk in bytes, rounded up to whole sectors as qemu-io does.
    pub(crate) fn len(&self) -> u64 {
        let size = self.disk.size();
        size.checked_next_multiple_of(512).unwrap_or(size)
    }

    /// Errors: `NO_MEDIUM` if the image has been marked as corrupt and is gone with that.
    pub(crate) fn check_there(&self) -> Result<(), Reason> {
        let corrupt = |image: &Image| image.header().is_corrupt();
        match self.goes_when_corrupt && self.disk.as_image().is_some_and(corrupt) {
            true => Err(Reason::System(NO_MEDIUM)),
            false => Ok(()),
        }
    }

    /// Number of bytes of the range that are allocated in the top layer, and number of bytes of the range
    /// that are inside the disk.
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

    /// Calls `visit` for every run of the disk, with true if the top layer has it allocated.
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

    /// Length of the run at the start of `range`, and true if the top layer has it allocated. The padding
    /// after the end of the disk, up to a whole sector, counts as allocated.
    fn run_at(&self, range: Range) -> Result<(u64, bool), Reason> {
        self.check_there()?;
        let there = self.disk.size().saturating_sub(range.offset).min(range.len);
        if there == 0 {
            return Ok((range.len, true));
        }
        Ok(allocated_at(&*self.disk, guest(Range { len: there, ..range })?)?)
    }

    /// Refuses sizes and preallocation modes that qemu-io refuses before it tries. Errors: the text for the
    /// user.
    pub(crate) fn refuse_resize(&self, size: u64, preallocation: Option<&str>) -> Result<(), &'static str> {
        let shrinks = size < self.disk.size() && preallocation.is_some();
        // What stands in the way of every other size is found when it is tried.
        let is_fixed = |image: &Image| {
            let header = image.header();
            let in_use = |bitmaps: Vec<Bitmap>| bitmaps.iter().any(|bitmap| bitmap.in_use);
            (header.version < Version::V3 && header.nb_snapshots > 0) || image.bitmaps().is_ok_and(in_use)
        };
        match self.disk.as_image() {
            Some(_) if !size.is_multiple_of(512) => Err("The new size must be a multiple of 512"),
            Some(image) if shrinks && is_fixed(image) => Ok(()),
            Some(_) if shrinks => Err("Preallocation can't be used for shrinking an image"),
            // Of what has a length of its own another thing is said.
            None if self.raw_length() != Length::Grows => Ok(()),
            None if shrinks => Err("Cannot use preallocation for shrinking files"),
            None if preallocation == Some("metadata") => Err("Unsupported preallocation mode: metadata"),
            _ => Ok(()),
        }
    }

    /// What the storage of a raw disk says of its length.
    fn raw_length(&self) -> Length {
        self.disk.as_raw().map_or(Length::Grows, |raw| raw.storage().limits().length)
    }

    /// Resizes the disk. Added space is preallocated according to `mode`. A device or an export that is large
    /// enough stays as it is: the size is what is needed at least.
    pub(crate) fn resize(&self, size: u64, mode: Preallocation) -> Result<(), qcow2_ops::Error> {
        let stays = match self.raw_length() {
            Length::Device => mode == Preallocation::Off,
            Length::Export => true,
            _ => false,
        };
        if stays && size <= self.disk.size() {
            return Ok(());
        }
        qcow2_ops::resize::resize_to(&*self.disk, size, mode, &qcow2_ops::Silent)
    }

    /// The disk as an image. Errors: `NOT_SUPPORTED` for a raw disk.
    fn image(&self) -> Result<&Image, Reason> {
        self.disk.as_image().ok_or(Reason::System(NOT_SUPPORTED))
    }

    /// True if the disk is there and `range` inside it.
    pub(crate) fn is_inside(&self, range: Range) -> bool {
        self.check_range(range.offset, range.len).is_ok()
    }

    /// Checks that the disk is there and that a request ends inside it. Errors: `NO_MEDIUM`; `IO_ERROR`, as a
    /// device returns.
    fn check_range(&self, offset: u64, len: u64) -> Result<(), Reason> {
        self.check_there()?;
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(Reason::System(IO_ERROR)),
        }
    }
}

fn report(verb: &'static str, range: Range, elapsed: Duration, style: Style) -> String {
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
