//! Which layers are merged, their index, and what keeps both true where layers are exchanged.
//!
//! Invariant: no read uses an index in which a layer is merged that has been exchanged, and an exchange waits
//! for the reads that use one. A live disk knows who has merged the layers from it on, and drops that before
//! it holds requests back. Whoever merges layers registers first, and publishes only if nothing was dropped
//! since then.

use super::index::Index;
use crate::live::gate::Gate;
use crate::port::disk::GuestDisk;
use crate::port::storage::Storage;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{LockOwner, Mutex, OnceLock, Rank, RwLockReadGuard, lock};
use ::alloc::boxed::Box;
use ::alloc::sync::{Arc, Weak};
use ::alloc::vec::Vec;

/// Groups of pieces that are filled one at a time. Origin: ours; misses of one group wait for each other.
const FILLING: usize = 16;

/// Layers that are merged, and the index of what they answer.
pub(crate) struct View {
    /// The merged layers below the image that owns this, top first. All of them are images.
    pub(crate) layers: Vec<Arc<dyn GuestDisk>>,
    /// How many of them a caller finds by asking each layer for its backing file: a live disk is one layer.
    pub(crate) visible: usize,
    /// The storage of each merged layer, the owner's first, whose bytes are the guest's: neither encrypted
    /// nor missing. A read of such bytes then takes no way through the image.
    pub(crate) plain: Vec<Option<Arc<dyn Storage>>>,
    pub(crate) below: Below,
    /// `None`: every read goes from layer to layer.
    pub(crate) index: Option<Index>,
    pub(crate) filling: [Mutex<()>; FILLING],
}

/// What is below the merged layers.
pub(crate) enum Below {
    /// Nothing: what they do not have are zeroes.
    Nothing,
    /// A backing file that was not opened.
    Unopened,
    /// A disk that is asked at each read.
    Disk {
        disk: Arc<dyn GuestDisk>,
        /// The image that it is, if it may become one that can be merged.
        pending: Option<Arc<dyn GuestDisk>>,
    },
}

impl View {
    /// The locks that belong to a view.
    pub(crate) fn filling_locks() -> [Mutex<()>; FILLING] {
        core::array::from_fn(|_| Mutex::new(Rank::Filling, ()))
    }

    /// The number of the disk below the merged layers.
    pub(crate) fn end(&self) -> usize {
        self.layers.len() + 1
    }

    /// The lock for filling `piece`: two threads that miss the same piece fill it once.
    pub(crate) fn filling_of(&self, piece: u64) -> &Mutex<()> {
        &self.filling[(piece % FILLING as u64) as usize]
    }
}

/// The view of an image, made by its first read.
pub(crate) struct Merged {
    /// Size limit of the index in bytes.
    pub(crate) budget: u64,
    pub(crate) state: OnceLock<State>,
}

impl Merged {
    pub(crate) fn new(budget: u64) -> Self {
        Self { budget, state: OnceLock::new() }
    }

    /// Frees the view, if it can be freed; a read makes a new one.
    pub(crate) fn forget(&self) {
        if let Some(State::Moving(moving)) = self.state.get() {
            moving.invalidate();
        }
    }
}

pub(crate) enum State {
    /// Not merged: an observer wants to see each step.
    Alone,
    /// No layer can be exchanged.
    Fixed(Box<View>),
    /// Layers may be exchanged.
    Moving(Arc<Moving>),
}

/// A view that is dropped when layers are exchanged.
pub(crate) struct Moving {
    gate: Gate<Option<Arc<View>>>,
    /// How often it was dropped. Changes only while the gate is closed.
    dropped: AtomicU64,
}

impl Moving {
    pub(crate) fn new() -> Self {
        Self { gate: Gate::new(&None), dropped: AtomicU64::new(0) }
    }

    /// The view, if there is one; it stays until the guard is dropped.
    pub(crate) fn enter(&self) -> RwLockReadGuard<'_, Option<Arc<View>>> {
        self.gate.enter()
    }

    /// For [`publish`](Self::publish): to be called before layers are looked at.
    pub(crate) fn generation(&self) -> u64 {
        self.dropped.load(Ordering::SeqCst)
    }

    /// Makes `view` the one that is used, unless something was dropped since `generation`.
    pub(crate) fn publish(&self, generation: u64, view: View) {
        let view = Some(Arc::new(view));
        let mut closed = self.gate.close();
        if self.dropped.load(Ordering::SeqCst) == generation {
            closed.replace(&view);
        }
    }

    /// Drops the view. Returns when no read uses it any more.
    pub(crate) fn invalidate(&self) {
        let mut closed = self.gate.close();
        self.dropped.fetch_add(1, Ordering::SeqCst);
        closed.replace(&None);
    }
}

/// Who has merged the layers from a live disk on.
pub(crate) struct Watchers(Mutex<Watching>);

#[derive(Default)]
struct Watching {
    /// How many hold requests back, or are about to.
    holds: usize,
    views: Vec<Weak<Moving>>,
}

impl Watchers {
    pub(crate) fn new() -> Self {
        let _owner = LockOwner::new();
        Self(Mutex::new(Rank::Watchers, Watching::default()))
    }

    /// Registers `moving`, to be dropped before an exchange. False if one may be under way: then the layers
    /// from here on must not be merged.
    pub(crate) fn register(&self, moving: &Arc<Moving>) -> bool {
        let mut watching = lock(&self.0);
        if watching.holds > 0 {
            return false;
        }
        watching.views.retain(|view| view.strong_count() > 0 && view.as_ptr() != Arc::as_ptr(moving));
        watching.views.push(Arc::downgrade(moving));
        true
    }

    /// Drops all views, and keeps others from being made, until [`end_hold`](Self::end_hold). Before requests
    /// are held back: reads that use a view may have to get through.
    pub(crate) fn begin_hold(&self) {
        let views = {
            let mut watching = lock(&self.0);
            watching.holds += 1;
            core::mem::take(&mut watching.views)
        };
        views.iter().filter_map(Weak::upgrade).for_each(|view| view.invalidate());
    }

    pub(crate) fn end_hold(&self) {
        let mut watching = lock(&self.0);
        debug_assert!(watching.holds > 0, "requests are let in that nobody held back");
        watching.holds -= 1;
    }
}
