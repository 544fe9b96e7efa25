//! Maps a disk: each run of the whole backing chain, with the layer it comes from.

mod assigned;
mod sparse;

use crate::error::{Error, ErrorKind, Result};
use assigned::AssignedPlaces;
use qcow2_core::{
    ExtentState, GuestDisk, GuestOffset, GuestRange, HostOffset, Storage, StorageStatus, shown_disk,
};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

/// The range to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapOptions {
    /// Guest offset of the first byte; may be past the end of the disk.
    pub start: u64,
    /// Maximum length in bytes; `None`: up to the end of the disk.
    pub len: Option<u64>,
}

impl MapOptions {
    /// The whole disk.
    pub fn new() -> Self {
        Self { start: 0, len: None }
    }

    /// From another guest offset on.
    #[must_use]
    pub fn with_start(self, start: u64) -> Self {
        Self { start, ..self }
    }

    /// Of at most this many bytes; `None`: up to the end of the disk.
    #[must_use]
    pub fn with_len(self, len: Option<u64>) -> Self {
        Self { len, ..self }
    }
}

impl Default for MapOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// A run of guest bytes with the same state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapExtent {
    /// Guest offset of the first byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// The layer the run comes from, 0 for the top. For unallocated bytes, the deepest layer that is large
    /// enough to have them.
    pub depth: u32,
    /// True if a layer has the bytes allocated.
    pub present: bool,
    /// True if the bytes are known to be zero.
    pub zero: bool,
    /// True if the bytes are stored in a file.
    pub data: bool,
    /// True if they are stored compressed.
    pub compressed: bool,
    /// Host offset where they are stored, or would be stored when written.
    pub host: Option<HostOffset>,
}

impl MapExtent {
    /// True if `next` follows this run and has the same state and contiguous host offsets.
    pub(crate) fn continues_in(&self, next: &Self) -> bool {
        let same = |e: &Self| (e.depth, e.present, e.zero, e.data, e.compressed);
        let host = match (self.host, next.host) {
            (None, None) => true,
            (Some(a), Some(b)) => a.checked_add(self.len) == Some(b),
            _ => false,
        };
        same(self) == same(next) && host
    }
}

/// Walks over a disk and its backing chain, and calls `visit` with each run in guest order; adjacent equal
/// runs are joined. Like QEMU, pads a raw disk with zeroes to a multiple of 512. An empty range gives one
/// empty run. `visit` may end the walk. Disk: reads tables, never data; queries files for their holes.
///
/// Errors: `Extents`, with the engine's error as source.
pub fn map(
    disk: &Arc<dyn GuestDisk>,
    options: &MapOptions,
    visit: &mut dyn FnMut(&MapExtent) -> ControlFlow<()>,
) -> Result<()> {
    let layers = Layers { shows_status: true, ..Layers::new(disk)? };
    let size = disk.size().checked_next_multiple_of(512).unwrap_or(disk.size());
    let end = options.len.map_or(size, |len| options.start.saturating_add(len).min(size));
    let mut current = MapExtent { start: options.start, ..MapExtent::default() };
    let mut at = options.start;
    while at < end {
        let next = layers.extent_at(at, end - at).map_err(|e| {
            Error::new(ErrorKind::Extents, format!("reading the block status at byte {at}")).with_source(e)
        })?;
        at += next.len;
        if current.len > 0 && current.continues_in(&next) {
            current.len += next.len;
            continue;
        }
        if current.len > 0 && visit(&current).is_break() {
            return Ok(());
        }
        current = next;
    }
    let _ended = visit(&current);
    Ok(())
}

/// The backing chain, top first.
pub(crate) struct Layers {
    layers: Vec<Layer>,
    /// Whether runs are what servers tell of them, which may be no sort of content: for people to see, not
    /// for copying.
    shows_status: bool,
}

struct Layer {
    disk: Arc<dyn GuestDisk>,
    /// The data file, if its holes must be checked because the data area was preallocated but not written.
    sparse_storage: Option<Arc<dyn Storage>>,
    /// Finds host clusters that are allocated although no subcluster is; only with extended L2 entries.
    assigned: Option<Mutex<AssignedPlaces>>,
    /// The image whose bytes a raw disk shows, and the guest offset in it of the disk's first byte.
    shown: Option<(Box<Self>, GuestOffset)>,
}

