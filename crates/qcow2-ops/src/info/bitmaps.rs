//! The bitmaps of an image, and what is wrong with them.
//!
//! Finds damage in the order in which QEMU comes upon it, which opens no image with damaged bitmaps: the
//! entries of the directory, then for each bitmap its name, its table and the length of the table. Other than
//! QEMU it goes on afterwards. Spec: "Bitmaps".

use super::{opening, read_up_to};
use crate::error::{Error, ErrorKind, Result};
use qcow2_core::Storage;
use qcow2_core::format::bitmap::{Bitmap, BitmapTableEntry};
use qcow2_core::format::bytes::words;
use qcow2_core::format::extension::BitmapsExtension;
use qcow2_core::format::{FormatErrorKind, Geometry, Header, HostOffset};
use std::collections::BTreeSet;

/// What is wrong with the bitmaps of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapDamage {
    /// The index of the damaged bitmap in [`Qcow2Info::bitmaps`](super::Qcow2Info::bitmaps); `None` for the
    /// directory. The first damage of each bitmap is told.
    pub index: Option<usize>,
    /// Its kind.
    pub fault: BitmapFault,
    /// What was seen and what is allowed. May contain control characters of a name: escape it before
    /// printing.
    pub text: String,
}

/// A kind of damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BitmapFault {
    /// The directory ends inside an entry; what follows the bitmaps found is unknown.
    DirectoryCut,
    /// The directory ends past the end of the image.
    DirectoryPastEnd,
    /// The directory has more bitmaps than the header counts; those are left out.
    TooMany,
    /// The directory has fewer bitmaps than the header counts.
    TooFew,
    /// The bitmap has extra data.
    ExtraData,
    /// Its entry breaks a rule.
    Entry,
    /// It has no name. QEMU accepts it.
    Unnamed,
    /// A bitmap before it has the same name.
    SameName,
    /// Its table ends past the largest length of a file.
    TableOffset,
    /// Its table has an entry with reserved bits or an invalid offset.
    TableEntry,
    /// Its table ends past the end of the image. QEMU reads zeroes there.
    TablePastEnd,
    /// Its table has another length than the disk needs.
    TableLength,
    /// Its table was not read: the tables before it use up [`MAX_BITMAP_TABLES`].
    NotRead,
}

/// Limit for the tables of bitmaps that are read, in bytes. Those above it are not judged. Origin: ours; in a
/// sparse file they cost nothing.
pub const MAX_BITMAP_TABLES: u64 = 64 << 20;

/// Bytes of a table that are read at once.
const PIECE: u64 = 64 << 10;

type Found = (BitmapFault, String);

/// Reads and judges the bitmaps. None if another program has made the bitmaps extension stale. Disk: the
/// directory and the tables. Errors: `Open` for a storage that fails.
pub(super) fn read(storage: &dyn Storage, header: &Header) -> Result<(Vec<Bitmap>, Vec<BitmapDamage>)> {
    let Some(extension) = header.trusted_bitmaps() else { return Ok(Default::default()) };
    let geometry =
        header.geometry().map_err(|e| Error::new(ErrorKind::Metadata, "header is damaged").with_source(e))?;
    let len = storage.len().map_err(|e| opening("reading the size of the image", e.into()))?;
    let mut judge = Judge { storage, geometry, disk_size: header.disk_size(), len, tables: 0 };
    let (bitmaps, directory) = judge.directory(extension)?;
    let (mut damage, mut names) = (Vec::new(), BTreeSet::new());
    let mut push = |index, (fault, text)| damage.push(BitmapDamage { index, fault, text });
    let mut sound = Vec::new();
    for (index, bitmap) in bitmaps.iter().enumerate() {
        match judge.entry(bitmap) {
            Some(found) => push(Some(index), found),
            None => sound.push(index),
        }
    }
    if let Some(found) = directory {
        push(None, found);
    }
    for (index, bitmap) in bitmaps.iter().enumerate() {
        let known = !names.insert(&bitmap.name);
        if sound.binary_search(&index).is_err() {
            continue;
        }
        let found = match known {
            true => {
                Some((BitmapFault::SameName, format!("another bitmap has this name: {}", bitmap.name_text())))
            }
            false => judge.table(bitmap)?,
        };
        if let Some(found) = found {
            push(Some(index), found);
        }
    }
    Ok((bitmaps, damage))
}

struct Judge<'a> {
    storage: &'a dyn Storage,
    geometry: Geometry,
    disk_size: u64,
    /// Length of the image in bytes.
    len: u64,
    /// Bytes of tables read so far.
    tables: u64,
}

