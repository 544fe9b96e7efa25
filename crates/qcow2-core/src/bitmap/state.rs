//! The bitmaps of an open image, in memory.

use super::bits::Bits;
use super::room::Room;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Rank, RwLock, read};
use ::alloc::collections::BTreeMap;
use ::alloc::format;
use ::alloc::string::String;
use ::alloc::vec::Vec;
use qcow2_format::GuestRange;
use qcow2_format::bitmap::Bitmap;

/// The bitmaps of an open image.
#[derive(Debug)]
pub(crate) struct Bitmaps {
    pub(super) state: RwLock<State>,
    /// True if there is an enabled bitmap that writes must mark.
    pub(super) recording: AtomicBool,
    /// The rest of the memory limit, and the limit itself in bytes.
    pub(super) room: Room,
    pub(super) memory: u64,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// True if the directory was read.
    pub(super) known: bool,
    /// True if the bitmaps' tables were checked.
    pub(super) judged: bool,
    pub(super) live: Vec<Live>,
    /// The first bitmap of each name.
    pub(super) by_name: BTreeMap<Vec<u8>, usize>,
    /// True if closing the image must write a new directory.
    pub(super) changed: bool,
}

/// One bitmap.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) entry: Bitmap,
    /// Its bits, if loaded.
    pub(super) bits: Option<Bits>,
    /// True if closing the image must write its bits.
    pub(super) changed: bool,
    /// True if this open image has set its in-use flag on disk.
    pub(super) marked: bool,
}

impl State {
    pub(super) fn new(live: Vec<Live>) -> Self {
        let mut state = Self { known: true, live, ..Self::default() };
        state.find_names();
        state
    }

    pub(super) fn find_names(&mut self) {
        self.by_name.clear();
        for (index, live) in self.live.iter().enumerate() {
            self.by_name.entry(live.entry.name.clone()).or_insert(index);
        }
        debug_assert!(self.by_name.len() <= self.live.len(), "a name without a bitmap");
    }

    pub(super) fn position(&self, name: &[u8]) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    pub(super) fn usable(&self, name: &[u8]) -> Result<usize> {
        let index = self.position(name).ok_or_else(|| missing(name))?;
        if self.live[index].entry.in_use { Err(inconsistent(name)) } else { Ok(index) }
    }
}

impl Live {
    pub(super) fn new(entry: Bitmap) -> Self {
        Self { entry, bits: None, changed: false, marked: false }
    }

    pub(super) fn records(&self) -> bool {
        self.entry.auto && !self.entry.in_use
    }
}

impl Bitmaps {
    /// The directory is read at the first use. `memory`: limit for the bits, in bytes.
    pub(crate) fn new(memory: u64) -> Self {
        let (state, recording) = (RwLock::new(Rank::Bitmaps, State::default()), AtomicBool::new(false));
        Self { state, recording, room: Room::new(memory), memory }
    }

    /// Marks `range` in every recording bitmap. Called before `range` changes.
    pub(crate) fn mark(&self, range: GuestRange) {
        if self.recording.load(Ordering::Acquire) {
            let state = read(&self.state);
            for bits in state.live.iter().filter(|live| live.records()).filter_map(|live| live.bits.as_ref())
            {
                // Past the memory limit it marks more, which is harmless.
                let _exact = bits.mark(range.start().value(), range.len());
            }
        }
    }

    pub(super) fn no_room(&self, name: &[u8]) -> Error {
        let (name, memory) = (text(name), self.memory);
        let message = format!(
            "bitmap '{name}' does not fit: the bits of an image's bitmaps may take {memory} bytes of memory \
             in all"
        );
        Error::new(ErrorKind::NoSpace, message)
    }
}

pub(super) fn missing(name: &[u8]) -> Error {
    Error::new(ErrorKind::NotFound, format!("dirty bitmap '{}' not found", text(name)))
}

pub(super) fn inconsistent(name: &[u8]) -> Error {
    let message = format!("bitmap '{}' is inconsistent and cannot be used", text(name));
    Error::new(ErrorKind::Inconsistent, message)
}

/// A name as text.
pub(super) fn text(name: &[u8]) -> String {
    qcow2_format::text::text_of(name)
}
