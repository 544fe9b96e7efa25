//! Requests on an open disk: reading and checking, writing in every way, discarding.

use super::command::{Check, Content, Manner, Place, Range, Read, Style, Write};
use super::report::{Finished, dump};
use super::source::{Source, out_of_memory};
use crate::render::qemu_text;
use qcow2_core::{
    Error, ErrorKind, ExtentState, GuestDisk, GuestOffset, GuestRange, Image, Preallocation, ZeroMode,
};
use qcow2_io::os_error_text;
use qcow2_ops::{NewSize, ResizeOptions};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What requests need to know of an open disk; cheap to copy for requests in the background.
#[derive(Clone)]
pub(super) struct Target {
    /// The disk with its chain.
    pub(super) disk: Arc<dyn GuestDisk>,
    /// Whether every write is durable when it is reported.
    pub(super) durable_writes: bool,
    /// Whether discards reach the disk.
    pub(super) discards: bool,
}

/// How a request went.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// For standard output.
    pub(super) text: String,
    /// For standard error.
    pub(super) complaint: Option<String>,
    /// Whether it failed.
    pub(super) failed: bool,
}

/// Why a request failed: the system's text for it.
pub(super) type Reason = String;

/// Bytes that are moved at once where a request may go in pieces.
pub(super) const PIECE_LEN: u64 = 32 << 20;
/// What a buffer holds before it is read into.
const FRESH_BYTE: u8 = 0xab;

impl Target {
    /// Bytes of the disk as the tools see it: whole sectors.
    pub(super) fn len(&self) -> u64 {
        sectors(self.disk.size())
    }

    /// `read` and its kin.
    pub(super) fn read(&self, request: &Read) -> Outcome {
        let name = if request.manner == Manner::Plain { "read" } else { "readv" };
        // Shown bytes are kept until the end, so that what is said of them comes first.
        let piece_len = if request.dump { request.range.len } else { PIECE_LEN };
        let mut bad = false;
        let mut bytes = Vec::new();
        let mut elapsed = Duration::ZERO;
        let mut done = 0;
        while done < request.range.len || (done == 0 && request.range.len == 0) {
            let len = piece_len.min(request.range.len - done);
            let started = Instant::now();
            let offset = request.range.offset + done;
            let result = fresh_buffer(&mut bytes, len).and_then(|()| match request.vm_state {
                true => self.read_vm_state(offset, &mut bytes),
                false => self.fill(offset, &mut bytes),
            });
            elapsed += started.elapsed();
            if let Err(reason) = result {
                return Outcome::failure(format!("{name} failed: {reason}\n"));
            }
            bad |= request.check.is_some_and(|check| !check.holds(done, &bytes));
            done += len;
            if len == 0 {
                break;
            }
        }
        let mut outcome = Outcome { failed: bad, ..Outcome::default() };
        if let Some(check) = request.check.filter(|_| bad) {
            let offset = request.range.offset + check.skip;
            outcome.text = format!("Pattern verification failed at offset {offset}, {} bytes\n", check.len);
        }
        if request.dump && !request.style.quiet {
            outcome.text += &dump(request.range.offset, &bytes);
        }
        outcome.text += &told("read", request.range, elapsed, request.style);
        outcome
    }

    /// Fills `buf`; a last sector that the disk only begins is zeroes where it ends.
    fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<(), Reason> {
        self.check_range(offset, buf.len() as u64)?;
        let there = self.disk.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (there, beyond) = buf.split_at_mut(there);
        beyond.fill(0);
        self.disk.read_at(GuestOffset::new(offset), there).map_err(|error| reason(&error))
    }

