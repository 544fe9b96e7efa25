//! Finds the layers that can be merged: from an image that takes no changes down to the first that may.

use super::index::{Answer, Index};
use super::view::{Below, Moving, State, View};
use crate::image::Image;
use crate::port::disk::GuestDisk;
use crate::sync::{LockOwner, RwLockReadGuard};
use ::alloc::boxed::Box;
use ::alloc::sync::Arc;
use ::alloc::vec::Vec;

impl Image {
    /// Calls `act` with the view of this image, if it takes no changes and its layers can be merged now. The
    /// view stays true until `act` returns.
    #[inline]
    pub(crate) fn with_view<R>(&self, act: impl FnOnce(Option<&View>) -> R) -> R {
        if !self.file.is_settled() {
            return act(None);
        }
        let state = match self.merged.state.get() {
            Some(state) => state,
            None => self.make_state(),
        };
        match state {
            State::Fixed(view) => act(Some(view)),
            State::Moving(moving) => {
                let view = self.enter_view(moving);
                act(view.as_ref().and_then(|view| view.as_deref()))
            }
            State::Alone => act(None),
        }
    }

    #[cold]
    fn make_state(&self) -> &State {
        let state = self.first_state();
        // Not made inside the cell: whoever waits for it then waits for the locks of other layers too.
        let _ = self.merged.state.set(state);
        self.merged.state.get_or_init(|| State::Alone)
    }

    /// The view of `moving`, made if it is not there or could reach further down. `None` while layers are
    /// being exchanged.
    fn enter_view<'a>(&self, moving: &'a Arc<Moving>) -> Option<RwLockReadGuard<'a, Option<Arc<View>>>> {
        let outdated = {
            let view = moving.enter();
            match &*view {
                Some(present) if !has_settled(present) => return Some(view),
                view => view.is_some(),
            }
        };
        if outdated {
            moving.invalidate();
        }
        let generation = moving.generation();
        if let Some(view) = self.merge(Some(moving)) {
            moving.publish(generation, view);
        }
        let view = moving.enter();
        view.is_some().then_some(view)
    }

    /// The state of an image that takes no changes, before its first read.
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
        let mut visible = None;
        let mut next = self.backing.clone();
        let mut unopened = self.backing_unopened;
        let below = loop {
            let Some(disk) = next else {
                break if unopened { Below::Unopened } else { Below::Nothing };
            };
            let layer = match disk.as_live() {
                None => Arc::clone(&disk),
                Some(live) if live.watchers().register(moving?) => {
                    visible = visible.or(Some(layers.len()));
                    live.layer()
                }
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
        let plain: Vec<_> = plain.collect();
        assert_eq!(plain.len(), layers.len() + 1, "a merged layer without a number");
        let visible = visible.unwrap_or(layers.len());
        Some(View { layers, visible, plain, below, index, filling: View::filling_locks() })
    }

    fn new_index(&self, layers: &[Arc<dyn GuestDisk>]) -> Option<Index> {
        let all = || layers.iter().filter_map(|layer| layer.as_image()).chain([self]);
        let cell = all().map(|image| image.file.geometry().subcluster_size()).min()?;
        let extended = all().any(|image| image.file.geometry().extended_l2());
        Index::new(self.size(), cell.trailing_zeros(), extended, self.merged.budget)
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
