//! The loop that convert and its relatives share: claim a chunk, see what is in it, read it, find its zeroes,
//! perhaps compress it, and write it in guest order.
//!
//! Memory: each worker has two slots, and a slot holds one chunk, which is 1 MiB (4 MiB where copying by the
//! storages was tried and did not work) or a cluster where that is more; where the target is compressed, a
//! second one for streams.

use crate::buffer::PageBuffer;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::map::Layers;
use crate::offload::{Moved, Offload};
use crate::pipeline::{Order, Stages, run};
use crate::progress::Progress;
use crate::source::{Below, Content, Run, SECTOR, Source};
use crate::zeroes::{ZeroGrid, is_zero};
use qcow2_core::{ClusterCodec, GuestDisk, GuestOffset, GuestRange, Image, ZeroMode};
use std::ops::{ControlFlow, Range};
use std::sync::{Mutex, PoisonError};

/// Bytes of a chunk, unless a cluster has more: large enough to make calls cheap, small enough to stay in the
/// cache between reading, looking for zeroes and writing.
const CHUNK: u64 = 1 << 20;
/// Bytes of a chunk that the storages are asked to copy by themselves: it is not read, so a call may as well
/// do more. The few that are under way when they refuse have this much memory each.
const OFFLOADED_CHUNK: u64 = 4 << 20;
/// The most bytes of zeroes that are written as one piece, so that progress and a stop are heard.
const MAX_ZEROES: u64 = 1 << 30;
/// How many unreadable places a report names.
const MAX_NAMED: usize = 1000;

/// How to copy.
pub(crate) struct CopyPlan<'a> {
    pub(crate) source: &'a Source,
    pub(crate) target: &'a dyn GuestDisk,
    /// Shortest run of zeroes between data that is left out; 0: everything is written.
    pub(crate) sparse_size: u64,
    /// From this byte on the target reads as zeroes where nothing is written.
    pub(crate) zero_from: Option<u64>,
    /// What of the source is not written.
    pub(crate) below: Below,
    /// The target's layers, where it is asked which zeroes it has already.
    pub(crate) target_layers: Option<&'a Layers>,
    /// The target as an image that takes compressed clusters, and its codec.
    pub(crate) compress: Option<(&'a Image, &'a dyn ClusterCodec)>,
    /// Whether the storages are asked to copy by themselves.
    pub(crate) offload: bool,
    pub(crate) order: Order,
    /// Unreadable sectors become zeroes.
    pub(crate) salvage: bool,
}

/// What copying did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CopyReport {
    /// Bytes written as data, as a machine sees them.
    pub data_bytes: u64,
    /// Those of them that the storages copied by themselves.
    pub offloaded_bytes: u64,
    /// Bytes that were made zero because the target might have held something else.
    pub zeroed_bytes: u64,
    /// Clusters that were stored compressed; their bytes are not in `data_bytes`.
    pub compressed_clusters: u64,
    /// Places that could not be read and are zeroes now, in order, with the reason; at most 1,000 are named.
    pub unreadable: Vec<Unreadable>,
    /// How many sectors could not be read.
    pub unreadable_sectors: u64,
}

/// A run of the source that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// The first byte.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// Why, as the errors on the way say.
    pub reason: String,
}

/// Copies the whole source. The target must be at least as large.
pub(crate) fn copy(
    plan: &CopyPlan<'_>,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    let target_unit = if plan.compress.is_some() {
        plan.target.cluster_size()
    } else if plan.target.cluster_size() > 0 {
        plan.target.zero_granularity()
    } else {
        plan.sparse_size.clamp(SECTOR, RAW_UNIT)
    };
    let copying = Copying {
        plan,
        grid: ZeroGrid { unit: floor_power(target_unit), shortest_run: plan.sparse_size },
        chunk: CHUNK.max(plan.target.cluster_size()).max(plan.source.cluster_size()),
        offload: if plan.offload { Offload::new(plan.target) } else { None },
        progress,
        report: Mutex::default(),
    };
    progress.set_total(plan.source.size());
    run(&copying, 0, plan.order, executor)?;
    let mut report = copying.report.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.unreadable.sort_by_key(|place| place.offset);
    Ok(report)
}