impl Layers {
    pub(crate) fn new(top: &Arc<dyn GuestDisk>) -> Result<Self> {
        let mut layers = Vec::new();
        let mut next = Some(top);
        while let Some(disk) = next {
            layers.push(Layer::new(disk)?);
            next = disk.backing();
        }
        Ok(Self { layers, shows_status: false })
    }

    /// The disk of one layer.
    pub(crate) fn disk(&self, depth: u32) -> Option<&Arc<dyn GuestDisk>> {
        self.layers.get(depth as usize).map(|layer| &layer.disk)
    }

    /// True if a run of [`extent_at`](Self::extent_at) is unallocated only because a lower layer is too
    /// short.
    pub(crate) fn is_past_a_layer(&self, extent: &MapExtent) -> bool {
        !extent.present && (extent.depth as usize) + 1 < self.layers.len()
    }

    /// The run at `at`, at most `len` bytes, before joining.
    pub(crate) fn extent_at(&self, at: u64, len: u64) -> qcow2_core::Result<MapExtent> {
        let mut extent = MapExtent { start: at, len, zero: true, ..MapExtent::default() };
        // The layer that those above leave the extent to, once it is known.
        let mut first = None;
        for (depth, layer) in (0..).zip(&self.layers) {
            if first.is_some_and(|first| depth < first) {
                continue;
            }
            let size = layer.disk.size();
            let rounded = size.checked_next_multiple_of(512).unwrap_or(size);
            if at >= rounded {
                break;
            }
            if at >= size {
                // The padding of a raw disk to a whole sector.
                let (len, host) = (extent.len.min(rounded - at), Some(HostOffset::new(at)));
                extent = MapExtent { depth, len, present: true, host, ..extent };
                break;
            }
            let range =
                GuestRange::between(GuestOffset::new(at), GuestOffset::new(at + extent.len.min(size - at)));
            if self.shows_status
                && let Some(status) = layer.status_at(range)?
            {
                let (StorageStatus { len, data, zero }, present) = (status, status.data || status.zero);
                let host = present.then_some(HostOffset::new(at));
                return Ok(MapExtent { len, depth, present, zero, data, host, ..extent });
            }
            // The top, or below a top that is written the next one, knows for all that nobody changes.
            if first.is_none()
                && depth < 2
                && let (skipped @ 1.., len) = layer.disk.layers_without(range)
            {
                first = Some((depth + skipped as u32).min(self.layers.len() as u32 - 1));
                extent = MapExtent { len, ..extent };
                continue;
            }
            let answer = layer.disk.extent_at(range)?;
            extent = MapExtent { len: answer.len, depth, host: None, ..extent };
            if let Some(shown) = layer.shown_extent(extent)? {
                return Ok(shown);
            }
            extent = layer.with_state(extent, answer.state)?;
            if extent.present {
                break;
            }
        }
        Ok(extent)
    }
}

impl Layer {
    fn new(disk: &Arc<dyn GuestDisk>) -> Result<Self> {
        let plain = disk.unfiltered();
        let sparse_storage = plain.as_image().map(sparse::find_sparse_storage).transpose().map_err(|e| {
            Error::new(ErrorKind::Extents, "comparing the refcounts with the disk space used").with_source(e)
        })?;
        let shown = plain.as_raw().and_then(|raw| shown_disk(&**raw.storage()));
        Ok(Self {
            disk: Arc::clone(disk),
            sparse_storage: sparse_storage.flatten(),
            assigned: plain.as_image().and_then(AssignedPlaces::new).map(Mutex::new),
            shown: match shown {
                Some((inner, start)) => Some((Box::new(Self::new(&inner)?), start)),
                None => None,
            },
        })
    }

    /// `extent`, which this layer stores as `state` tells.
    fn with_state(&self, extent: MapExtent, state: ExtentState) -> qcow2_core::Result<MapExtent> {
        match state {
            ExtentState::Unallocated => self.with_assigned_place(extent),
            ExtentState::Zero { host } => Ok(MapExtent { present: true, host, ..extent }),
            ExtentState::Compressed => {
                Ok(MapExtent { present: true, zero: false, data: true, compressed: true, ..extent })
            }
            ExtentState::Data { host } => {
                self.with_holes(MapExtent { present: true, zero: false, data: true, host, ..extent })
            }
        }
    }