impl Judge<'_> {
    /// The bitmaps up to the count of the header or to the first entry that cannot be parsed, and what is
    /// wrong with the directory as a whole.
    fn directory(&self, extension: &BitmapsExtension) -> Result<(Vec<Bitmap>, Option<Found>)> {
        let (offset, size) = (extension.directory_offset, extension.directory_size);
        let there = size.min(self.len.saturating_sub(offset.value()));
        let bytes = read_up_to(self.storage, offset, usize::try_from(there).unwrap_or(usize::MAX))?;
        let past_end = (bytes.len() as u64) < size;
        let (mut bitmaps, mut rest) = (Vec::new(), &bytes[..]);
        let mut found = None;
        while !rest.is_empty() {
            if bitmaps.len() >= extension.count as usize {
                let text = format!("bitmap directory has more than {} bitmaps", extension.count);
                return Ok((bitmaps, Some((BitmapFault::TooMany, text))));
            }
            match Bitmap::parse(rest) {
                Ok((bitmap, len)) => {
                    bitmaps.push(bitmap);
                    rest = rest.get(len..).unwrap_or_default();
                }
                Err(error) => {
                    found = Some((BitmapFault::DirectoryCut, error.to_string()));
                    break;
                }
            }
        }
        let (fewer, counted) = (bitmaps.len() < extension.count as usize, extension.count);
        if past_end {
            let text = "bitmap directory ends past the end of the image".to_owned();
            found = Some((if fewer { BitmapFault::DirectoryPastEnd } else { BitmapFault::TooMany }, text));
        } else if fewer && found.is_none() {
            let text = format!("bitmap directory has {} bitmaps, the header counts {counted}", bitmaps.len());
            found = Some((BitmapFault::TooFew, text));
        }
        Ok((bitmaps, found))
    }

    fn entry(&self, bitmap: &Bitmap) -> Option<Found> {
        let error = bitmap.validate(&self.geometry, self.disk_size).err()?;
        let named = || Bitmap { name: b"?".to_vec(), ..bitmap.clone() };
        let fault = match error.kind() {
            FormatErrorKind::BitmapExtra(_) => BitmapFault::ExtraData,
            _ if bitmap.name.is_empty() && named().validate(&self.geometry, self.disk_size).is_ok() => {
                BitmapFault::Unnamed
            }
            _ => BitmapFault::Entry,
        };
        Some((fault, error.to_string()))
    }

    /// Judges the table, of a bitmap whose bits would be read.
    fn table(&mut self, bitmap: &Bitmap) -> Result<Option<Found>> {
        if bitmap.in_use {
            return Ok(None);
        }
        let (start, len) = (bitmap.table_offset.value(), u64::from(bitmap.table_entries) * 8);
        let about = |fault, what: &str| (fault, format!("bitmap '{}': {what}", bitmap.name_text()));
        if let Err(error) = bitmap.validate_table_place() {
            return Ok(Some((BitmapFault::TableOffset, error.to_string())));
        }
        let end = start.saturating_add(len);
        let there = end.min(self.len).saturating_sub(start);
        if there > MAX_BITMAP_TABLES - self.tables {
            let text = format!("table of {len} bytes was not looked at");
            return Ok(Some(about(BitmapFault::NotRead, &text)));
        }
        self.tables += there;
        if let Some(text) = self.broken_entry(start, there)? {
            return Ok(Some(about(BitmapFault::TableEntry, &text)));
        }
        Ok(match bitmap.validate_table_size(&self.geometry, self.disk_size) {
            Err(error) => Some((BitmapFault::TableLength, error.to_string())),
            Ok(()) if end > self.len => {
                let text = format!("table of {len} bytes at {start:#x} passes the end of the image");
                Some(about(BitmapFault::TablePastEnd, &text))
            }
            Ok(()) => None,
        })
    }

    /// What is wrong with the first invalid entry of a table.
    fn broken_entry(&self, start: u64, len: u64) -> Result<Option<String>> {
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(PIECE);
            let bytes = read_up_to(self.storage, HostOffset::new(start + done), piece as usize)?;
            for (index, word) in (done / 8..).zip(words(&bytes)) {
                if let Err(error) = BitmapTableEntry::decode(word, &self.geometry) {
                    return Ok(Some(format!("entry {index} of its table: {error}")));
                }
            }
            done += piece;
        }
        Ok(None)
    }
}