/// Zeroes of a raw target are looked for in pages: what file systems can leave out.
const RAW_UNIT: u64 = 4096;

fn floor_power(value: u64) -> u64 {
    1 << value.max(1).ilog2()
}

struct Copying<'a> {
    plan: &'a CopyPlan<'a>,
    grid: ZeroGrid,
    chunk: u64,
    offload: Option<Offload<'a>>,
    progress: &'a dyn Progress,
    report: Mutex<CopyReport>,
}

/// One piece of the copy.
#[derive(Default)]
pub(crate) struct Slot {
    range: Range<u64>,
    /// All of it is zeroes that have to be written.
    all_zero: bool,
    runs: Vec<Run>,
    plain: PageBuffer,
    packed: PageBuffer,
    steps: Vec<Step>,
    unreadable: Vec<Unreadable>,
    unreadable_sectors: u64,
}

/// Something to write.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// These guest bytes, from the slot's plain bytes.
    Data(Range<u64>),
    /// These guest bytes, from where this layer of the source has them.
    Copy(Range<u64>, u32),
    /// Zeroes.
    Zeroes(Range<u64>),
    /// A cluster as this part of the slot's packed bytes.
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
            if self.progress.should_stop() {
                return Err(Error::new(ErrorKind::Stopped, format!("stopped at byte {cursor} of {end}")));
            }
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
            self.progress.advance(*cursor - start);
        }
        Ok(false)
    }

    fn prepare(&self, slot: &mut Slot) -> Result<()> {
        slot.steps.clear();
        slot.unreadable.clear();
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
            // The storages do not copy by themselves: all of the chunk takes the way through the program.
            slot.steps.clear();
            self.fill(slot)?;
            done = self.write_steps(slot)?;
        }
        self.progress.advance(slot.range.end - slot.range.start);
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
    /// Reads the chunk and says what is to be written of it.
    fn fill(&self, slot: &mut Slot) -> Result<()> {
        self.find_runs(slot)?;
        let len = (slot.range.end - slot.range.start) as usize;
        // The end of the disk is padded to a whole cluster for the codec.
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

    /// Lists what the storages can copy by themselves; `false` if there is data that they cannot.
    fn plan_copies(&self, slot: &mut Slot) -> Result<bool> {
        let mut at = slot.range.start;
        while at < slot.range.end {
            let (run, stored) = self.plan.source.stored_at(at, slot.range.end - at, self.plan.below)?;
            at = run.end();
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

    /// Writes what was prepared; `None` if a storage was to copy by itself and did not.
    fn write_steps(&self, slot: &Slot) -> Result<Option<CopyReport>> {
        let mut done = CopyReport::default();
        let image = self.plan.target.as_image().is_some();
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

    /// A run of whole chunks from `start` on that need not be read, if there is one.
    fn hole_at(&self, start: u64, chunk: u64, chunk_end: u64) -> Result<Option<Run>> {
        let end = self.plan.source.size();
        let run = self.plan.source.content_at(start, end - start, self.plan.below)?;
        let written_anyway = self.plan.sparse_size == 0 && run.content == Content::Zero;
        if run.content == Content::Data || written_anyway || run.end() < chunk_end {
            return Ok(None);
        }
        let mut hole_end = if run.end() == end { end } else { run.end() - run.end() % chunk };
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

    /// Whether the target reads as zeroes from `at` on where nothing is written.
    fn reads_zero(&self, at: u64) -> bool {
        self.plan.zero_from.is_some_and(|from| at >= from)
    }

    /// Lists what is in the chunk, neighbours joined. For a compressed target runs that show the backing file
    /// are whole clusters: a cluster that has some bytes of its own is written as a whole.
    fn find_runs(&self, slot: &mut Slot) -> Result<()> {
        slot.runs.clear();
        let mut at = slot.range.start;
        while at < slot.range.end {
            let run = self.plan.source.content_at(at, slot.range.end - at, self.plan.below)?;
            at = run.end();
            match slot.runs.last_mut() {
                Some(last) if last.content == run.content => last.len += run.len,
                _ => slot.runs.push(run),
            }
        }
        if self.plan.compress.is_some() && slot.runs.iter().any(|run| run.content == Content::Backing) {
            slot.runs = self.whole_clusters(&slot.runs, slot.range.end);
        }
        Ok(())
    }

    fn whole_clusters(&self, runs: &[Run], end: u64) -> Vec<Run> {
        let unit = self.grid.unit;
        let mut wide: Vec<Run> = Vec::with_capacity(runs.len() * 3);
        let mut push = |start: u64, end: u64, content| match wide.last_mut() {
            _ if start >= end => {}
            Some(last) if last.content == content => last.len += end - start,
            _ => wide.push(Run { start, len: end - start, content }),
        };
        for run in runs {
            if run.content != Content::Backing {
                push(run.start, run.end(), run.content);
                continue;
            }
            let first = run.start.next_multiple_of(unit).min(run.end());
            let last = if run.end() == end { end } else { (run.end() - run.end() % unit).max(first) };
            push(run.start, first, Content::Data);
            push(first, last, Content::Backing);
            push(last, run.end(), Content::Data);
        }
        wide
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

    /// Reads what can be read of a run, sector by sector.
    fn salvage(&self, run: Run, slot: &mut Slot) {
        for at in (run.start..run.end()).step_by(SECTOR as usize) {
            let len = SECTOR.min(run.end() - at);
            let from = (at - slot.range.start) as usize;
            let buf = &mut slot.plain[from..from + len as usize];
            let Err(error) = self.plan.source.read_at(at, buf) else { continue };
            buf.fill(0);
            slot.unreadable_sectors += 1;
            let full = slot.unreadable.len() >= MAX_NAMED;
            match slot.unreadable.last_mut() {
                Some(last) if last.offset + last.len == at => last.len += len,
                _ if full => {}
                _ => slot.unreadable.push(Unreadable { offset: at, len, reason: reason(&error) }),
            }
        }
    }

    /// Cuts the chunk into what is written and what is left out.
    fn find_zeroes(&self, slot: &mut Slot) -> Result<()> {
        let mut i = 0;
        while i < slot.runs.len() {
            // Data and zeroes next to each other are one stretch: both are in the buffer.
            let stretch = slot.runs[i..].iter().take_while(|run| run.content != Content::Backing).count();
            let runs = &slot.runs[i..i + stretch];
            if let (Some(first), Some(last)) = (runs.first(), runs.last()) {
                self.cut(first.start..last.end(), slot.range.start, &slot.plain, &mut slot.steps)?;
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

    /// Writes zeroes as far as the target may hold something else, in whole units.
    fn add_zeroes(&self, range: Range<u64>, steps: &mut Vec<Step>) -> Result<()> {
        let units = |bytes: u64| bytes.checked_next_multiple_of(self.grid.unit).unwrap_or(u64::MAX);
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

    /// Makes a stream of each cluster that has something else than zeroes; what does not shrink stays plain.
    fn compress(&self, codec: &dyn ClusterCodec, slot: &mut Slot) -> Result<()> {
        let cluster = self.grid.unit;
        let mut packed = 0;
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
            } else if end - at < cluster && end < self.plan.target.size() {
                // The source ends within a cluster of a larger target.
                slot.steps.push(Step::Data(at..end));
            } else {
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

    /// Writes zeroes, or several steps of data or streams that follow each other. An error comes with the
    /// first byte of what failed.
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
