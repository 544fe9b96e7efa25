//! Reads of an image that takes no changes: one look into the index, then straight to the layer.

use super::fill::{FillLayer, fill};
use super::index::{Answer, Found, Hit, Index};
use super::view::{Below, Moving, State, View};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::invariant;
use crate::port::disk::GuestDisk;
use crate::read::resolve::Place;
use crate::sync::{LockOwner, lock};
use ::alloc::boxed::Box;
use ::alloc::sync::Arc;
use ::alloc::vec::Vec;
use qcow2_format::{GuestOffset, HostOffset};

impl Image {
    /// [`read_at`](Self::read_at) of an image that takes no changes. The caller has checked the range.
    #[inline]
    pub(crate) fn read_settled(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        match self.merged.state.get() {
            Some(State::Fixed(view)) => self.read_view(view, offset, buf),
            Some(State::Moving(moving)) => self.read_moving(moving, offset, buf),
            Some(State::Alone) => self.read_range(offset, buf),
            None => {
                let state = self.first_state();
                // Another thread may have been faster; both have found the same.
                let _ = self.merged.state.set(state);
                self.read_settled(offset, buf)
            }
        }
    }

    fn read_moving(&self, moving: &Arc<Moving>, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        if let Some(done) = self.try_moving(moving, offset, buf) {
            return done;
        }
        let generation = moving.generation();
        if let Some(view) = self.merge(Some(moving)) {
            moving.publish(generation, view);
        }
        // Not there if layers are being exchanged: then from layer to layer.
        self.try_moving(moving, offset, buf).unwrap_or_else(|| self.read_range(offset, buf))
    }

    /// Reads by the view, if there is one to be used.
    fn try_moving(&self, moving: &Moving, offset: GuestOffset, buf: &mut [u8]) -> Option<Result<()>> {
        {
            let view = moving.enter();
            let view = view.as_ref()?;
            if !has_settled(view) {
                return Some(self.read_view(view, offset, buf));
            }
        }
        moving.invalidate();
        None
    }

    fn first_state(&self) -> State {
        if self.file.is_observed() || self.merged.budget == 0 {
            return State::Alone;
        }
        match self.merge(None) {
            Some(view) => State::Fixed(Box::new(view)),
            None => State::Moving(Arc::new(Moving::new())),
        }
    }

    /// Merges this layer with those below it, as far down as nobody changes them. `None` if layers may be
    /// exchanged or may stop changing, and `moving` is not there to be told; or if one is being exchanged.
    fn merge(&self, moving: Option<&Arc<Moving>>) -> Option<View> {
        let mut layers: Vec<Arc<dyn GuestDisk>> = Vec::new();
        let mut next = self.backing.clone();
        let mut unopened = self.backing_unopened;
        let below = loop {
            let Some(disk) = next else {
                break if unopened { Below::Unopened } else { Below::Nothing };
            };
            let layer = match disk.as_live() {
                None => Arc::clone(&disk),
                Some(live) if live.watchers().register(moving?) => live.layer(),
                Some(_) => return None,
            };
            let image = match layer.filtered() {
                None => layer.as_image(),
                Some(_) => None,
            };
            match image {
                Some(image) if image.file.is_settled() && layers.len() + 2 < Answer::MAX_LAYERS => {
                    if image.file.is_observed() {
                        break Below::Disk { disk, pending: None };
                    }
                    // Not needed any more if all reads come from above.
                    image.merged.forget();
                    (next, unopened) = (image.backing.clone(), image.backing_unopened);
                    layers.push(layer);
                }
                Some(_) => {
                    moving?;
                    break Below::Disk { disk, pending: Some(layer) };
                }
                None => break Below::Disk { disk, pending: None },
            }
        };
        let _owner = LockOwner::new();
        let index = self.new_index(&layers);
        let images = [self].into_iter().chain(layers.iter().filter_map(|layer| layer.as_image()));
        let plain = images.map(|image| image.file.opened_data().filter(|_| image.crypt.is_plain()).cloned());
        let plain = plain.collect();
        Some(View::new(layers, plain, below, index))
    }

    fn new_index(&self, layers: &[Arc<dyn GuestDisk>]) -> Option<Index> {
        let all = || layers.iter().filter_map(|layer| layer.as_image()).chain([self]);
        let cell = all().map(|image| image.file.geometry().subcluster_size()).min()?;
        let extended = all().any(|image| image.file.geometry().extended_l2());
        Index::new(self.size(), cell.trailing_zeros(), extended, self.merged.budget)
    }

    /// The merged layer `number`; 0 is this one.
    fn merged_layer<'a>(&'a self, view: &'a View, number: usize) -> Result<&'a Self> {
        let lower = number.checked_sub(1).map(|number| view.layers.get(number)?.as_image());
        lower.unwrap_or(Some(self)).ok_or_else(|| Error::new(ErrorKind::Chain, "a merged layer is missing"))
    }

    fn read_view(&self, view: &View, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        let (mut at, mut rest) = (offset.value(), buf);
        while !rest.is_empty() {
            let here = GuestOffset::new(at);
            let hit = match view.index.as_ref().and_then(|index| index.find(at)) {
                Some(hit) => hit,
                None => self.missed(view, at, rest.len() as u64),
            };
            let len = hit.len.min(rest.len() as u64) as usize;
            debug_assert!(len > 0, "an answer for no bytes at {at:#x}");
            let (part, next) = rest.split_at_mut(len);
            match hit.found {
                Found::Data { layer, host } => {
                    self.read_data(view, layer, (here, HostOffset::new(host)), part)?
                }
                Found::Zero => part.fill(0),
                Found::Below => read_below(view, here, part)?,
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
        let piece = shape.piece(at);
        if !index.admits(piece) {
            return walk(len.min(left));
        }
        let _filling = lock(view.filling(piece));
        if let Some(hit) = index.find(at) {
            return hit;
        }
        let own = [self].into_iter();
        let layers = own.chain(view.layers.iter().filter_map(|layer| layer.as_image()));
        let layers = layers.map(|image| FillLayer { size: image.size(), mapping: image.mapping() });
        let below = if matches!(view.below, Below::Nothing) { Answer::ZERO } else { Answer::BELOW };
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
    fn look_through<'a>(
        &'a self,
        view: &'a View,
        first: usize,
        here: GuestOffset,
        len: u64,
    ) -> Result<(u64, Option<(&'a Self, Place)>)> {
        let mut len = len;
        for number in first..=view.layers.len() {
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

/// True if the image below the merged layers has been closed, so that it can be merged too.
fn has_settled(view: &View) -> bool {
    match &view.below {
        Below::Disk { pending: Some(image), .. } => {
            image.as_image().is_some_and(|image| image.file.is_settled())
        }
        _ => false,
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