    /// `extent` of a raw disk as the image tells whose bytes it shows; `None`: it shows none there. Like
    /// QEMU, does not look at that image's backing file: what comes from there is neither stored nor zero.
    fn shown_extent(&self, extent: MapExtent) -> qcow2_core::Result<Option<MapExtent>> {
        let Some((inner, start)) = &self.shown else { return Ok(None) };
        let Some(start) = start.checked_add(extent.start).filter(|at| at.value() < inner.disk.size()) else {
            return Ok(None);
        };
        let left = extent.len.min(inner.disk.size() - start.value());
        let Some(range) = GuestRange::new(start, left) else { return Ok(None) };
        let answer = inner.disk.extent_at(range)?;
        let there = MapExtent { start: start.value(), len: answer.len, ..extent };
        let there = match inner.shown_extent(there)? {
            Some(there) => there,
            None => inner.with_state(there, answer.state)?,
        };
        let below = inner.disk.backing().is_some_and(|below| start.value() < below.size());
        let zero = there.zero && (there.present || !below);
        Ok(Some(MapExtent { start: extent.start, zero, ..there }))
    }

    /// What a server tells of a raw disk.
    fn status_at(&self, range: GuestRange) -> qcow2_core::Result<Option<StorageStatus>> {
        match self.disk.as_raw() {
            Some(raw) => Ok(raw.storage().status_at(HostOffset::new(range.start().value()), range.len())?),
            None => Ok(None),
        }
    }

    /// Adds the host offset of an unallocated run whose cluster has one, and cuts the run where that changes.
    fn with_assigned_place(&self, extent: MapExtent) -> qcow2_core::Result<MapExtent> {
        let Some(assigned) = &self.assigned else { return Ok(extent) };
        let mut assigned = assigned.lock().unwrap_or_else(PoisonError::into_inner);
        let (len, host) = assigned.at(GuestOffset::new(extent.start), extent.len)?;
        Ok(MapExtent { len, host, ..extent })
    }