    /// `write` and its kin.
    pub(super) fn write(&self, request: &Write) -> Outcome {
        let mut source = match &request.content {
            Content::File(name) => match Source::file(name, request.range.len) {
                Ok(source) => source,
                Err(complaint) => {
                    return Outcome { complaint: Some(complaint), failed: true, ..Outcome::default() };
                }
            },
            Content::Byte(byte) => Source::byte(*byte),
            Content::Zeroes { .. } => Source::byte(0),
        };
        let started = Instant::now();
        let result = match (&request.content, request.place) {
            (_, Place::VmState) => self.write_vm_state(request.range, &mut source),
            // As in the original, zeroes stay zeroes where compressed ones are asked for.
            (Content::Zeroes { may_unmap, only_fast }, _) => self.zero(request.range, *may_unmap, *only_fast),
            (_, Place::Compressed) => self.write_compressed(request.range, &mut source),
            (_, Place::Disk) => self.write_data(request.range, &mut source),
        };
        let durable = self.durable_writes || request.durable;
        let result = result.and_then(|()| match durable && request.range.len > 0 {
            true => self.disk.flush().map_err(|error| reason(&error)),
            false => Ok(()),
        });
        match result {
            Ok(()) => Outcome::success(told("wrote", request.range, started.elapsed(), request.style)),
            Err(reason) => {
                let name = match request.manner {
                    Manner::Plain => "write",
                    Manner::Vectored => "writev",
                    Manner::Background => "aio_write",
                };
                Outcome::failure(format!("{name} failed: {reason}\n"))
            }
        }
    }

    fn write_data(&self, range: Range, source: &mut Source) -> Result<(), Reason> {
        self.complete_last_sector(range)?;
        let mut done = 0;
        while done < range.len {
            let len = PIECE_LEN.min(range.len - done);
            let bytes = source.next(len)?;
            self.disk
                .write_at(GuestOffset::new(range.offset + done), bytes)
                .map_err(|error| reason(&error))?;
            done += len;
        }
        Ok(())
    }

