//! Adds, changes and removes the header's bitmaps extension.
//!
//! The header cannot move, so its sectors are written in an order in which each step leaves a valid header:
//! first bytes that the present header does not use, last the sector that makes them part of it. The
//! exception: removing the extension may move other extensions across sectors, which takes several writes;
//! the bitmaps' autoclear bit is clear meanwhile. Spec: "Header extensions", "Bitmaps extension".

use super::{HeaderState, HeaderStore};
use crate::error::{Error, ErrorKind, Result};
use crate::invariant;
use crate::meta::file::ImageFile;
use crate::meta::page::SECTOR_SIZE;
use crate::sync::lock;
use ::alloc::format;
use ::alloc::vec;
use ::alloc::vec::Vec;
use core::ops::Range;
use qcow2_format::extension::BitmapsExtension;
use qcow2_format::feature::AutoclearFeatures;
use qcow2_format::header::edit::{
    BITMAPS_RECORD_LEN as RECORD, EXTENSION_HEADER_LEN as MARKER, ExtensionPlaces, autoclear, backing_name,
    bitmaps_record, set_autoclear, set_backing_name_start,
};
use qcow2_format::{Header, HostOffset, Version};

const SECTOR: usize = SECTOR_SIZE as usize;

/// The header's cluster, in its new and its old form; the sectors that differ are written.
struct Draft<'a> {
    file: &'a ImageFile,
    bytes: Vec<u8>,
    /// The bytes on disk.
    before: Vec<u8>,
}

impl HeaderStore {
    /// Makes the header point to this bitmap directory and sets the autoclear bit, or removes both. Durable
    /// when it returns. Errors: `Unsupported` in version 2; `NoSpace` if the extension does not fit into the
    /// first cluster, and `Storage`, which poison the image.
    pub(crate) fn set_bitmaps_extension(&self, extension: Option<BitmapsExtension>) -> Result<()> {
        let mut state = lock(&self.state);
        if state.header.version < Version::V3 {
            return Err(Error::new(ErrorKind::Unsupported, "a version 2 image cannot store bitmaps"));
        }
        let mut draft = Draft::new(&self.file, &state)?;
        let list = draft.places()?;
        let done = match (extension, list.bitmaps) {
            (Some(extension), Some(at)) => draft.change(at, &extension),
            (Some(extension), None) => draft.insert(&list, &extension),
            (None, Some(at)) => draft.remove(at, &list),
            (None, None) => draft.trust(false),
        };
        // Even after an error: memory must have what was written so far.
        let adopted = draft.adopt(&mut state);
        self.file.poison_on_error(done.and(adopted))
    }
}

impl<'a> Draft<'a> {
    fn new(file: &'a ImageFile, state: &HeaderState) -> Result<Self> {
        let mut bytes = vec![0; file.geometry().cluster_size() as usize];
        file.storage().read_padded(HostOffset::new(0), &mut bytes)?;
        bytes[..SECTOR].copy_from_slice(&state.sector);
        Ok(Self { file, before: bytes.clone(), bytes })
    }

    fn places(&self) -> Result<ExtensionPlaces> {
        ExtensionPlaces::find(&self.bytes)
            .ok_or_else(|| Error::corrupt("header extensions pass the first cluster"))
    }

    /// Writes the sectors in `range` that differ from the disk, in ascending order if `forward`, else in
    /// descending order, each followed by a barrier.
    fn write(&mut self, range: Range<usize>, forward: bool) -> Result<()> {
        assert!(range.end <= self.bytes.len(), "bytes {range:?} leave the header's cluster");
        let mut sectors: Vec<usize> = (range.start / SECTOR..range.end.div_ceil(SECTOR)).collect();
        if !forward {
            sectors.reverse();
        }
        for sector in sectors {
            let place = sector * SECTOR..(sector + 1) * SECTOR;
            if self.bytes[place.clone()] != self.before[place.clone()] {
                let at = HostOffset::new(place.start as u64);
                invariant::may_write(self.file.is_writable());
                if sector == 0 {
                    invariant::is_header(&self.bytes);
                }
                self.file.storage().write_at(at, &self.bytes[place.clone()])?;
                self.file.flush()?;
                self.before[place.clone()].copy_from_slice(&self.bytes[place]);
            }
        }
        Ok(())
    }

    fn set_trust(&mut self, trusted: bool) {
        let features = autoclear(&self.bytes).with(AutoclearFeatures::BITMAPS, trusted);
        set_autoclear(&mut self.bytes, features);
    }

    fn trust(&mut self, trusted: bool) -> Result<()> {
        self.set_trust(trusted);
        self.write(0..SECTOR, true)
    }

    fn is_trusted(&self) -> bool {
        autoclear(&self.bytes).contains(AutoclearFeatures::BITMAPS)
    }

    /// Changes the extension at `at`. One sector write, if the extension does not cross a sector boundary;
    /// otherwise the bitmaps' autoclear bit is cleared first.
    fn change(&mut self, at: usize, extension: &BitmapsExtension) -> Result<()> {
        let data = at + MARKER..at + RECORD;
        let one_sector = data.start / SECTOR == (data.end - 1) / SECTOR;
        if !one_sector && self.is_trusted() {
            self.trust(false)?;
        }
        self.bytes[data.clone()].copy_from_slice(&bitmaps_record(extension)[MARKER..]);
        self.write(data, false)?;
        self.trust(true)
    }

    /// Appends the extension to the list. Writes the bytes behind the old end marker first, the marker's
    /// sector last.
    fn insert(&mut self, list: &ExtensionPlaces, extension: &BitmapsExtension) -> Result<()> {
        let end = list.end + RECORD + MARKER;
        if self.is_trusted() {
            self.trust(false)?;
        }
        if let Some(name) = backing_name(&self.bytes).filter(|name| name.start < end) {
            self.move_backing_name(name, end)?;
        }
        if end > self.bytes.len() {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("header has no room for bitmaps in {} bytes", self.bytes.len()),
            ));
        }
        self.bytes[list.end..list.end + RECORD].copy_from_slice(&bitmaps_record(extension));
        self.bytes[list.end + RECORD..end].fill(0);
        self.write(list.end..end, false)?;
        self.trust(true)
    }

    /// Moves the backing file's name to byte `end` of the header or later: writes a copy, then the pointer to
    /// it.
    fn move_backing_name(&mut self, name: Range<usize>, end: usize) -> Result<()> {
        let (len, new) = (name.len(), end.max(name.end).next_multiple_of(8));
        if new + len > self.bytes.len() {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("header has no room for bitmaps beside a backing file name of {len} bytes"),
            ));
        }
        self.bytes.copy_within(name, new);
        self.write(new..new + len, true)?;
        set_backing_name_start(&mut self.bytes, new);
        self.write(0..SECTOR, true)
    }

    /// Removes the extension at `at`; the ones behind it move up.
    fn remove(&mut self, at: usize, list: &ExtensionPlaces) -> Result<()> {
        self.trust(false)?;
        let end = (list.end + MARKER).min(self.bytes.len());
        self.bytes.copy_within(at + RECORD..end, at);
        self.bytes[end - RECORD..end].fill(0);
        self.write(at..end, true)
    }

    /// Updates the header in memory to what was written.
    fn adopt(&self, state: &mut HeaderState) -> Result<()> {
        state.sector.copy_from_slice(&self.before[..SECTOR]);
        let bad = |e| Error::corrupt("header is damaged").with_source(e);
        state.header = Header::parse(&self.before).map_err(bad)?;
        Ok(())
    }
}
