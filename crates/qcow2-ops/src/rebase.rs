//! Rebase: changes the backing file of an overlay and keeps the guest content.

use crate::chain::close;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::pipeline::{Order, Stages, run};
use crate::port::{Chain, NewBacking};
use crate::progress::Progress;
use crate::source::Source;
use crate::zeroes::is_zero;
use qcow2_core::format::{AutoclearFeatures, FormatErrorKind, Version};
use qcow2_core::{BackingName, ExtentState, GuestDisk, GuestOffset, GuestRange, Image, ZeroMode};
use std::fmt;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, PoisonError};

/// Options of a rebase.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RebaseOptions {
    /// Name of the new backing file, recorded unchanged; `None`: no backing file.
    pub backing_file: Option<String>,
    /// Format of the new backing file; required if there is one.
    pub backing_format: Option<String>,
    /// Change only the recorded name, for a backing file that has moved. Neither chain is read; if their
    /// contents differ, the guest content changes.
    pub name_only: bool,
    /// Store clusters compressed if that makes them smaller.
    pub compress: bool,
}

impl RebaseOptions {
    /// Rebases onto the backing file `name` of the given `format`.
    pub fn onto(name: impl Into<String>, format: impl Into<String>) -> Self {
        let (name, format) = (Some(name.into()), Some(format.into()));
        Self { backing_file: name, backing_format: format, ..Self::default() }
    }

    /// Sets whether to change only the recorded name.
    #[must_use]
    pub fn with_name_only(self, name_only: bool) -> Self {
        Self { name_only, ..self }
    }

    /// Sets whether to compress clusters.
    #[must_use]
    pub fn with_compress(self, compress: bool) -> Self {
        Self { compress, ..self }
    }
}

/// Why an image cannot be rebased as requested. The image is unchanged.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// The clusters of this disk cannot be compressed.
    Compression,
    /// The port does not know this format.
    UnknownFormat(String),
    /// No format was given for the backing file. Without one it would be probed at every opening.
    FormatMissing,
    /// Only a qcow2 image has a backing file.
    NotAnImage,
    /// The external data file is a raw copy of the guest disk, so the image must not read from a backing
    /// file.
    RawDataFile,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Compression => f.write_str("clusters of this disk cannot be compressed"),
            Self::UnknownFormat(name) => write!(f, "format '{name}' cannot be recorded for a backing file"),
            Self::FormatMissing => f.write_str("the format of the backing file must be given"),
            Self::NotAnImage => f.write_str("only a qcow2 image has a backing file"),
            Self::RawDataFile => f.write_str("an image with a raw data file has no backing file"),
        }
    }
}

impl std::error::Error for Refusal {}

/// The result of a rebase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RebaseReport {
    /// Bytes copied into the overlay.
    pub data_bytes: u64,
    /// Bytes recorded as zeroes in the overlay.
    pub zeroed_bytes: u64,
}

