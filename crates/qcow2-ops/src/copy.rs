//! The copy loop of convert, commit, dd and rebase: claim a chunk, classify it, read it, find its zeroes,
//! maybe compress it, and write it in guest order.
//!
//! Memory: two slots per worker, each with one chunk: 1 MiB (4 MiB after copy offload was tried and refused),
//! or a cluster if that is larger. A compressed target needs a second buffer per slot for the streams.

use crate::buffer::PageBuffer;
use crate::convert::no_streams;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::map::Layers;
use crate::offload::{Moved, Offload};
use crate::pieces::{Pieces, add};
use crate::pipeline::{Order, Stages, run};
use crate::progress::Progress;
pub use crate::report::{CopyReport, Unreadable};
use crate::source::{Below, Content, Run, SECTOR, Source};
use crate::whole::{before, whole_clusters};
use crate::zeroes::{ZeroGrid, is_zero};
use qcow2_core::{ClusterCodec, GuestDisk, GuestOffset, GuestRange, Image, ZeroMode};
use std::ops::{ControlFlow, Range};
use std::sync::{Mutex, PoisonError};

/// Bytes per chunk; at least a cluster. Large enough to make calls cheap, small enough to stay in the CPU
/// cache between reading, searching for zeroes and writing.
const CHUNK: u64 = 1 << 20;
/// Bytes per chunk with copy offload. The data is not read, so each call may do more. Chunks that are in
/// flight when a storage refuses need this much memory each.
const OFFLOADED_CHUNK: u64 = 4 << 20;
/// The most zeroes written in one piece, in bytes, so that progress and stop requests are not held up.
const MAX_ZEROES: u64 = 1 << 30;
/// The most unreadable ranges listed in a report.
const MAX_NAMED: usize = 1000;

/// The parameters of a copy.
pub(crate) struct CopyPlan<'a> {
    pub(crate) source: &'a Source,
    pub(crate) target: &'a dyn GuestDisk,
    /// Shortest run of zeroes between data that is left out, in bytes; 0 writes everything.
    pub(crate) sparse_size: u64,
    /// From this guest offset on, unwritten ranges of the target read as zeroes; `None`: nowhere.
    pub(crate) zero_from: Option<u64>,
    /// Which unallocated ranges of the source are not written.
    pub(crate) below: Below,
    /// Which of these are written all the same, in ascending order.
    pub(crate) copied_anyway: Vec<Range<u64>>,
    /// The target's layers, to find zeroes that it already has.
    pub(crate) target_layers: Option<&'a Layers>,
    /// The target as an image for compressed clusters, with its codec.
    pub(crate) compress: Option<(&'a Image, &'a dyn ClusterCodec)>,
    /// Try copy offload.
    pub(crate) offload: bool,
    pub(crate) order: Order,
    /// Replace unreadable sectors by zeroes.
    pub(crate) salvage: bool,
}

/// Copies the whole source. The target must be at least as large. The total that `progress` gets is the data
/// to be copied.
pub(crate) fn copy(
    plan: &CopyPlan<'_>,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    let grid = ZeroGrid::of_target(plan.target, plan.compress.is_some(), plan.sparse_size);
    // What a longer run of zeroes is counted in ends with the chunk.
    let chunk = if plan.sparse_size > SHORT_SPARSE { LONG_CHUNK } else { CHUNK };
    let copying = Copying {
        plan,
        grid,
        chunk: chunk.max(plan.target.cluster_size()).max(plan.source.cluster_size()),
        offload: if plan.offload { Offload::new(plan.target) } else { None },
        progress,
        pieces: Pieces::new(progress),
        report: Mutex::default(),
    };
    progress.set_total(if progress.is_watched() { plan.data_to_copy(progress)? } else { plan.source.size() });
    run(&copying, 0, plan.order, executor)?;
    copying.pieces.end();
    let mut report = copying.report.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.unreadable.sort_by_key(|place| place.offset);
    Ok(report)
}

/// The largest sparse size for which chunks are short.
const SHORT_SPARSE: u64 = 4096;
/// Bytes per chunk with a larger one. Origin: QEMU's, so that both leave the same zeroes out.
const LONG_CHUNK: u64 = 2 << 20;

struct Copying<'a> {
    plan: &'a CopyPlan<'a>,
    grid: ZeroGrid,
    chunk: u64,
    offload: Option<Offload<'a>>,
    progress: &'a dyn Progress,
    pieces: Pieces<'a>,
    report: Mutex<CopyReport>,
}

