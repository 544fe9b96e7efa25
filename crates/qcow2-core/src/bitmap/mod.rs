//! Persistent dirty bitmaps: which parts of the disk have changed, for incremental backups.
//!
//! A write marks the enabled bitmaps before it changes anything. The in-use flag of their directory entries
//! is set on disk before the first change, and [`close`](Image::close) stores the bits and clears it: after a
//! crash in between the flag is still set, and the bits are invalid. So a crash may lose a bitmap, but a
//! valid bitmap never misses a change. Spec: "Bitmaps".
//!
//! The bits of all bitmaps of an image share one memory limit. If the recording bitmaps do not fit, the first
//! change fails with `NoSpace` before anything is written; so does a merge. The caller can then remove
//! bitmaps, which needs no memory. Marks that a running guest makes past the limit are widened instead,
//! because a guest write must not fail for a bitmap, and extra marks are harmless.

mod bits;
mod room;
mod state;
mod store;
mod tree;

pub use bits::Bits;
pub(crate) use room::MAX_BITS_MEMORY;
pub(crate) use state::Bitmaps;
pub use store::{check_bitmaps, read_bitmaps};

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::sync::atomic::Ordering;
use crate::sync::{read, write};
use ::alloc::format;
use ::alloc::string::String;
use ::alloc::vec::Vec;
use core::fmt;
use qcow2_format::bitmap::Bitmap;
use qcow2_format::{Version, limit};
use room::Room;
use state::{Live, State, inconsistent, missing, text};

/// Why bitmaps cannot be merged: they are of disks of different sizes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OtherSize {
    /// The disk of the bitmap with the marks.
    pub source: u64,
    /// The disk of the bitmap that was to get them.
    pub own: u64,
}

impl fmt::Display for OtherSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the source is of a disk of {} bytes, this disk has {}", self.source, self.own)
    }
}

impl core::error::Error for OtherSize {}

