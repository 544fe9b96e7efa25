//! Persistent bitmaps: which parts of the disk were changed since somebody looked.
//!
//! Enabled bitmaps are marked before anything is written. On disk they are marked as in use before the first change,
//! and stored anew when the image is closed: a crash in between leaves them in use, which says that their bits mean
//! nothing. So a bitmap may be lost, but never lies. Spec: "Bitmaps".

mod bits;
mod store;

pub use bits::Bits;
pub use store::read_bitmaps;

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::port::disk::GuestDisk;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Rank, RwLock, read, write};
use ::alloc::format;
use ::alloc::string::String;
use ::alloc::vec::Vec;
use qcow2_format::bitmap::Bitmap;
use qcow2_format::{GuestRange, Version, limit};

/// The bitmaps of an open image.
#[derive(Debug)]
pub(crate) struct Bitmaps {
    state: RwLock<State>,
    /// Whether there is an enabled bitmap to be marked.
    recording: AtomicBool,
}

impl Default for Bitmaps {
    fn default() -> Self {
        Self { state: RwLock::new(Rank::Bitmaps, State::default()), recording: AtomicBool::new(false) }
    }
}

#[derive(Debug, Default)]
struct State {
    /// Whether the directory was read.
    known: bool,
    live: Vec<Live>,
    /// Whether the directory on disk is not what it should be when the image is closed.
    changed: bool,
}

/// One bitmap.
#[derive(Debug)]
struct Live {
    entry: Bitmap,
    /// Its bits, where they were needed.
    bits: Option<Bits>,
    /// Whether its bits on disk are not what they should be when the image is closed.
    changed: bool,
    /// Whether it is marked as in use on disk because of us.
    marked: bool,
}

impl Live {
    fn records(&self) -> bool {
        self.entry.auto && !self.entry.in_use
    }
}

impl Bitmaps {
    /// Notes that `range` is about to change.
    pub(crate) fn mark(&self, range: GuestRange) {
        if self.recording.load(Ordering::Acquire) {
            let state = read(&self.state);
            for bits in state.live.iter().filter(|live| live.records()).filter_map(|live| live.bits.as_ref())
            {
                bits.mark(range.start().value(), range.len());
            }
        }
    }
}