    fn zero(&self, range: Range, may_unmap: bool, only_fast: bool) -> Result<(), Reason> {
        self.complete_last_sector(range)?;
        if only_fast && !self.can_zero_fast(range)? {
            return Err(not_supported());
        }
        let mode = if may_unmap { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
        self.disk.write_zeroes(guest(range)?, mode).map_err(|error| reason(&error))
    }

    /// Whether `range` can become zeroes by metadata alone: its ends lie on clusters, or in what reads as
    /// zeroes.
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
        let image = self.disk.as_image().ok_or_else(not_supported)?;
        let cluster_size = image.cluster_size();
        let end = range.offset + range.len;
        if !range.offset.is_multiple_of(cluster_size)
            || (!end.is_multiple_of(cluster_size) && end != self.disk.size())
        {
            return Err(os_error_text(INVALID_ARGUMENT));
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

    /// `discard`.
    pub(super) fn discard(&self, range: Range, style: Style) -> Outcome {
        let started = Instant::now();
        let result = self.check_range(range.offset, range.len).and_then(|()| {
            let there = self.disk.size().saturating_sub(range.offset).min(range.len);
            match self.discards {
                true => {
                    self.disk.discard(guest(Range { len: there, ..range })?).map_err(|error| reason(&error))
                }
                false => Ok(()),
            }
        });
        match result {
            Ok(()) => Outcome::success(told("discard", range, started.elapsed(), style)),
            Err(reason) => Outcome::failure(format!("discard failed: {reason}\n")),
        }
    }

    /// How much of the range is allocated in the top layer, and how much of it is on the disk at all.
    pub(super) fn allocated(&self, range: Range) -> Result<(u64, u64), Reason> {
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
    pub(super) fn map(&self, visit: &mut dyn FnMut(Range, bool)) -> Result<(), Reason> {
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
        let extent =
            self.disk.extent_at(guest(Range { len: there, ..range })?).map_err(|error| reason(&error))?;
        Ok((extent.len, extent.state != ExtentState::Unallocated))
    }

    /// Changes the size of the disk; what is new gets its space as `preallocation` says. Errors: the text
    /// after the program's name.
    pub(super) fn resize(&self, size: u64, preallocation: Option<&str>) -> Result<(), String> {
        if self.disk.as_image().is_some() && !size.is_multiple_of(512) {
            return Err("The new size must be a multiple of 512".to_owned());
        }
        if self.disk.as_image().is_none() && preallocation == Some("metadata") {
            return Err("Unsupported preallocation mode: metadata".to_owned());
        }
        let mode = match preallocation {
            Some("metadata") => Preallocation::Metadata,
            Some("falloc") => Preallocation::Falloc,
            Some(_) => Preallocation::Full,
            None => Preallocation::Off,
        };
        let failed = |reason: String| format!("Could not resize: {reason}");
        if mode == Preallocation::Off || size <= self.disk.size() {
            return self.disk.resize(size).map_err(|error| failed(reason(&error)));
        }
        let mut options = ResizeOptions::new(NewSize::Exactly(size));
        options.preallocation = mode;
        qcow2_ops::resize(&*self.disk, &options, &qcow2_ops::Silent)
            .map_err(|error| failed(error.core_error().map_or_else(|| qemu_text::chain(&error), reason)))
    }

    /// Requests past the end are failures of the device.
    fn check_range(&self, offset: u64, len: u64) -> Result<(), Reason> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            _ => Err(os_error_text(IO_ERROR)),
        }
    }

    /// Checks the range of a write; a disk that ends inside the sector that is written gets all of it.
    fn complete_last_sector(&self, range: Range) -> Result<(), Reason> {
        self.check_range(range.offset, range.len)?;
        if range.offset + range.len > self.disk.size() {
            self.disk.resize(self.len()).map_err(|error| reason(&error))?;
        }
        Ok(())
    }
}

/// Whether metadata alone says that `range`, as far as the disk has it, reads as zeroes.
fn reads_as_zeroes(disk: &dyn GuestDisk, range: Range) -> Result<bool, Reason> {
    let end = disk.size().min(range.offset + range.len);
    let mut at = range.offset;
    while at < end {
        let rest = Range { offset: at, len: end - at };
        let extent = disk.extent_at(guest(rest)?).map_err(|error| reason(&error))?;
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

fn write_cluster(image: &Image, range: Range, bytes: &[u8]) -> Result<(), Reason> {
    image.write_compressed(GuestOffset::new(range.offset), bytes).map_err(|error| {
        let taken = error.kind() == ErrorKind::Unsupported
            && guest(range).ok().and_then(|range| image.extent_at(range).ok()).is_some_and(|extent| {
                matches!(extent.state, ExtentState::Data { .. } | ExtentState::Compressed)
            });
        if taken { os_error_text(IO_ERROR) } else { reason(&error) }
    })
}

impl Check {
    /// Whether `bytes`, which come after `done` others of the request, are what they must be.
    fn holds(&self, done: u64, bytes: &[u8]) -> bool {
        let inside = |position: u64| position.saturating_sub(done).min(bytes.len() as u64) as usize;
        bytes[inside(self.skip)..inside(self.skip + self.len)].iter().all(|byte| *byte == self.byte)
    }
}

impl Outcome {
    fn success(text: String) -> Self {
        Self { text, ..Self::default() }
    }

    fn failure(text: String) -> Self {
        Self { text, failed: true, ..Self::default() }
    }
}

fn fresh_buffer(bytes: &mut Vec<u8>, len: u64) -> Result<(), Reason> {
    bytes.clear();
    bytes.try_reserve_exact(len as usize).map_err(|_| out_of_memory())?;
    bytes.resize(len as usize, FRESH_BYTE);
    Ok(())
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
    GuestRange::new(GuestOffset::new(range.offset), range.len).ok_or_else(|| os_error_text(IO_ERROR))
}

fn sectors(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(512).unwrap_or(bytes)
}

/// The system's text for an error of the engine: that of the storage, or of what it amounts to.
pub(super) fn reason(error: &Error) -> Reason {
    if let Some(code) = error.storage_error().and_then(|error| error.os_code()) {
        return os_error_text(code);
    }
    if error.kind() == ErrorKind::NoSpace && error.storage_error().is_none() {
        // Not the disk is full but something that has a limit, which only the engine can name.
        return format!("{}: {}", os_error_text(NO_SPACE), qemu_text::chain(error));
    }
    os_error_text(match error.kind() {
        ErrorKind::NoSpace => NO_SPACE,
        ErrorKind::ReadOnly => NOT_PERMITTED,
        ErrorKind::Unsupported | ErrorKind::Encrypted => NOT_SUPPORTED,
        ErrorKind::InvalidOption => INVALID_ARGUMENT,
        _ => IO_ERROR,
    })
}

pub(super) fn not_supported() -> Reason {
    os_error_text(NOT_SUPPORTED)
}

/// Error numbers of Linux, for their texts.
const NOT_PERMITTED: i32 = 1;
const IO_ERROR: i32 = 5;
const INVALID_ARGUMENT: i32 = 22;
const NO_SPACE: i32 = 28;
const NOT_SUPPORTED: i32 = 95;