/// One chunk of the copy.
#[derive(Default)]
pub(crate) struct Slot {
    range: Range<u64>,
    /// The whole chunk is zeroes that must be written.
    all_zero: bool,
    runs: Vec<Run>,
    /// The data of the source in it.
    data: Vec<Range<u64>>,
    plain: PageBuffer,
    packed: PageBuffer,
    steps: Vec<Step>,
    unreadable: Vec<Unreadable>,
    unreadable_sectors: u64,
    /// Where the tables did not tell what is stored.
    unmapped: Vec<Range<u64>>,
}

/// A write operation.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Write these guest bytes from the slot's `plain` buffer.
    Data(Range<u64>),
    /// Let the storages copy these guest bytes from this layer of the source.
    Copy(Range<u64>, u32),
    /// Write zeroes.
    Zeroes(Range<u64>),
    /// Write a compressed cluster from this part of the slot's `packed` buffer.
    Stream(Range<u64>, Range<usize>),
}

impl Stages for Copying<'_> {
    type Cursor = u64;
    type Slot = Slot;

    fn slot(&self) -> Slot {
        Slot::default()
    }

    fn claim(&self, cursor: &mut u64, slot: &mut Slot) -> Result<bool> {
        let end = self.plan.source.size();
        while *cursor < end {
            self.plan.check_stop(*cursor, self.progress)?;
            let start = *cursor;
            let chunk = self.chunk();
            let chunk_end = (start - start % chunk).saturating_add(chunk).min(end);
            let hole = self.hole_at(start, chunk, chunk_end)?;
            *cursor = hole.as_ref().map_or(chunk_end, |hole| hole.end());
            slot.range = start..*cursor;
            slot.all_zero = matches!(&hole, Some(hole) if !self.may_skip(hole));
            if hole.is_none() || slot.all_zero {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn prepare(&self, slot: &mut Slot) -> Result<()> {
        slot.steps.clear();
        slot.data.clear();
        slot.unreadable.clear();
        slot.unmapped.clear();
        slot.unreadable_sectors = 0;
        if slot.all_zero {
            return self.add_zeroes(slot.range.clone(), &mut slot.steps);
        }
        if self.offload.as_ref().is_some_and(Offload::is_possible) && self.plan_copies(slot)? {
            return Ok(());
        }
        self.fill(slot)
    }

    fn finish(&self, slot: &mut Slot) -> Result<ControlFlow<()>> {
        let mut done = self.write_steps(slot)?;
        if done.is_none() {
            // A storage refused copy offload. Redo the whole chunk by reading and writing it.
            slot.steps.clear();
            self.fill(slot)?;
            done = self.write_steps(slot)?;
        }
        self.pieces.copied(&slot.data);
        let done = done.unwrap_or_default();
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.data_bytes += done.data_bytes;
        report.offloaded_bytes += done.offloaded_bytes;
        report.zeroed_bytes += done.zeroed_bytes;
        report.compressed_clusters += done.compressed_clusters;
        report.unreadable_sectors += slot.unreadable_sectors;
        let named = MAX_NAMED - report.unreadable.len();
        report.unreadable.extend(slot.unreadable.drain(..).take(named));
        Ok(ControlFlow::Continue(()))
    }
}

impl Copying<'_> {
    /// Reads the chunk and plans its write operations.
    fn fill(&self, slot: &mut Slot) -> Result<()> {
        self.find_runs(slot)?;
        let len = (slot.range.end - slot.range.start) as usize;
        // The codec needs a whole cluster, so the end of the disk is padded.
        let room =
            if self.plan.compress.is_some() { len.next_multiple_of(self.grid.unit as usize) } else { len };
        slot.plain.set_len(room);
        slot.plain[len..room].fill(0);
        self.read_runs(slot)?;
        match self.plan.compress {
            Some((_, codec)) => self.compress(codec, slot),
            None => self.find_zeroes(slot),
        }
    }

    /// Plans copy offload for the whole chunk. Returns `false` if some of its data cannot be offloaded.
    fn plan_copies(&self, slot: &mut Slot) -> Result<bool> {
        let mut at = slot.range.start;
        while at < slot.range.end {
            let (run, stored) = self.plan.source.stored_at(at, slot.range.end - at, self.plan.below)?;
            at = run.end();
            if self.plan.is_read(&run) {
                add(&mut slot.data, run.start..at);
            }
            match (run.content, stored) {
                (Content::Backing, _) => {}
                (Content::Zero, _) => self.add_zeroes(run.start..at, &mut slot.steps)?,
                (Content::Data, Some(depth)) => match slot.steps.last_mut() {
                    Some(Step::Copy(last, layer)) if last.end == run.start && *layer == depth => {
                        last.end = at
                    }
                    _ => slot.steps.push(Step::Copy(run.start..at, depth)),
                },
                (Content::Data, None) => {
                    slot.steps.clear();
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Executes the planned steps. `None` if copy offload was refused.
    fn write_steps(&self, slot: &Slot) -> Result<Option<CopyReport>> {
        let mut done = CopyReport::default();
        let image = self.plan.target.as_image().is_some();
        // For an image, parts passed in one call share their table updates. A raw disk gains nothing from it.
        let together = |a: &Step, b: &Step| match (a, b) {
            (Step::Stream(..), Step::Stream(..)) => true,
            (Step::Data(_), Step::Data(_)) => image,
            _ => false,
        };
        for steps in slot.steps.chunk_by(together) {
            let written = self.write(slot, steps, &mut done).map_err(|(at, e)| {
                Error::new(ErrorKind::Write, format!("error while writing at byte {at}")).with_source(e)
            })?;
            if written == Moved::Refused {
                return Ok(None);
            }
        }
        Ok(Some(done))
    }

    /// Bytes of the next chunk.
    fn chunk(&self) -> u64 {
        match &self.offload {
            Some(offload) if offload.is_possible() => self.chunk.max(OFFLOADED_CHUNK),
            _ => self.chunk,
        }
    }

    /// A run of whole chunks from `start` that need not be read, if there is one.
    fn hole_at(&self, start: u64, chunk: u64, chunk_end: u64) -> Result<Option<Run>> {
        let end = self.plan.source.size();
        let run = match self.plan.joined_at(start, end - start) {
            Err(_) if self.plan.salvage => return Ok(None),
            run => before(run?, &self.plan.copied_anyway),
        };
        let written_anyway = self.plan.sparse_size == 0 && run.content == Content::Zero;
        if run.content == Content::Data || written_anyway || run.end() < chunk_end {
            return Ok(None);
        }
        // Less than a chunk at the end of the hole is left to the next claim, together with the data after
        // it.
        let mut hole_end = if run.end() == end { end } else { run.end() - run.end() % chunk };
        // From `zero_from` on nothing has to be written, so this claim ends there. It ends at a chunk
        // boundary, like all claims, so that no two workers write to the same cluster.
        if run.content == Content::Zero && !self.may_skip(&run) {
            let chunks = |bytes: u64| bytes.checked_next_multiple_of(chunk).unwrap_or(u64::MAX);
            let zero_from = self.plan.zero_from.map_or(u64::MAX, chunks);
            hole_end = hole_end.min(zero_from).min(start.saturating_add(chunks(MAX_ZEROES)));
        }
        Ok(Some(Run { len: hole_end - start, ..run }))
    }

    fn may_skip(&self, run: &Run) -> bool {
        match run.content {
            Content::Data => false,
            Content::Zero => self.reads_zero(run.start),
            Content::Backing => true,
        }
    }

    /// True if the target reads as zeroes from `at` on where nothing is written.
    fn reads_zero(&self, at: u64) -> bool {
        self.plan.zero_from.is_some_and(|from| at >= from)
    }

    /// Classifies the ranges of the chunk and joins equal neighbours. For a compressed target, ranges that
    /// stay backed are reduced to whole clusters: a cluster with any data of its own, or that is copied
    /// anyway, is written completely.
    fn find_runs(&self, slot: &mut Slot) -> Result<()> {
        slot.runs.clear();
        slot.data.clear();
        let mut at = slot.range.start;
        while at < slot.range.end {
            let run = match self.plan.source.content_at(at, slot.range.end - at, self.plan.below) {
                Err(_) if self.plan.salvage => self.unmapped(at, slot),
                run => run?,
            };
            at = run.end();
            if self.plan.is_read(&run) {
                add(&mut slot.data, run.start..at);
            }
            match slot.runs.last_mut() {
                Some(last) if last.content == run.content => last.len += run.len,
                _ => slot.runs.push(run),
            }
        }
        if self.plan.compress.is_some() && slot.runs.iter().any(|run| run.content == Content::Backing) {
            slot.runs = whole_clusters(&slot.runs, slot.range.end, self.grid.unit, &self.plan.copied_anyway);
        }
        Ok(())
    }

    /// The rest of the cluster at `at`, of which the tables do not tell where it is: it may still be read.
    fn unmapped(&self, at: u64, slot: &mut Slot) -> Run {
        let run = self.plan.cluster_at(at, slot.range.end);
        slot.unmapped.push(at..run.end());
        run
    }

    fn read_runs(&self, slot: &mut Slot) -> Result<()> {
        for i in 0..slot.runs.len() {
            let run = slot.runs[i];
            let from = (run.start - slot.range.start) as usize;
            let buf = &mut slot.plain[from..from + run.len as usize];
            match run.content {
                Content::Zero => buf.fill(0),
                Content::Backing => {}
                Content::Data => match self.plan.source.read_at(run.start, buf) {
                    Ok(()) => {}
                    Err(_) if self.plan.salvage => self.salvage(run, slot),
                    Err(e) => {
                        let context = format!("error while reading at byte {}", run.start);
                        return Err(Error::new(ErrorKind::Read, context).with_source(e));
                    }
                },
            }
        }
        Ok(())
    }

    /// Reads as much of a run as possible, sector by sector.
    fn salvage(&self, run: Run, slot: &mut Slot) {
        for at in (run.start..run.end()).step_by(SECTOR as usize) {
            let len = SECTOR.min(run.end() - at);
            let from = (at - slot.range.start) as usize;
            let buf = &mut slot.plain[from..from + len as usize];
            let Err(error) = self.plan.source.read_at(at, buf) else { continue };
            buf.fill(0);
            slot.unreadable_sectors += 1;
            let full = slot.unreadable.len() >= MAX_NAMED;
            let unmapped = slot.unmapped.iter().any(|range| range.contains(&at));
            let os_code = error.storage_error().and_then(|error| error.os_code());
            match slot.unreadable.last_mut() {
                Some(last)
                    if last.offset + last.len == at
                        && (last.unmapped, last.os_code) == (unmapped, os_code) =>
                {
                    last.len += len;
                }
                _ if full => {}
                _ => {
                    let reason = reason(&error);
                    slot.unreadable.push(Unreadable { offset: at, len, reason, os_code, unmapped });
                }
            }
        }
    }

    /// Splits the chunk into ranges to write and ranges to leave out.
    fn find_zeroes(&self, slot: &mut Slot) -> Result<()> {
        let mut i = 0;
        while i < slot.runs.len() {
            // Adjacent data and zero runs form one stretch: both are in the buffer.
            let stretch = slot.runs[i..].iter().take_while(|run| run.content != Content::Backing).count();
            let runs = &slot.runs[i..i + stretch];
            if let (Some(first), Some(last)) = (runs.first(), runs.last()) {
                let (mut at, start, end) = (first.start, slot.range.start, last.end());
                let zeroes = runs.iter().filter(|run| run.content == Content::Zero);
                for hole in self.grid.known(zeroes.map(|run| run.start..run.end()), end) {
                    self.cut(at..hole.start, start, &slot.plain, &mut slot.steps)?;
                    at = hole.end;
                    self.add_zeroes(hole, &mut slot.steps)?;
                }
                self.cut(at..end, start, &slot.plain, &mut slot.steps)?;
            }
            i += stretch + 1;
        }
        Ok(())
    }

    fn cut(&self, range: Range<u64>, buffer_start: u64, plain: &[u8], steps: &mut Vec<Step>) -> Result<()> {
        if self.plan.sparse_size == 0 {
            steps.push(Step::Data(range));
            return Ok(());
        }
        let bytes = &plain[(range.start - buffer_start) as usize..(range.end - buffer_start) as usize];
        let mut done = Ok(());
        self.grid.split(range.start, bytes, &mut |at, len, zero| match zero {
            true if done.is_ok() => done = self.add_zeroes(at..at + len, steps),
            true => {}
            false => steps.push(Step::Data(at..at + len)),
        });
        done
    }

    /// Plans writing zeroes where the target may hold other data, in whole units.
    fn add_zeroes(&self, range: Range<u64>, steps: &mut Vec<Step>) -> Result<()> {
        // A unit that the backing file ends in still shows its data, so it is zeroed as a whole.
        let units = |bytes: u64| bytes.checked_next_multiple_of(self.grid.target_unit).unwrap_or(u64::MAX);
        let end = self.plan.zero_from.map_or(range.end, |from| range.end.min(units(from)));
        let Some(target) = self.plan.target_layers.filter(|_| range.start < end) else {
            if range.start < end {
                steps.push(Step::Zeroes(range.start..end));
            }
            return Ok(());
        };
        let mut at = range.start;
        while at < end {
            let there = target.extent_at(at, end - at).map_err(|e| {
                let context = format!("error while reading block status of the target at offset {at}");
                Error::new(ErrorKind::Extents, context).with_source(e)
            })?;
            let next = at + there.len;
            match steps.last_mut() {
                _ if there.zero => {}
                Some(Step::Zeroes(last)) if last.end == at => last.end = next,
                _ => steps.push(Step::Zeroes(at..next)),
            }
            at = next;
        }
        Ok(())
    }

    /// Compresses each cluster that is not all zeroes. A cluster that does not shrink is written
    /// uncompressed.
    fn compress(&self, codec: &dyn ClusterCodec, slot: &mut Slot) -> Result<()> {
        let cluster = self.grid.unit;
        let mut packed = 0;
        let streams = self.plan.compress.is_none_or(|(image, _)| !image.header().has_data_file());
        slot.packed.set_len(slot.plain.len());
        let mut runs = slot.runs.iter().filter(|run| run.content == Content::Backing).peekable();
        let mut at = slot.range.start;
        while at < slot.range.end {
            let end = (at - at % cluster + cluster).min(slot.range.end);
            while runs.next_if(|run| run.end() <= at).is_some() {}
            let backing = runs.peek().is_some_and(|run| run.start <= at);
            let from = (at - slot.range.start) as usize;
            let plain = &slot.plain[from..from + cluster as usize];
            if backing {
            } else if self.plan.sparse_size > 0 && is_zero(plain) {
                self.add_zeroes(at..end, &mut slot.steps)?;
            } else if !streams {
                return Err(Error::new(ErrorKind::Write, format!("error while writing at byte {at}"))
                    .with_source(no_streams()));
            } else if end - at < cluster && end < self.plan.target.size() {
                // The source ends inside a cluster of a larger target. Writing the whole cluster would
                // overwrite the bytes after it.
                slot.steps.push(Step::Data(at..end));
            } else {
                // The stream must be shorter than a cluster: otherwise storing it would save nothing.
                let room = packed + cluster as usize - 1;
                let stream = codec.compress(plain, &mut slot.packed[packed..room]).map_err(|e| {
                    Error::new(ErrorKind::Write, format!("error while compressing at byte {at}"))
                        .with_source(e)
                })?;
                match stream {
                    Some(len) => {
                        slot.steps.push(Step::Stream(at..end, packed..packed + len));
                        packed += len;
                    }
                    None => match slot.steps.last_mut() {
                        Some(Step::Data(before)) if before.end == at => before.end = end,
                        _ => slot.steps.push(Step::Data(at..end)),
                    },
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Executes one zero or copy step, or several adjacent data or stream steps at once. An error comes with
    /// the guest offset of the first of them.
    fn write(
        &self,
        slot: &Slot,
        steps: &[Step],
        done: &mut CopyReport,
    ) -> Result<Moved, (u64, qcow2_core::Error)> {
        let target = self.plan.target;
        match steps {
            [Step::Copy(range, depth), ..] => {
                let Some(offload) = &self.offload else { return Ok(Moved::Refused) };
                let len = range.end - range.start;
                done.data_bytes += len;
                done.offloaded_bytes += len;
                return offload.copy(self.plan.source, range.clone(), *depth).map_err(|e| (range.start, e));
            }
            [Step::Data(first), ..] => {
                let mut parts = Vec::with_capacity(steps.len());
                for step in steps {
                    if let Step::Data(range) = step {
                        let from = (range.start - slot.range.start) as usize;
                        let bytes = &slot.plain[from..from + (range.end - range.start) as usize];
                        done.data_bytes += bytes.len() as u64;
                        parts.push((GuestOffset::new(range.start), bytes));
                    }
                }
                target.write_parts(&parts).map_err(|e| (first.start, e))?;
            }
            [Step::Zeroes(range), ..] => {
                done.zeroed_bytes += range.end - range.start;
                let range = GuestRange::between(GuestOffset::new(range.start), GuestOffset::new(range.end));
                target.write_zeroes(range, ZeroMode::MayUnmap).map_err(|e| (range.start().value(), e))?;
            }
            [Step::Stream(first, _), ..] => {
                done.compressed_clusters += steps.len() as u64;
                let Some((image, _)) = self.plan.compress else { return Ok(Moved::All) };
                let mut streams = Vec::with_capacity(steps.len());
                for step in steps {
                    if let Step::Stream(range, part) = step {
                        streams.push((GuestOffset::new(range.start), &slot.packed[part.clone()]));
                    }
                }
                image.write_compressed_streams(&streams).map_err(|e| (first.start, e))?;
            }
            [] => {}
        }
        Ok(Moved::All)
    }
}

/// An error and its causes in one line.
fn reason(error: &qcow2_core::Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