impl Image {
    /// The image's bitmaps as they are now, in the order of the directory; those that the image does not vouch for any
    /// more are left out. Disk: reads the directory. Errors: `Corrupt` for a damaged directory, `Storage`.
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        let _structure = read(&self.structure);
        let state = self.known_bitmaps()?;
        Ok(state.live.iter().map(|live| live.entry.clone()).collect())
    }

    /// A copy of a bitmap's bits. Disk: may read them. Errors: `NotFound`; `Inconsistent` for a bitmap that was in use
    /// when the image was last closed; `NoSpace` above 512 MiB; `Corrupt`, `Storage`.
    pub fn bitmap_bits(&self, name: &[u8]) -> Result<Bits> {
        let _structure = read(&self.structure);
        let mut state = self.known_bitmaps()?;
        let index = usable(&state, name)?;
        self.loaded(&mut state.live[index]).cloned()
    }

    /// Adds an enabled bitmap without marks. `name`: 1 to 1023 bytes. `granularity_bits`: 9 to 31. Disk: untouched until
    /// [`close`](Self::close). Errors: `Exists`; `InvalidOption` for a name, a granularity or a disk that cannot be;
    /// `Unsupported` in version 2; `NoSpace` for more bitmaps than allowed; `ReadOnly`, `Poisoned`.
    pub fn add_bitmap(&self, name: &[u8], granularity_bits: u8) -> Result<()> {
        self.change_bitmaps(|state| {
            let invalid = |message: String| Err(Error::new(ErrorKind::InvalidOption, message));
            if name.is_empty() || name.len() > limit::MAX_BITMAP_NAME.into() {
                return invalid(format!("bitmap name has {} bytes, allowed are 1 to 1023", name.len()));
            }
            if !(limit::MIN_GRANULARITY_BITS..=limit::MAX_GRANULARITY_BITS).contains(&granularity_bits) {
                return invalid(format!("granularity is 2^{granularity_bits}, allowed are 2^9 to 2^31"));
            }
            if self.header().version < Version::V3 {
                return Err(Error::new(ErrorKind::Unsupported, "a version 2 image cannot store bitmaps"));
            }
            if self.size() == 0 {
                return invalid("a disk without bytes cannot have a bitmap".into());
            }
            if position(state, name).is_some() {
                return Err(Error::new(ErrorKind::Exists, format!("bitmap already exists: {}", text(name))));
            }
            if state.live.len() as u64 >= limit::MAX_BITMAPS.into() {
                return Err(Error::new(ErrorKind::NoSpace, "image has as many bitmaps as it can"));
            }
            let bits = Some(Bits::new(granularity_bits, self.size())?);
            let mut entry = Bitmap::new(name, granularity_bits);
            entry.auto = true;
            state.live.push(Live { entry, bits, changed: true, marked: false });
            Ok(())
        })
    }

    /// Removes a bitmap, usable or not. Disk: untouched until [`close`](Self::close). Errors: `NotFound`.
    pub fn remove_bitmap(&self, name: &[u8]) -> Result<()> {
        self.change_bitmaps(|state| {
            let index = position(state, name).ok_or_else(|| missing(name))?;
            let removed = state.live.remove(index);
            // What it had on disk is found again by comparing directories.
            drop(removed);
            Ok(())
        })
    }

    /// Takes all marks out of a bitmap. Disk: untouched until [`close`](Self::close). Errors: as
    /// [`bitmap_bits`](Self::bitmap_bits).
    pub fn clear_bitmap(&self, name: &[u8]) -> Result<()> {
        self.change_bitmaps(|state| {
            let index = usable(state, name)?;
            let live = &mut state.live[index];
            live.bits = Some(Bits::new(live.entry.granularity_bits, self.size())?);
            live.changed = true;
            Ok(())
        })
    }

    /// Lets a bitmap record changes, or not. Disk: untouched until [`close`](Self::close). Errors: as
    /// [`bitmap_bits`](Self::bitmap_bits).
    pub fn enable_bitmap(&self, name: &[u8], enable: bool) -> Result<()> {
        self.change_bitmaps(|state| {
            let index = usable(state, name)?;
            state.live[index].entry.auto = enable;
            Ok(())
        })
    }

    /// Marks in a bitmap everything that `source` marks, which is of a disk of the same size and may have another
    /// granularity. Disk: may read the bitmap. Errors: `InvalidOption` for another size; as
    /// [`bitmap_bits`](Self::bitmap_bits).
    pub fn merge_bitmap(&self, name: &[u8], source: &Bits) -> Result<()> {
        self.change_bitmaps(|state| {
            let index = usable(state, name)?;
            if source.size() != self.size() {
                let message =
                    format!("bitmap is of a disk of {} bytes, this one has {}", source.size(), self.size());
                return Err(Error::new(ErrorKind::InvalidOption, message));
            }
            let live = &mut state.live[index];
            self.loaded(live)?.merge(source);
            live.changed = true;
            Ok(())
        })
    }

    fn change_bitmaps(&self, change: impl FnOnce(&mut State) -> Result<()>) -> Result<()> {
        let _alone = write(&self.structure);
        self.meta.check_writable()?;
        let mut state = self.known_bitmaps()?;
        change(&mut state)?;
        state.changed = true;
        if self.meta.changing.load(Ordering::Acquire) {
            // Others may have become enabled: their bits must be there before the next change.
            self.start_recording(&mut state)?;
        }
        Ok(())
    }

    fn known_bitmaps(&self) -> Result<crate::sync::RwLockWriteGuard<'_, State>> {
        let mut state = write(&self.bitmaps.state);
        if !state.known {
            let entries = read_bitmaps(&*self.meta.storage, &self.header())?;
            let live = |entry| Live { entry, bits: None, changed: false, marked: false };
            state.live = entries.into_iter().map(live).collect();
            state.known = true;
        }
        Ok(state)
    }

    /// The bits of a usable bitmap, read at the first use.
    fn loaded<'a>(&self, live: &'a mut Live) -> Result<&'a Bits> {
        let bits = match live.bits.take() {
            Some(bits) => bits,
            None => self.read_bits(&live.entry)?,
        };
        Ok(live.bits.insert(bits))
    }

    /// What comes before the first change: enabled bitmaps are in use, on disk, and recording. A bitmap that cannot be
    /// read makes all of them untrusted.
    pub(crate) fn begin_change(&self) -> Result<()> {
        if self.meta.changing.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.header().trusted_bitmaps().is_some() {
            let started = self.known_bitmaps().and_then(|mut state| self.start_recording(&mut state));
            match started {
                Err(error) if error.storage_error().is_none() => {
                    self.bitmaps.recording.store(false, Ordering::Release);
                    *write(&self.bitmaps.state) = State { known: true, ..State::default() };
                    self.meta.distrust_bitmaps()?;
                }
                other => other?,
            }
        } else if read(&self.bitmaps.state).changed {
            // Added since the image was opened.
            let mut state = self.known_bitmaps()?;
            self.start_recording(&mut state)?;
        }
        self.meta.changing.store(true, Ordering::Release);
        Ok(())
    }

    fn start_recording(&self, state: &mut State) -> Result<()> {
        for live in state.live.iter_mut().filter(|live| live.records()) {
            self.loaded(live)?;
            live.changed = true;
        }
        self.mark_in_use(state, |live| live.records())?;
        let records = state.live.iter().any(Live::records);
        self.bitmaps.recording.store(records, Ordering::Release);
        Ok(())
    }

    /// What comes before a change of the disk's size: all bitmaps are in use, and their bits in memory. Errors:
    /// `Inconsistent` where one of them cannot follow.
    pub(crate) fn begin_resize_of_bitmaps(&self) -> Result<()> {
        if self.header().trusted_bitmaps().is_none() && !read(&self.bitmaps.state).changed {
            return Ok(());
        }
        let mut state = self.known_bitmaps()?;
        for live in &mut state.live {
            if live.entry.in_use {
                return Err(inconsistent(&live.entry.name));
            }
            self.loaded(live)?;
        }
        self.mark_in_use(&mut state, |_| true)?;
        state.live.iter_mut().for_each(|live| live.changed = true);
        state.changed = true;
        Ok(())
    }

    /// The disk has `size` bytes now.
    pub(crate) fn resize_bitmaps(&self, size: u64) -> Result<()> {
        let mut state = write(&self.bitmaps.state);
        for live in &mut state.live {
            if let Some(bits) = &live.bits {
                live.bits = Some(bits.resized(size)?);
            }
        }
        Ok(())
    }
}

fn position(state: &State, name: &[u8]) -> Option<usize> {
    state.live.iter().position(|live| live.entry.name == name)
}

fn usable(state: &State, name: &[u8]) -> Result<usize> {
    let index = position(state, name).ok_or_else(|| missing(name))?;
    if state.live[index].entry.in_use { Err(inconsistent(name)) } else { Ok(index) }
}

fn missing(name: &[u8]) -> Error {
    Error::new(ErrorKind::NotFound, format!("dirty bitmap '{}' not found", text(name)))
}

fn inconsistent(name: &[u8]) -> Error {
    let message = format!("bitmap '{}' is inconsistent and cannot be used", text(name));
    Error::new(ErrorKind::Inconsistent, message)
}

/// A name as text.
fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
