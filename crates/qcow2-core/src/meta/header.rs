//! The header, in memory and on disk; fields are changed in its first sector.
//!
//! Invariant: one sector write switches the image from one state to the next; everything in the header that
//! this engine does not know stays as it is, byte for byte (I6).

mod extension;
mod switch;

use super::file::ImageFile;
use crate::damage::DamageObserver;
use crate::error::{Error, Result};
use crate::invariant;
use crate::rules::OrderingRule;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, Rank, lock};
use ::alloc::string::String;
use ::alloc::sync::Arc;
use qcow2_format::feature::{AutoclearFeatures, IncompatibleFeatures};
use qcow2_format::header::SECTOR_LEN;
use qcow2_format::{Header, HeaderField, HostOffset, Version};

/// The header of an open image, in memory and on disk.
pub(crate) struct HeaderStore {
    file: Arc<ImageFile>,
    // Held while the sector is written too: changes of different fields write the same sector, and the later
    // write must include the earlier change.
    state: Mutex<HeaderState>,
    /// True if the warnings that a changing image needs are on disk (bitmaps in use).
    changing: AtomicBool,
    /// Told of the first damage.
    observer: Option<Arc<dyn DamageObserver>>,
    observed: AtomicBool,
}

/// The parsed header and the sector it came from.
struct HeaderState {
    header: Header,
    sector: [u8; SECTOR_LEN],
}

impl HeaderStore {
    /// `header`: parsed from the storage. `sector`: the first sector there. `observer`: told of damage.
    pub(crate) fn new(
        file: Arc<ImageFile>,
        (header, sector): (Header, [u8; SECTOR_LEN]),
        observer: Option<Arc<dyn DamageObserver>>,
    ) -> Self {
        let state = Mutex::new(Rank::Header, HeaderState { header, sector });
        Self { file, state, changing: AtomicBool::new(false), observer, observed: AtomicBool::new(false) }
    }

    /// A copy of the header as it is now.
    pub(crate) fn current(&self) -> Header {
        lock(&self.state).header.clone()
    }

    /// Changes header fields with one sector write, then a barrier. Feature words exist in version 3 only:
    /// the caller checks the version.
    pub(crate) fn update(&self, fields: &[HeaderField]) -> Result<()> {
        self.write_fields(fields, true)
    }

    /// Writes a warning bit before the change that it warns of.
    fn warn(&self, field: HeaderField) -> Result<()> {
        self.write_fields(&[field], self.file.keeps(OrderingRule::WarningBeforeChange))
    }

    fn write_fields(&self, fields: &[HeaderField], durable: bool) -> Result<()> {
        let mut state = lock(&self.state);
        let HeaderState { header, sector } = &mut *state;
        invariant::may_write(self.file.is_writable());
        fields.iter().for_each(|field| field.apply(header, sector));
        invariant::is_header(sector);
        invariant::same_features(header, sector);
        let written = self.file.storage().write_at(HostOffset::new(0), &state.sector).map_err(Error::from);
        let written = written.and_then(|()| if durable { self.file.flush() } else { Ok(()) });
        self.file.poison_on_error(written)
    }

    /// True if the image may be changed: the warnings that must come before the first change are on disk.
    pub(crate) fn is_changing(&self) -> bool {
        self.changing.load(Ordering::Acquire)
    }

    /// Records that the warnings are on disk (true), or that they must be written again before the next
    /// change.
    pub(crate) fn set_changing(&self, changing: bool) {
        if changing {
            invariant::no_unknown_promise(&lock(&self.state).header);
        }
        self.changing.store(changing, Ordering::Release);
    }

    /// [`marked`](Self::marked) for an error with this message.
    pub(crate) fn mark_corrupt(&self, message: String) -> Error {
        self.marked(Error::corrupt(message))
    }

    /// [`marked`](Self::marked), if `error` says what is wrong with the image.
    pub(crate) fn marked_if_damaged(&self, error: Error) -> Error {
        if error.damage().is_some() { self.marked(error) } else { error }
    }

    /// Marks the image corrupt (sets the header's corrupt bit) and poisons it; returns `error`, after
    /// the observer has seen it.
    /// If the bit cannot be set (version 2, a failing storage), the image is only poisoned. An image that is
    /// open for repair is neither marked nor poisoned: its damage is known. An image that is open for reading
    /// is not marked.
    pub(crate) fn marked(&self, error: Error) -> Error {
        let header = self.current();
        let repairing = self.file.is_for_repair();
        if self.file.is_writable() && !repairing && header.version >= Version::V3 && !header.is_corrupt() {
            let marked = header.features.incompatible.with(IncompatibleFeatures::CORRUPT, true);
            let _ = self.update(&[HeaderField::Incompatible(marked)]);
        }
        if !repairing {
            self.file.poison();
            if let Some(observer) = &self.observer
                && !self.observed.swap(true, Ordering::AcqRel)
            {
                observer.damage_found(&error, self.file.is_writable());
            }
        }
        error
    }

    /// Clears unknown autoclear bits: this engine does not keep up to date what they promise.
    pub(crate) fn clear_unknown_autoclear(&self) -> Result<()> {
        let features = self.current().features.autoclear;
        let known = AutoclearFeatures::from_bits(features.bits() & !features.unknown().bits());
        if known != features {
            self.update(&[HeaderField::Autoclear(known)])?;
        }
        invariant::no_unknown_promise(&lock(&self.state).header);
        Ok(())
    }

    /// Clears the autoclear bit of the bitmaps, which invalidates them.
    pub(crate) fn distrust_bitmaps(&self) -> Result<()> {
        let features = self.current().features.autoclear;
        if features.contains(AutoclearFeatures::BITMAPS) {
            let without = features.with(AutoclearFeatures::BITMAPS, false);
            self.warn(HeaderField::Autoclear(without))?;
        }
        Ok(())
    }

    /// Clears the dirty bit; the caller has made everything durable. Not if open for repair: refcounts may
    /// still be too low then, so only [`clear_damage_marks`](Self::clear_damage_marks) clears the bit (I1).
    pub(crate) fn retract_warnings(&self) -> Result<()> {
        let header = self.current();
        if self.file.is_for_repair() || header.version < Version::V3 || !header.is_dirty() {
            return Ok(());
        }
        let clean = header.features.incompatible.with(IncompatibleFeatures::DIRTY, false);
        self.update(&[HeaderField::Incompatible(clean)])
    }

    /// Clears the dirty and the corrupt bit.
    pub(crate) fn clear_damage_marks(&self) -> Result<()> {
        let header = self.current();
        let features = header.features.incompatible;
        let clean =
            features.with(IncompatibleFeatures::DIRTY, false).with(IncompatibleFeatures::CORRUPT, false);
        if header.version < Version::V3 || clean == features {
            return Ok(());
        }
        self.update(&[HeaderField::Incompatible(clean)])
    }
}