impl Image {
    /// The image's bitmaps, in the order of the directory. Empty if the bitmaps' autoclear bit is not set.
    /// Disk: reads the directory. Errors: `Corrupt` for a damaged directory, `Storage`.
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        let _structure = read(&self.structure);
        let state = self.known_bitmaps()?;
        Ok(state.live.iter().map(|live| live.entry.clone()).collect())
    }

    /// A copy of a bitmap's bits. Disk: may read them. Errors: `NotFound`; `Inconsistent` for a bitmap whose
    /// in-use flag was set when the image was opened; `NoSpace` if the bits exceed the memory limit;
    /// `Corrupt`, `Storage`.
    pub fn bitmap_bits(&self, name: &[u8]) -> Result<Bits> {
        let _structure = read(&self.structure);
        let mut state = self.known_bitmaps()?;
        let index = state.usable(name)?;
        if let Some(bits) = &state.live[index].bits {
            return Ok(bits.clone());
        }
        self.judge_tables(&mut state)?;
        // Not kept in the image, and a limit of their own: a caller may read many bitmaps one by one that do
        // not fit into memory together.
        self.read_bits(&state.live[index].entry, &Room::new(self.bitmaps.memory))
    }

    /// Adds an enabled bitmap without marks. `name`: 1 to 1023 bytes. `granularity_bits`: 9 to 31. Disk:
    /// unchanged until [`close`](Self::close). Errors: `Exists`; `InvalidOption` for a bad name or
    /// granularity and for a disk of 0 bytes; `Unsupported` in version 2; `NoSpace` for too many bitmaps or
    /// too many bits; `ReadOnly`, `Poisoned`.
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
            check_has_bytes(self.size())?;
            if state.position(name).is_some() {
                return Err(Error::new(ErrorKind::Exists, format!("bitmap already exists: {}", text(name))));
            }
            if state.live.len() as u64 >= limit::MAX_BITMAPS.into() {
                return Err(Error::new(ErrorKind::NoSpace, "image has as many bitmaps as it can"));
            }
            let bits = Some(Bits::new(granularity_bits, self.size(), &self.bitmaps.room)?);
            let mut entry = Bitmap::new(name, granularity_bits);
            entry.auto = true;
            state.by_name.insert(name.into(), state.live.len());
            state.live.push(Live { bits, changed: true, ..Live::new(entry) });
            Ok(())
        })
    }

    /// Removes a bitmap, also an inconsistent one. Disk: unchanged until [`close`](Self::close). Errors:
    /// `NotFound`, `ReadOnly`, `Poisoned`.
    pub fn remove_bitmap(&self, name: &[u8]) -> Result<()> {
        self.change_bitmaps(|state| {
            let index = state.position(name).ok_or_else(|| missing(name))?;
            let removed = state.live.remove(index);
            // Its clusters are freed when the bitmaps are stored: the new directory lacks them.
            drop(removed);
            state.find_names();
            Ok(())
        })
    }

    /// Clears all marks of a bitmap. Disk: unchanged until [`close`](Self::close). Errors: as
    /// [`bitmap_bits`](Self::bitmap_bits), `ReadOnly`, `Poisoned`.
    pub fn clear_bitmap(&self, name: &[u8]) -> Result<()> {
        self.change_bitmaps(|state| {
            let index = state.usable(name)?;
            let live = &mut state.live[index];
            live.bits = Some(Bits::new(live.entry.granularity_bits, self.size(), &self.bitmaps.room)?);
            live.changed = true;
            Ok(())
        })
    }

    /// Enables or disables a bitmap; an enabled one records changes. Disk: unchanged until
    /// [`close`](Self::close). Errors: as [`bitmap_bits`](Self::bitmap_bits), `ReadOnly`, `Poisoned`.
    pub fn enable_bitmap(&self, name: &[u8], enable: bool) -> Result<()> {
        self.change_bitmaps(|state| {
            let index = state.usable(name)?;
            if enable && self.header.is_changing() {
                // It records from now on, so its bits must be in memory before it is enabled.
                self.loaded(state, index)?;
            }
            state.live[index].entry.auto = enable;
            Ok(())
        })
    }

    /// Adds the marks of `source` to a bitmap. `source` must be of a disk of the same size; its granularity
    /// may differ. Disk: may read the bitmap. Errors: `InvalidOption` for another size, with [`OtherSize`] as
    /// source; `NoSpace` if the
    /// marks exceed the memory limit: the bitmap is then unchanged, or, if it has been changed or is
    /// recording, has more marks than both together; as [`bitmap_bits`](Self::bitmap_bits), `ReadOnly`,
    /// `Poisoned`.
    pub fn merge_bitmap(&self, name: &[u8], source: &Bits) -> Result<()> {
        self.change_bitmaps(|state| {
            let index = state.usable(name)?;
            if source.size() != self.size() {
                let sizes = OtherSize { source: source.size(), own: self.size() };
                let error = Error::new(ErrorKind::InvalidOption, "bitmaps cannot be merged");
                return Err(error.with_source(sizes));
            }
            let exact = self.loaded(state, index)?.merge(source);
            let live = &mut state.live[index];
            if !exact && !live.changed && !live.marked {
                live.bits = None;
                return Err(self.bitmaps.no_room(name));
            }
            live.changed = true;
            if exact { Ok(()) } else { Err(self.bitmaps.no_room(name)) }
        })
    }

    fn change_bitmaps(&self, change: impl FnOnce(&mut State) -> Result<()>) -> Result<()> {
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        let mut state = self.known_bitmaps()?;
        change(&mut state)?;
        state.changed = true;
        if self.header.is_changing() {
            // Bitmaps may have become enabled: their bits must be in memory before the next change.
            self.start_recording(&mut state)?;
        }
        Ok(())
    }

    fn known_bitmaps(&self) -> Result<crate::sync::RwLockWriteGuard<'_, State>> {
        let mut state = write(&self.bitmaps.state);
        if !state.known {
            let entries = read_bitmaps(self.file.storage(), &self.header())?;
            *state = State::new(entries.into_iter().map(Live::new).collect());
        }
        Ok(state)
    }

    /// The bits of a bitmap that is not inconsistent, read from disk at the first use.
    fn loaded<'a>(&self, state: &'a mut State, index: usize) -> Result<&'a Bits> {
        let bits = match state.live[index].bits.take() {
            Some(bits) => bits,
            None => {
                self.judge_tables(state)?;
                self.read_bits(&state.live[index].entry, &self.bitmaps.room)?
            }
        };
        Ok(state.live[index].bits.insert(bits))
    }

    fn judge_tables(&self, state: &mut State) -> Result<()> {
        if !state.judged {
            check_bitmaps(self.file.storage(), &self.header())?;
            state.judged = true;
        }
        Ok(())
    }

    /// Must run before the first change: sets the in-use flag of enabled bitmaps on disk and starts
    /// recording. If a bitmap cannot be read, clears the autoclear bit, so that all bitmaps are invalid.
    /// Errors: `NoSpace` if the bits exceed the memory limit; nothing has changed then. `Storage`.
    pub(crate) fn begin_change(&self) -> Result<()> {
        // Again, now that nothing can close the image: it may have been closed while the request waited.
        self.file.check_writable()?;
        self.flusher.check_room()?;
        if self.header.is_changing() {
            return Ok(());
        }
        if self.header().trusted_bitmaps().is_some() {
            let started = self.known_bitmaps().and_then(|mut state| self.start_recording(&mut state));
            match started {
                Err(error) if error.storage_error().is_none() && error.kind() != ErrorKind::NoSpace => {
                    self.bitmaps.recording.store(false, Ordering::Release);
                    *write(&self.bitmaps.state) = State::new(Vec::new());
                    self.header.distrust_bitmaps()?;
                }
                other => other?,
            }
        } else if read(&self.bitmaps.state).changed {
            // The image had no bitmaps; some were added since.
            let mut state = self.known_bitmaps()?;
            self.start_recording(&mut state)?;
        }
        self.header.set_changing(true);
        Ok(())
    }

    fn start_recording(&self, state: &mut State) -> Result<()> {
        self.load_all(state, Live::records)?;
        state.live.iter_mut().filter(|live| live.records()).for_each(|live| live.changed = true);
        self.mark_in_use(state, |live| live.records())?;
        let lost = |live: &Live| live.records() && live.bits.is_none();
        assert!(!state.live.iter().any(lost), "a bitmap records changes without its bits");
        let records = state.live.iter().any(Live::records);
        self.bitmaps.recording.store(records, Ordering::Release);
        Ok(())
    }

    /// Loads the bits of all bitmaps that `pick` accepts. After an error none of them stays in memory that is
    /// not needed there.
    fn load_all(&self, state: &mut State, pick: impl Fn(&Live) -> bool) -> Result<()> {
        let picked = |state: &State, index: usize| pick(&state.live[index]);
        let loaded = (0..state.live.len()).try_for_each(|index| match picked(state, index) {
            true => self.loaded(state, index).map(drop),
            false => Ok(()),
        });
        if loaded.is_err() {
            let unused = |live: &&mut Live| !live.changed && !live.marked;
            state.live.iter_mut().filter(unused).for_each(|live| live.bits = None);
        }
        loaded
    }

    /// Must run before the disk is resized to `size` bytes: loads all bitmaps and sets their in-use flags on
    /// disk. Errors: `Inconsistent` or `NoSpace` if a bitmap cannot be resized; `InvalidOption` for a disk
    /// of 0 bytes.
    pub(crate) fn begin_resize_of_bitmaps(&self, size: u64) -> Result<()> {
        if self.header().trusted_bitmaps().is_none() && !read(&self.bitmaps.state).changed {
            return Ok(());
        }
        let mut state = self.known_bitmaps()?;
        if let Some(lost) = state.live.iter().find(|live| live.entry.in_use) {
            return Err(inconsistent(&lost.entry.name));
        }
        if !state.live.is_empty() {
            check_has_bytes(size)?;
        }
        state.live.iter().try_for_each(|live| Bits::check_size(live.entry.granularity_bits, size))?;
        self.load_all(&mut state, |_| true)?;
        // Closing replaces all of them on disk. Check now that the old ones can be freed, before the size
        // changes.
        let header = self.header();
        let old = read_bitmaps(self.file.storage(), &header)?;
        self.replaced_bitmaps(&header, &old, &State::default())?;
        self.mark_in_use(&mut state, |_| true)?;
        state.live.iter_mut().for_each(|live| live.changed = true);
        state.changed = true;
        Ok(())
    }

    /// Resizes the bits to a disk of `size` bytes.
    pub(crate) fn resize_bitmaps(&self, size: u64) -> Result<()> {
        let mut state = write(&self.bitmaps.state);
        for live in &mut state.live {
            if let Some(bits) = live.bits.take() {
                live.bits = Some(bits.resized(size)?);
            }
        }
        Ok(())
    }
}

/// A bitmap has a table of one entry at least, and that of a disk without bytes would have none: no reader
/// accepts either.
fn check_has_bytes(size: u64) -> Result<()> {
    if size > 0 {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidOption, "a disk without bytes cannot have a bitmap"))
}