/// Changes the backing file of an overlay. `top`: the overlay, opened for writing, with its backing chain or,
/// for [`name_only`](RebaseOptions::name_only), without it. `new`: opens the new backing file; not called for
/// `name_only`.
///
/// Disk: copies into the overlay all ranges in which the two chains differ. Ranges that are equal by their
/// tables, by holes or by a shared layer are not read. The data is durable before the recorded name changes,
/// and the last write of that change is a single sector: the guest content is the same at every moment, and a
/// crash or an error leaves the old backing file or the new one. The image is closed at the end, also after
/// an error. Memory: at most four chunks of both chains per worker; a chunk is 1 MiB, or a cluster if that is
/// larger.
///
/// Errors: `InvalidOption` or `Unsupported` with a [`Refusal`] as source; `Open` with the error of `new`;
/// `Extents`, `Read`, `Write` with the first byte of the failed range; `Unsupported` for a compressed rebase
/// of an image without a codec; `InvalidOption` with the engine's error for a name that is too long;
/// `Metadata` if it cannot be written; `Stopped`; `Close`.
pub fn rebase(
    top: Chain,
    new: &dyn NewBacking,
    options: &RebaseOptions,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<RebaseReport> {
    if options.compress && top.disk.as_image().is_none() {
        return Err(refused(Refusal::Compression));
    }
    if let Some(format) = options.backing_format.as_ref().filter(|format| !new.is_format(format)) {
        return Err(refused(Refusal::UnknownFormat(format.clone())));
    }
    // A disk that cannot have a backing file is dropped before the new one is opened: they may be the same
    // file, and the lock would be in the way.
    let top = Some(top).filter(|top| top.disk.as_image().is_some());
    let opened =
        match options.backing_file.is_some() && !options.name_only {
            true => Some(new.open().map_err(|e| {
                Error::new(ErrorKind::Open, "opening the new backing file").with_boxed_source(e)
            })?),
            false => None,
        };
    if options.backing_file.is_some() && options.backing_format.is_none() {
        return Err(refused(Refusal::FormatMissing));
    }
    let Some((top, image)) = top.as_ref().and_then(|top| Some((top, top.disk.as_image()?))) else {
        return Err(refused(Refusal::NotAnImage));
    };
    let raw_data = image.header().features.autoclear.contains(AutoclearFeatures::RAW_DATA_FILE);
    if raw_data && options.backing_file.is_some() {
        return Err(refused(Refusal::RawDataFile));
    }
    let copied = match options.name_only {
        true => Ok(RebaseReport::default()),
        false => copy_difference(top, opened.as_ref(), options.compress, executor, progress),
    };
    let renamed = copied.and_then(|report| change_name(image, options).map(|()| report));
    // Close after an error too: copied data is correct with the old backing file as well.
    let closed = close(&*top.disk);
    let report = renamed?;
    closed.map(|()| report)
}

fn refused(refusal: Refusal) -> Error {
    let kind = match refusal {
        Refusal::UnknownFormat(_) | Refusal::FormatMissing => ErrorKind::InvalidOption,
        _ => ErrorKind::Unsupported,
    };
    Error::new(kind, "rebasing").with_source(refusal)
}

fn change_name(image: &Image, options: &RebaseOptions) -> Result<()> {
    let format = options.backing_format.clone();
    let backing = options.backing_file.clone().map(|name| BackingName { name, format });
    image.change_backing(backing.as_ref()).map_err(|e| {
        let kind = match e.format_error().map(|error| error.kind()) {
            Some(FormatErrorKind::HeaderFull { .. } | FormatErrorKind::BackingNameTooLong(_)) => {
                ErrorKind::InvalidOption
            }
            _ => ErrorKind::Metadata,
        };
        Error::new(kind, "recording the new backing file").with_source(e)
    })
}

/// Finds the first layer below the overlay that the new chain also has. Returns its depth below the overlay
/// and its depth in the new chain, 0 for the backing file. Where neither chain allocates a range above that
/// layer, both read the same.
fn shared_layer(top: &Chain, new: &Chain) -> Option<(u32, u32)> {
    (0..).zip(top.layers.iter().skip(1)).find_map(|(depth, layer)| {
        let layer = layer.as_ref()?;
        let at = new.layers.iter().position(|other| other.as_ref() == Some(layer))?;
        Some((depth, u32::try_from(at).ok()?))
    })
}

/// Copies into the overlay all unallocated ranges in which its chain and `new` (`None`: no backing file)
/// differ. The copies are durable on return.
fn copy_difference(
    overlay: &Chain,
    new: Option<&Chain>,
    compress: bool,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<RebaseReport> {
    let Some(top) = overlay.disk.as_image() else { return Err(refused(Refusal::NotAnImage)) };
    let shared = new.and_then(|new| shared_layer(overlay, new));
    if compress {
        top.codec().map_err(|e| {
            Error::new(ErrorKind::Unsupported, "compression not supported for this image").with_source(e)
        })?;
    }
    let sides = [Side::new(top.backing())?, Side::new(new.map(|new| &new.disk))?];
    let largest = sides.iter().map(Side::cluster_size).max().unwrap_or(0);
    let rebasing = Rebasing {
        top,
        size: top.size(),
        unit: if compress { top.cluster_size() } else { top.zero_granularity() },
        chunk: CHUNK.max(top.cluster_size()).max(largest),
        zero_flag: top.header().version >= Version::V3,
        sides,
        shared,
        compress,
        progress,
        report: Mutex::default(),
    };
    progress.set_total(rebasing.size);
    let done = run(&rebasing, 0, Order::Any, executor);
    let flushed =
        top.flush().map_err(|e| Error::new(ErrorKind::Write, "making the overlay durable").with_source(e));
    done.and(flushed)?;
    Ok(rebasing.report.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Bytes per chunk; at least a cluster.
const CHUNK: u64 = 1 << 20;

/// One of the two backing chains. Everything past its end, or without a chain, is zero.
struct Side {
    source: Option<Source>,
}

/// What tables and holes show about a run of a chain, without reading its data.
struct Known {
    len: u64,
    zero: bool,
    /// The layer the run comes from.
    depth: u32,
}

impl Side {
    fn new(disk: Option<&Arc<dyn GuestDisk>>) -> Result<Self> {
        Ok(Self { source: disk.map(|disk| Source::new(std::slice::from_ref(disk))).transpose()? })
    }

    fn cluster_size(&self) -> u64 {
        self.source.as_ref().map_or(0, Source::cluster_size)
    }

    fn known_at(&self, at: u64, len: u64) -> Result<Known> {
        match &self.source {
            Some(source) if at < source.size() => {
                let extent = source.extent_at(at, len.min(source.size() - at))?;
                Ok(Known { len: extent.len, zero: extent.zero, depth: extent.depth })
            }
            _ => Ok(Known { len, zero: true, depth: 0 }),
        }
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let size = self.source.as_ref().map_or(0, Source::size);
        let stored = size.saturating_sub(at).min(buf.len() as u64) as usize;
        buf[stored..].fill(0);
        let Some(source) = self.source.as_ref().filter(|_| stored > 0) else { return Ok(()) };
        source.read_at(at, &mut buf[..stored]).map_err(|e| {
            Error::new(ErrorKind::Read, format!("error while reading offset {at} of a backing file"))
                .with_source(e)
        })
    }
}

struct Rebasing<'a> {
    top: &'a Image,
    size: u64,
    /// Unit of copying in bytes: a subcluster; a cluster if the overlay has no subclusters or the copy is
    /// compressed.
    unit: u64,
    chunk: u64,
    /// True if the image can record zeroes without writing them.
    zero_flag: bool,
    sides: [Side; 2],
    /// The first layer that both chains share, as its depth in each.
    shared: Option<(u32, u32)>,
    compress: bool,
    progress: &'a dyn Progress,
    report: Mutex<RebaseReport>,
}

/// A chunk of the disk.
#[derive(Default)]
struct Slot {
    range: Range<u64>,
    bytes: [Vec<u8>; 2],
    steps: Vec<Step>,
}

/// A write operation on the overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// Write these guest bytes from the buffer of the old chain.
    Data(Range<u64>),
    Zeroes(Range<u64>),
}

impl Rebasing<'_> {
    /// Length of the run at `at`, and true if the overlay leaves it unallocated.
    fn shows_below(&self, at: u64, end: u64) -> Result<(u64, bool)> {
        let range = GuestRange::between(GuestOffset::new(at), GuestOffset::new(end));
        let own = self.top.extent_at(range).map_err(|e| {
            Error::new(ErrorKind::Extents, format!("error while reading block status at offset {at}"))
                .with_source(e)
        })?;
        Ok((own.len, own.state == ExtentState::Unallocated))
    }

    /// Length of the run at `at`, and true if both chains are known to be equal there.
    fn known_same(&self, at: u64, end: u64) -> Result<(u64, bool)> {
        let old = self.sides[0].known_at(at, end - at)?;
        let new = self.sides[1].known_at(at, old.len)?;
        let shared = self.shared.is_some_and(|(a, b)| old.depth >= a && new.depth >= b);
        Ok((new.len, shared || (old.zero && new.zero)))
    }

    /// The parts of `region`, in whole units, that may differ. The overlay must not allocate any of `region`.
    fn doubtful(&self, region: Range<u64>) -> Result<Vec<Range<u64>>> {
        let (mut at, mut found): (u64, Vec<Range<u64>>) = (region.start, Vec::new());
        while at < region.end {
            let (len, same) = self.known_same(at, region.end)?;
            let end = at + len;
            if !same {
                let start = (at - at % self.unit).max(region.start);
                let end = end.next_multiple_of(self.unit).min(region.end);
                match found.last_mut() {
                    Some(last) if start <= last.end => last.end = end.max(last.end),
                    _ => found.push(start..end),
                }
            }
            at = end;
        }
        Ok(found)
    }

    /// Reads `range` of both chains into the buffers.
    fn read_both(&self, range: &Range<u64>, slot: &mut Slot) -> Result<()> {
        for (side, bytes) in self.sides.iter().zip(&mut slot.bytes) {
            let mut at = range.start;
            while at < range.end {
                let known = side.known_at(at, range.end - at)?;
                let from = (at - slot.range.start) as usize;
                let buf = &mut bytes[from..from + known.len as usize];
                match known.zero {
                    true => buf.fill(0),
                    false => side.read_at(at, buf)?,
                }
                at += known.len;
            }
        }
        Ok(())
    }

    /// Plans writes for the units of `range` that differ. Both buffers must hold the range.
    fn list(&self, range: Range<u64>, slot: &mut Slot) {
        let mut at = range.start;
        while at < range.end {
            let end = (at - at % self.unit + self.unit).min(range.end);
            let place = (at - slot.range.start) as usize..(end - slot.range.start) as usize;
            let (old, new) = (&slot.bytes[0][place.clone()], &slot.bytes[1][place]);
            if old != new {
                let zero = is_zero(old);
                match slot.steps.last_mut() {
                    Some(Step::Zeroes(last)) if zero && last.end == at => last.end = end,
                    Some(Step::Data(last)) if !zero && last.end == at && !self.compress => {
                        last.end = end;
                    }
                    _ if zero => slot.steps.push(Step::Zeroes(at..end)),
                    _ => slot.steps.push(Step::Data(at..end)),
                }
            }
            at = end;
        }
    }

    fn write(&self, step: &Step, slot: &Slot) -> qcow2_core::Result<()> {
        let (Step::Data(range) | Step::Zeroes(range)) = step;
        let start = GuestOffset::new(range.start);
        let from = (range.start - slot.range.start) as usize;
        let bytes = &slot.bytes[0][from..from + (range.end - range.start) as usize];
        match step {
            Step::Zeroes(_) if self.zero_flag => {
                let range = GuestRange::between(start, GuestOffset::new(range.end));
                self.top.write_zeroes(range, ZeroMode::MayUnmap)
            }
            Step::Data(_) if self.compress && self.is_whole(range)? => {
                self.top.write_compressed(start, bytes)
            }
            _ => self.top.write_at(start, bytes),
        }
    }

    /// True if `range` is a whole cluster with nothing allocated; only such a cluster can be written
    /// compressed.
    fn is_whole(&self, range: &Range<u64>) -> qcow2_core::Result<bool> {
        let whole = range.end - range.start == self.unit || range.end == self.size;
        if !whole || !range.start.is_multiple_of(self.unit) || self.top.header().has_data_file() {
            return Ok(false);
        }
        let range = GuestRange::between(GuestOffset::new(range.start), GuestOffset::new(range.end));
        let extent = self.top.extent_at(range)?;
        Ok(extent.state == ExtentState::Unallocated && extent.len == range.len())
    }
}

impl Stages for Rebasing<'_> {
    type Cursor = u64;
    type Slot = Slot;

    fn slot(&self) -> Slot {
        Slot::default()
    }

    /// Skips runs that need no comparison. A chunk starts at the first run that needs one, and ends at a
    /// chunk boundary.
    fn claim(&self, cursor: &mut u64, slot: &mut Slot) -> Result<bool> {
        while *cursor < self.size {
            if self.progress.should_stop() {
                return Err(Error::new(ErrorKind::Stopped, format!("stopped at byte {cursor}")));
            }
            let start = *cursor;
            let (len, below) = self.shows_below(start, self.size)?;
            let (len, same) = if below { self.known_same(start, start + len)? } else { (len, true) };
            if same {
                *cursor += len;
                self.progress.advance(len);
                continue;
            }
            // Chunks end at a cluster boundary, so that no two workers write the same cluster.
            *cursor = (start - start % self.chunk).saturating_add(self.chunk).min(self.size);
            slot.range = start - start % self.unit..*cursor;
            return Ok(true);
        }
        Ok(false)
    }

    fn prepare(&self, slot: &mut Slot) -> Result<()> {
        slot.steps.clear();
        let len = (slot.range.end - slot.range.start) as usize;
        slot.bytes.iter_mut().for_each(|bytes| bytes.resize(len.max(bytes.len()), 0));
        let mut at = slot.range.start;
        while at < slot.range.end {
            let (len, below) = self.shows_below(at, slot.range.end)?;
            let mut region = at..at + len;
            at = region.end;
            if !below {
                continue;
            }
            // `extent_at` may report one unallocated region as several runs.
            while at < slot.range.end {
                let (len, below) = self.shows_below(at, slot.range.end)?;
                if !below {
                    break;
                }
                at += len;
                region.end = at;
            }
            for range in self.doubtful(region)? {
                self.read_both(&range, slot)?;
                self.list(range, slot);
            }
        }
        Ok(())
    }

    fn finish(&self, slot: &mut Slot) -> Result<ControlFlow<()>> {
        let mut done = RebaseReport::default();
        for step in &slot.steps {
            self.write(step, slot).map_err(|e| {
                let (Step::Data(range) | Step::Zeroes(range)) = step;
                let context = format!("error while writing at byte {}", range.start);
                Error::new(ErrorKind::Write, context).with_source(e)
            })?;
            match step {
                Step::Data(range) => done.data_bytes += range.end - range.start,
                Step::Zeroes(range) => done.zeroed_bytes += range.end - range.start,
            }
        }
        self.progress.advance(slot.range.end - slot.range.start);
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.data_bytes += done.data_bytes;
        report.zeroed_bytes += done.zeroed_bytes;
        Ok(ControlFlow::Continue(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Inline;
    use crate::port::CallerError;
    use crate::progress::Silent;
    use crate::testing::TestDisk;

    fn chain(layers: &[&str]) -> Chain {
        let mut chain = Chain::new(Arc::new(TestDisk::data(vec![1; 512])));
        chain.layers = layers.iter().map(|name| Some((*name).to_owned()).filter(|_| *name != "?")).collect();
        chain
    }

    #[test]
    fn first_common_layer_is_shared() {
        let found = |old: &[&str], new: &[&str]| shared_layer(&chain(old), &chain(new));
        assert_eq!(found(&["top", "a", "b"], &["b"]), Some((1, 0)));
        assert_eq!(found(&["top", "a", "b"], &["x", "a", "b"]), Some((0, 1)));
        // The overlay itself does not count, and a layer without identity is not equal to any other.
        assert_eq!(found(&["top", "a"], &["top", "x"]), None);
        assert_eq!(found(&["top", "?"], &["?"]), None);
        assert_eq!(found(&[], &["a"]), None);
    }

    struct Refuse;

    impl NewBacking for Refuse {
        fn is_format(&self, format: &str) -> bool {
            format == "qcow2"
        }

        fn open(&self) -> Result<Chain, CallerError> {
            Err("not opened".into())
        }
    }

    #[track_caller]
    fn check(options: &RebaseOptions, refusal: Refusal, kind: ErrorKind) {
        let error = rebase(chain(&[]), &Refuse, options, &Inline, &Silent).unwrap_err();
        assert_eq!(error.kind(), kind);
        assert_eq!(error.caller_error::<Refusal>().unwrap(), refusal);
    }

    #[test]
    fn refusals_are_checked_in_a_fixed_order() {
        let onto = RebaseOptions::onto("x", "nope").with_name_only(true);
        check(&onto.clone().with_compress(true), Refusal::Compression, ErrorKind::Unsupported);
        check(&onto, Refusal::UnknownFormat("nope".into()), ErrorKind::InvalidOption);
        let options = RebaseOptions { backing_format: None, ..onto };
        check(&options, Refusal::FormatMissing, ErrorKind::InvalidOption);
        check(&RebaseOptions::default(), Refusal::NotAnImage, ErrorKind::Unsupported);
        let opened = rebase(chain(&[]), &Refuse, &RebaseOptions::onto("x", "qcow2"), &Inline, &Silent);
        assert_eq!(opened.unwrap_err().kind(), ErrorKind::Open);
    }
}