    /// Cuts a stored run at the next boundary between data and hole in the file, and sets `zero` accordingly.
    fn with_holes(&self, extent: MapExtent) -> qcow2_core::Result<MapExtent> {
        let (Some(storage), Some(host)) = (&self.sparse_storage, extent.host) else {
            return Ok(extent);
        };
        let left = storage.len()?.saturating_sub(host.value());
        if left == 0 {
            return Ok(MapExtent { zero: true, ..extent });
        }
        let part = storage.extent_at(host, extent.len.min(left))?;
        Ok(MapExtent { len: part.len, zero: !part.data, ..extent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_core::{DiskExtent, Error as CoreError, Result as CoreResult, ZeroMode};

    /// A layer with the given runs.
    struct Runs {
        size: u64,
        runs: Vec<(u64, ExtentState)>,
        backing: Option<Arc<dyn GuestDisk>>,
    }

    impl GuestDisk for Runs {
        fn size(&self) -> u64 {
            self.size
        }
        fn extent_at(&self, range: GuestRange) -> CoreResult<DiskExtent> {
            let at = range.start().value();
            assert!(!range.is_empty() && range.end().value() <= self.size);
            let mut start = 0;
            for &(len, state) in &self.runs {
                if at < start + len {
                    let skipped = at - start;
                    let moved = |host: Option<HostOffset>| host.and_then(|h| h.checked_add(skipped));
                    let state = match state {
                        ExtentState::Data { host } => ExtentState::Data { host: moved(host) },
                        ExtentState::Zero { host } => ExtentState::Zero { host: moved(host) },
                        other => other,
                    };
                    return Ok(DiskExtent { len: range.len().min(len - skipped), state });
                }
                start += len;
            }
            Ok(DiskExtent { len: range.len(), state: ExtentState::Unallocated })
        }
        fn backing(&self) -> Option<&Arc<dyn GuestDisk>> {
            self.backing.as_ref()
        }
        fn read_at(&self, _: GuestOffset, _: &mut [u8]) -> CoreResult<()> {
            Err(unused())
        }
        fn write_at(&self, _: GuestOffset, _: &[u8]) -> CoreResult<()> {
            Err(unused())
        }
        fn write_zeroes(&self, _: GuestRange, _: ZeroMode) -> CoreResult<()> {
            Err(unused())
        }
        fn discard(&self, _: GuestRange) -> CoreResult<()> {
            Err(unused())
        }
        fn flush(&self) -> CoreResult<()> {
            Err(unused())
        }
        fn resize(&self, _: u64) -> CoreResult<()> {
            Err(unused())
        }
    }

    fn unused() -> CoreError {
        CoreError::new(qcow2_core::ErrorKind::Unsupported, "map must only call extent_at")
    }

    fn data(host: u64) -> ExtentState {
        ExtentState::Data { host: Some(HostOffset::new(host)) }
    }

    fn layer(
        size: u64,
        runs: &[(u64, ExtentState)],
        backing: Option<Arc<dyn GuestDisk>>,
    ) -> Arc<dyn GuestDisk> {
        Arc::new(Runs { size, runs: runs.to_vec(), backing })
    }

    /// Formats runs as `start+len depth flags @host`. The flags are the first letters of present, zero, data,
    /// compressed.
    fn lines(disk: &Arc<dyn GuestDisk>, options: MapOptions) -> Vec<String> {
        let mut lines = Vec::new();
        let mut visit = |e: &MapExtent| {
            let flags: String = [(e.present, 'p'), (e.zero, 'z'), (e.data, 'd'), (e.compressed, 'c')]
                .iter()
                .filter(|(set, _)| *set)
                .map(|(_, letter)| letter)
                .collect();
            let host = e.host.map(|h| format!(" @{}", h.value())).unwrap_or_default();
            lines.push(format!("{}+{} {} {flags}{host}", e.start, e.len, e.depth));
            ControlFlow::Continue(())
        };
        map(disk, &options, &mut visit).unwrap();
        lines
    }

    #[test]
    fn joins_contiguous_runs_with_equal_state() {
        let runs = [(512, data(4096)), (512, data(4608)), (512, data(4096)), (512, ExtentState::Compressed)];
        let disk = layer(4096, &runs, None);
        let expected = ["0+1024 0 pd @4096", "1024+512 0 pd @4096", "1536+512 0 pdc", "2048+2048 0 z"];
        assert_eq!(lines(&disk, MapOptions::new()), expected);
    }

    #[test]
    fn layers_shorter_than_the_top() {
        let raw = layer(
            1000,
            &[(512, data(0)), (488, ExtentState::Zero { host: Some(HostOffset::new(512)) })],
            None,
        );
        let middle = layer(
            2048,
            &[(256, ExtentState::Unallocated), (128, ExtentState::Zero { host: None })],
            Some(raw),
        );
        let top = layer(4096, &[], Some(middle));
        let expected = [
            "0+256 2 pd @0",
            "256+128 1 pz",
            "384+128 2 pd @384",
            "512+512 2 pz @512",
            "1024+1024 1 z",
            "2048+2048 0 z",
        ];
        assert_eq!(lines(&top, MapOptions::new()), expected);
    }

    #[test]
    fn ranges_and_the_end_of_a_raw_disk() {
        let raw = layer(3, &[(3, data(0))], None);
        assert_eq!(lines(&raw, MapOptions::new()), ["0+3 0 pd @0", "3+509 0 pz @3"]);
        let part = |start, len| lines(&raw, MapOptions { start, len });
        assert_eq!(part(1, Some(1)), ["1+1 0 pd @1"]);
        assert_eq!(part(1, Some(0)), ["1+0 0 "]);
        assert_eq!(part(512, None), ["512+0 0 "]);
        assert_eq!(part(9999, Some(u64::MAX)), ["9999+0 0 "]);
        assert_eq!(lines(&layer(0, &[], None), MapOptions::new()), ["0+0 0 "]);
    }

    #[test]
    fn visitor_can_end_the_walk() {
        let disk = layer(2048, &[(512, data(0)), (512, ExtentState::Compressed)], None);
        let mut seen = 0;
        let mut visit = |_: &MapExtent| {
            seen += 1;
            ControlFlow::Break(())
        };
        map(&disk, &MapOptions::new(), &mut visit).unwrap();
        assert_eq!(seen, 1);
    }
}
