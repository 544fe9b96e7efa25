//! Reads of an image that takes no changes: one look into the index, then straight to the layer.

use super::fill::{FillLayer, fill};
use super::index::{Answer, Found, Hit};
use super::view::{Below, View};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::invariant;
use crate::read::resolve::Place;
use crate::sync::lock;
use qcow2_format::{GuestOffset, HostOffset};

impl Image {
    /// [`read_at`](Self::read_at) of an image that takes no changes. The caller has checked the range.
    #[inline]
    pub(crate) fn read_settled(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.with_view(|view| match view {
            Some(view) => self.read_view(view, offset, buf),
            None => self.read_range(offset, buf),
        })
    }

    /// The merged layer `number`; 0 is this one.
    fn merged_layer<'a>(&'a self, view: &'a View, number: usize) -> Result<&'a Self> {
        let lower = number.checked_sub(1).map(|number| view.layers.get(number)?.as_image());
        lower.unwrap_or(Some(self)).ok_or_else(|| Error::new(ErrorKind::Chain, "a merged layer is missing"))
    }

    /// The answer at `at`, from the index if possible, which may be for more than the `len` bytes that are
    /// asked for.
    #[inline]
    pub(crate) fn answer(&self, view: &View, at: u64, len: u64) -> Hit {
        match view.index.as_ref().and_then(|index| index.find(at)) {
            Some(hit) => hit,
            None => self.missed(view, at, len),
        }
    }

    fn read_view(&self, view: &View, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (offset.value(), buf);
        while !rest.is_empty() {
            let here = GuestOffset::new(at);
            let hit = self.answer(view, at, rest.len() as u64);
            let len = hit.len.min(rest.len() as u64) as usize;
            debug_assert!(len > 0, "an answer for no bytes at {at:#x}");
            let (part, next) = rest.split_at_mut(len);
            match hit.found {
                Found::Data { layer, host } => {
                    self.read_data(view, layer, (here, HostOffset::new(host)), part)?
                }
                Found::Zero { .. } | Found::Nothing { .. } => part.fill(0),
                Found::From { layer } => self.walk(view, layer, here, part)?,
            }
            at += len as u64;
            rest = next;
        }
        Ok(())
    }

    /// Reads the bytes at a guest offset that the merged layer `number` has at a host offset.
    #[inline]
    fn read_data(
        &self,
        view: &View,
        number: usize,
        (guest, host): (GuestOffset, HostOffset),
        part: &mut [u8],
    ) -> Result<()> {
        if cfg!(debug_assertions) {
            let image = self.merged_layer(view, number)?;
            invariant::equally_far(image.file.geometry(), guest, host);
        }
        match view.plain.get(number) {
            Some(Some(storage)) => Ok(storage.read_padded(host, part)?),
            _ => {
                let place = Place::Data { host, copied: false };
                self.merged_layer(view, number)?.read_place(guest, place, part)
            }
        }
    }

    /// The answer at `at` that is not in the index: fills its piece, or leaves `len` bytes at most to the
    /// layers.
    #[cold]
    fn missed(&self, view: &View, at: u64, len: u64) -> Hit {
        let walk = |len| Hit { found: Found::From { layer: 0 }, len };
        let Some(index) = &view.index else { return walk(len) };
        let (shape, left) = (index.shape(), index.shape().left(at));
        // Whoever asks for more than a piece walks through the disk, of which there may be very much without
        // a table.
        if len > left
            && let Some(hit) = self.unmapped(view, at, len).filter(|hit| hit.len > left)
        {
            return hit;
        }
        let piece = shape.piece(at);
        if !index.admits(piece) {
            return walk(len.min(left));
        }
        let _filling = lock(view.filling_of(piece));
        if let Some(hit) = index.find(at) {
            return hit;
        }
        let own = [self].into_iter();
        let layers = own.chain(view.layers.iter().filter_map(|layer| layer.as_image()));
        let layers = layers.map(|image| FillLayer { size: image.size(), mapping: image.mapping() });
        let below = match &view.below {
            Below::Nothing => Answer::nothing(view.layers.len()),
            _ => Answer::from(view.end()),
        };
        let runs = fill(shape, piece, layers, below);
        // A table of many runs takes more memory here than its pages do, and those are dropped one by one.
        let dense = view.layers.is_empty() && !index.is_ample() && runs.len() as u64 > shape.cells() / 4;
        if dense || runs.len() > index.most_runs() {
            index.insert(piece, &[Answer::from(0).run(0)]);
        } else {
            index.insert(piece, &runs);
        }
        index.find(at).unwrap_or_else(|| walk(len.min(left)))
    }

    /// The bytes at `at`, at most `len`, for which no merged layer has a table. `None` if one has.
    fn unmapped(&self, view: &View, at: u64, len: u64) -> Option<Hit> {
        let (here, mut len) = (GuestOffset::new(at), len);
        for number in 0..view.end() {
            let image = self.merged_layer(view, number).ok()?;
            let inside = image.size().checked_sub(at).filter(|inside| *inside > 0)?;
            len = image.mapping().len_without_table(here, len.min(inside))?;
        }
        let found = match &view.below {
            Below::Nothing => Found::Nothing { layer: view.layers.len() },
            _ => Found::From { layer: view.end() },
        };
        Some(Hit { found, len })
    }

    /// Reads from layer to layer, from the merged layer `first` on.
    fn walk(&self, view: &View, first: usize, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (offset.value(), buf);
        while !rest.is_empty() {
            let here = GuestOffset::new(at);
            let (len, stored) = self.look_through(view, first, here, rest.len() as u64)?;
            let (part, next) = rest.split_at_mut(len as usize);
            match stored {
                Some((image, place)) => image.read_place(here, place, part)?,
                None => read_below(view, here, part)?,
            }
            at += len;
            rest = next;
        }
        Ok(())
    }

    /// The first layer from `first` on that has the bytes at `here`, with their place, and how many there
    /// are, at most `len`. `None`: no merged layer has them.
    pub(crate) fn look_through<'a>(
        &'a self,
        view: &'a View,
        first: usize,
        here: GuestOffset,
        len: u64,
    ) -> Result<(u64, Option<(&'a Self, Place)>)> {
        let mut len = len;
        for number in first..view.end() {
            let image = self.merged_layer(view, number)?;
            let left = image.size().saturating_sub(here.value());
            if left == 0 {
                return Ok((len, Some((image, Place::Zero { host: None }))));
            }
            let run = image.mapping().lookup(here, len.min(left))?;
            invariant::covers(&run, len);
            len = run.len;
            if run.place != Place::Unallocated {
                return Ok((len, Some((image, run.place))));
            }
        }
        Ok((len, None))
    }
}

/// Reads what no merged layer has.
fn read_below(view: &View, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
    match &view.below {
        Below::Nothing => buf.fill(0),
        Below::Unopened => {
            return Err(Error::new(ErrorKind::Resolve, "the backing file was not opened"));
        }
        Below::Disk { disk, .. } => {
            let there = disk.size().saturating_sub(offset.value()).min(buf.len() as u64);
            let (part, past) = buf.split_at_mut(there as usize);
            past.fill(0);
            if !part.is_empty() {
                disk.read_at(offset, part)?;
            }
        }
    }
    Ok(())
}
