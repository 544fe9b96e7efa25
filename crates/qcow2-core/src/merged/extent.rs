//! Extents of a whole chain, for those who walk it: one look into the index instead of one at each layer.

use super::index::Found;
use super::view::{Below, View};
use crate::error::Result;
use crate::image::Image;
use crate::live::chain_extent;
use crate::port::disk::{DiskExtent, ExtentState};
use crate::read::resolve::{Place, Run};
use qcow2_format::{GuestOffset, GuestRange, HostOffset};

impl Image {
    /// [`GuestDisk::layers_without`](crate::GuestDisk::layers_without). `range` is inside the disk.
    pub(crate) fn merged_layers_without(&self, range: GuestRange) -> (usize, u64) {
        let unknown = (0, range.len());
        if self.backing.is_none() || range.is_empty() {
            return unknown;
        }
        self.with_view(|view| {
            let Some(view) = view.filter(|view| view.visible > 0) else { return unknown };
            let hit = self.answer(view, range.start().value(), range.len());
            (hit.found.layer().min(view.visible), hit.len.min(range.len()))
        })
    }

    /// How this layer alone stores the bytes at `range.start()`, from the index; `None` if that does not
    /// know.
    pub(crate) fn indexed_run(&self, range: GuestRange) -> Option<Run> {
        self.with_view(|view| {
            let hit = view?.index.as_ref()?.find(range.start().value())?;
            let place = match hit.found {
                Found::Data { layer: 0, host } => Place::Data { host: HostOffset::new(host), copied: false },
                Found::Zero { layer: 0 } => Place::Zero { host: None },
                Found::From { layer: 0 } => return None,
                _ => Place::Unallocated,
            };
            Some(Run { len: hit.len.min(range.len()), place })
        })
    }

    /// How the chain stores the bytes at `range.start()`, without host offsets; `None` if this image has no
    /// view, or not such a range.
    pub(crate) fn merged_extent(&self, range: GuestRange) -> Option<Result<DiskExtent>> {
        self.backing.as_ref()?;
        if range.is_empty() || self.check_range(range.start(), range.len()).is_err() {
            return None;
        }
        self.with_view(|view| Some(self.view_extent(view?, range)))
    }

    fn view_extent(&self, view: &View, range: GuestRange) -> Result<DiskExtent> {
        let (start, len) = (range.start(), range.len());
        let hit = self.answer(view, start.value(), len);
        let len = hit.len.min(len);
        let state = match hit.found {
            Found::Data { .. } => ExtentState::Data { host: None },
            // As if the layer below the last one were too short: what is in no layer is zeroes there.
            Found::Nothing { layer } if layer < view.layers.len() => ExtentState::Zero { host: None },
            Found::Nothing { .. } => ExtentState::Unallocated,
            Found::Zero { .. } => ExtentState::Zero { host: None },
            Found::From { layer } => return self.extent_behind(view, layer, start, len),
        };
        Ok(DiskExtent { len, state })
    }

    /// The extent at `start` of the layers from `first` on.
    fn extent_behind(&self, view: &View, first: usize, start: GuestOffset, len: u64) -> Result<DiskExtent> {
        let (len, stored) = self.look_through(view, first, start, len)?;
        let state = match stored {
            Some((_, Place::Zero { .. })) => ExtentState::Zero { host: None },
            Some((_, Place::Compressed(_))) => ExtentState::Compressed,
            Some(_) => ExtentState::Data { host: None },
            None => return extent_below(view, start, len),
        };
        Ok(DiskExtent { len, state })
    }
}

/// The extent of the disk below the merged layers.
fn extent_below(view: &View, start: GuestOffset, len: u64) -> Result<DiskExtent> {
    let Below::Disk { disk, .. } = &view.below else {
        return Ok(DiskExtent { len, state: ExtentState::Unallocated });
    };
    match disk.size().saturating_sub(start.value()).min(len) {
        0 => Ok(DiskExtent { len, state: ExtentState::Zero { host: None } }),
        there => {
            let end = GuestOffset::new(start.value() + there);
            chain_extent(&**disk, GuestRange::between(start, end))
        }
    }
}
