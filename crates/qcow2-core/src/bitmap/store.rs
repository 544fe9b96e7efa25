//! Reads and stores bitmaps: the directory, tables and bits.
//!
//! Order on disk when storing: refcounts of the new clusters; barrier; bits, tables and a new directory in
//! new clusters; barrier; the header's extension; barrier; only then the old directory is freed, with the
//! tables and bits that the new one does not use. Setting an in-use flag changes the directory entry in
//! place: one bit in one sector.

use super::bits::Bits;
use super::room::Room;
use super::state::{Live, State};
use crate::error::{Error, ErrorKind, Result, TableKind};
use crate::image::Image;
use crate::meta::file::read_words;
use crate::meta::overlap::OverlapChecks;
use crate::meta::page::SECTOR_SIZE;
use crate::meta::pending::Unlinked;
use crate::port::storage::Storage;
use crate::rules::OrderingRule;
use crate::sync::write;
use ::alloc::collections::{BTreeMap, BTreeSet};
use ::alloc::format;
use ::alloc::vec;
use ::alloc::vec::Vec;
use qcow2_format::bitmap::{Bitmap, BitmapTableEntry};
use qcow2_format::bytes::table_bytes;
use qcow2_format::extension::BitmapsExtension;
use qcow2_format::text::text_of;
use qcow2_format::{FormatError, Geometry, Header, HostOffset};

/// Limit for the tables and bits of all bitmaps of an image on disk, in bytes: 128 bitmaps of the largest
/// size. Origin: ours; a sparse file can claim any amount for free, and reading it takes time all the same.
const MAX_STORED_BITS: u64 = 128 * qcow2_format::limit::MAX_BITMAP_DATA_SIZE;

/// Offset of the last byte of the flags in a directory entry, and the in-use flag in it.
const FLAGS_END: u64 = 15;
const IN_USE: u8 = 1;
/// Bytes of an entry before its extra data and name.
const FIXED_LEN: u64 = 24;

/// Reads the bitmap directory. Returns no bitmaps if the header's autoclear bit for bitmaps is not set.
/// Errors: `Corrupt` for a damaged directory, `Storage`.
pub fn read_bitmaps(storage: &dyn Storage, header: &Header) -> Result<Vec<Bitmap>> {
    let Some(extension) = header.trusted_bitmaps() else { return Ok(Vec::new()) };
    let directory = read_directory(storage, extension)?;
    let bitmaps = Bitmap::parse_directory(&directory, extension.count)
        .map_err(damaged("bitmap directory is damaged"))?;
    let geometry = header.geometry().map_err(damaged("header is damaged"))?;
    for bitmap in &bitmaps {
        bitmap.validate(&geometry, header.disk_size()).map_err(damaged("bitmap directory is damaged"))?;
    }
    Ok(bitmaps)
}

/// Checks that the bitmaps of an image can be read. If they cannot and one of them records, the first change
/// of the image clears the autoclear bit, which invalidates all of them. Disk: reads the directory and the
/// tables. Bitmaps whose in-use flag is set are not checked.
///
/// Errors: `Corrupt` for a damaged directory or table, and for tables that need more bytes than the file has,
/// since they then share clusters; `NoSpace` for bitmaps of more than 64 GiB; `Storage`.
pub fn check_bitmaps(storage: &dyn Storage, header: &Header) -> Result<()> {
    let geometry = header.geometry().map_err(damaged("header is damaged"))?;
    let mut bytes = 0;
    for bitmap in read_bitmaps(storage, header)?.iter().filter(|bitmap| !bitmap.in_use) {
        let needed = Bitmap::table_entries_for(&geometry, header.disk_size(), bitmap.granularity_bits);
        check_table_size(bitmap, needed.unwrap_or(0))?;
        let entries = u64::from(bitmap.table_entries);
        bytes += entries * 8;
        check_stored(storage, &geometry, bytes)?;
        for raw in read_words(storage, bitmap.table_offset, entries)? {
            let entry =
                BitmapTableEntry::decode(raw, &geometry).map_err(damaged("bitmap table is damaged"))?;
            if let BitmapTableEntry::Data(_) = entry {
                bytes += geometry.cluster_size();
            }
        }
        check_stored(storage, &geometry, bytes)?;
    }
    Ok(())
}

fn check_table_size(bitmap: &Bitmap, needed: u64) -> Result<()> {
    if u64::from(bitmap.table_entries) == needed {
        return Ok(());
    }
    let message = format!(
        "bitmap '{}' has {} table entries, its disk needs {needed}",
        bitmap.name_text().escape_debug(),
        bitmap.table_entries
    );
    Err(Error::corrupt(message).in_table(TableKind::BitmapTable).at_host(bitmap.table_offset))
}

/// Checks `bytes`, what the bitmaps so far need on disk, against the file's length and the limit.
fn check_stored(storage: &dyn Storage, geometry: &Geometry, bytes: u64) -> Result<()> {
    let len = storage.len()?.next_multiple_of(geometry.cluster_size());
    if bytes > len {
        let message = format!("bitmaps have {bytes} bytes or more in a file of {len}: they share clusters");
        return Err(Error::corrupt(message));
    }
    if bytes > MAX_STORED_BITS {
        let message = format!("bitmaps have {bytes} bytes or more on disk, allowed are {MAX_STORED_BITS}");
        return Err(Error::new(ErrorKind::NoSpace, message));
    }
    Ok(())
}

fn read_directory(storage: &dyn Storage, extension: &BitmapsExtension) -> Result<Vec<u8>> {
    let (offset, size) = (extension.directory_offset, extension.directory_size);
    if offset.checked_add(size).is_none_or(|end| end.value() > storage.len().unwrap_or(0)) {
        return Err(Error::corrupt("bitmap directory passes the end of the image")
            .in_table(TableKind::BitmapDirectory)
            .at_host(offset));
    }
    let mut directory = vec![0; size as usize];
    storage.read_padded(offset, &mut directory)?;
    Ok(directory)
}

fn damaged(what: &'static str) -> impl Fn(FormatError) -> Error {
    move |error| Error::corrupt(what).with_source(error)
}

impl Image {
    /// Reads the bits of `bitmap`, which [`check_bitmaps`] has accepted. Memory is taken from `room`. Errors:
    /// `NoSpace` if it does not suffice; `Corrupt`, `Storage`.
    pub(super) fn read_bits(&self, bitmap: &Bitmap, room: &Room) -> Result<Bits> {
        let geometry = self.file.geometry();
        let bits = Bits::new(bitmap.granularity_bits, self.size(), room)?;
        let entries = geometry.clusters_for(bits.stored_len());
        check_table_size(bitmap, entries)?;
        let size = geometry.cluster_size();
        let mut cluster = vec![0; size as usize];
        // A run of all-ones clusters is set in one call, so that a fully set node of the tree takes no
        // memory.
        let mut ones = 0..0;
        for (index, raw) in (0u64..).zip(read_words(self.file.storage(), bitmap.table_offset, entries)?) {
            let entry =
                BitmapTableEntry::decode(raw, geometry).map_err(damaged("bitmap table is damaged"))?;
            let exact = match entry {
                BitmapTableEntry::Zeroes => true,
                BitmapTableEntry::Ones if ones.end == index => {
                    ones.end += 1;
                    true
                }
                BitmapTableEntry::Ones => {
                    let before = core::mem::replace(&mut ones, index..index + 1);
                    bits.load_ones(before.start * size, (before.end - before.start) * size)
                }
                BitmapTableEntry::Data(host) => {
                    self.file.storage().read_padded(host, &mut cluster)?;
                    bits.load(index * size, &cluster)
                }
            };
            if !exact {
                return Err(self.bitmaps.no_room(&bitmap.name));
            }
        }
        match bits.load_ones(ones.start * size, (ones.end - ones.start) * size) {
            true => Ok(bits),
            false => Err(self.bitmaps.no_room(&bitmap.name)),
        }
    }

    /// Sets the in-use flag on disk of the bitmaps that `pick` accepts, and of bitmaps that were removed in
    /// memory. Durable when it returns.
    pub(super) fn mark_in_use(&self, state: &mut State, pick: impl Fn(&Live) -> bool) -> Result<()> {
        let header = self.header();
        let Some(extension) = header.trusted_bitmaps() else { return Ok(()) };
        let mut directory = read_directory(self.file.storage(), extension)?;
        let entries = Bitmap::parse_directory(&directory, extension.count)
            .map_err(damaged("bitmap directory is damaged"))?;
        // Of bitmaps with the same table the first one wins; only a damaged image has such bitmaps.
        let by_table = state.live.iter_mut().rev().map(|live| (live.entry.table_offset, live));
        let mut ours: BTreeMap<HostOffset, &mut Live> = by_table.collect();
        let mut at = 0;
        let mut sectors: Vec<u64> = Vec::new();
        for entry in entries {
            let stale = match ours.get_mut(&entry.table_offset) {
                Some(live) if pick(live) => {
                    live.marked = true;
                    true
                }
                Some(_) => false,
                None => true,
            };
            let flags = at + FLAGS_END;
            if stale && !entry.in_use {
                directory[flags as usize] |= IN_USE;
                sectors.push(flags / SECTOR_SIZE);
            }
            at += (FIXED_LEN + (entry.name.len() + entry.extra.len()) as u64).next_multiple_of(8);
        }
        sectors.dedup();
        for sector in &sectors {
            let start = (sector * SECTOR_SIZE) as usize;
            let bytes = &directory[start..directory.len().min(start + SECTOR_SIZE as usize)];
            let place = HostOffset::new(extension.directory_offset.value() + sector * SECTOR_SIZE);
            let written = self.tables.write(OverlapChecks::BITMAP_DIRECTORY, place, bytes);
            self.file.poison_on_error(written)?;
        }
        // Durable before the first change: otherwise a crash could leave stale bits that look valid.
        if !sectors.is_empty() && self.file.keeps(OrderingRule::WarningBeforeChange) {
            self.file.poison_on_error(self.file.flush())?;
        }
        Ok(())
    }

    /// Stores the changed bitmaps when the image is closed. All other changes are on disk already.
    pub(crate) fn store_bitmaps(&self) -> Result<()> {
        let mut state = write(&self.bitmaps.state);
        if !state.changed && !state.live.iter().any(|live| live.changed || live.marked) {
            return Ok(());
        }
        let header = self.header();
        let old = read_bitmaps(self.file.storage(), &header)?;
        let first = state.live.iter().find(|live| live.changed && live.bits.is_some());
        let first = first.map(|live| text_of(&live.entry.name));
        let lost = |error: Error| match &first {
            Some(name) => error.losing_bitmap(name),
            None => error,
        };
        let mut new = Stored::default();
        let freed = self
            .reserve_bitmaps(&mut state, &mut new)
            .and_then(|()| self.replaced_bitmaps(&header, &old, &state))
            .and_then(|freed| self.flusher.flush().map(|()| freed));
        let freed = match freed {
            Ok(freed) => freed,
            Err(error) => {
                new.places.iter().for_each(|&run| self.refcounts.unlink(run));
                if !self.file.is_poisoned() {
                    self.flusher.settle()?;
                }
                return Err(lost(error));
            }
        };
        self.file.poison_on_error(self.write_bitmaps(&state, &new)).map_err(lost)?;
        self.header.set_bitmaps_extension(new.extension)?;
        // Another change of the image must set the in-use flags again first.
        self.header.set_changing(false);
        // Only now: until the header has switched, a crash leaves the old directory.
        freed.into_iter().for_each(|run| self.refcounts.unlink(run));
        state.live.iter_mut().for_each(|live| (live.changed, live.marked) = (false, false));
        state.changed = false;
        self.flusher.settle()?;
        self.pad_file()
    }

    /// Reserves clusters for the bits and tables of all changed bitmaps, and for a directory of all bitmaps.
    fn reserve_bitmaps(&self, state: &mut State, new: &mut Stored) -> Result<()> {
        let geometry = self.file.geometry();
        for (index, live) in state.live.iter_mut().enumerate() {
            let bits = match &live.bits {
                Some(bits) if live.changed => bits,
                _ => continue,
            };
            let size = geometry.cluster_size();
            let mixed = bits.marked_pieces(size).filter(|(_, all)| !all);
            let places = mixed.map(|_| self.reserve_area(size, new)).collect::<Result<_>>()?;
            let entries = geometry.clusters_for(bits.stored_len()).max(1);
            live.entry.table_offset = self.reserve_area(entries * 8, new)?;
            live.entry.table_entries = entries as u32;
            new.bits.push((index, places));
        }
        for live in &state.live {
            live.entry.encode(&mut new.directory).map_err(damaged("bitmap cannot be stored"))?;
        }
        let size = new.directory.len() as u64;
        if size > qcow2_format::limit::MAX_BITMAP_DIRECTORY_SIZE {
            return Err(Error::new(ErrorKind::NoSpace, "bitmap directory would be larger than allowed"));
        }
        if size > 0 {
            let directory_offset = self.reserve_area(size, new)?;
            let count = state.live.len() as u32;
            new.extension =
                Some(BitmapsExtension { count, reserved: 0, directory_size: size, directory_offset });
        }
        Ok(())
    }

    fn reserve_area(&self, len: u64, new: &mut Stored) -> Result<HostOffset> {
        let clusters = self.file.geometry().clusters_for(len);
        let offset = self.refcounts.allocate_metadata(OverlapChecks::BITMAP_DIRECTORY, clusters)?.offset;
        new.places.push(self.bitmap_run(offset, len));
        Ok(offset)
    }

    fn write_bitmaps(&self, state: &State, new: &Stored) -> Result<()> {
        let size = self.file.geometry().cluster_size();
        for (index, places) in &new.bits {
            let live = &state.live[*index];
            let Some(bits) = &live.bits else { continue };
            let mut table = vec![0; live.entry.table_entries as usize];
            let mut places = places.iter();
            // The state is locked, so the bits are the same as when the clusters were reserved.
            for (index, all) in bits.marked_pieces(size) {
                let place = if all { None } else { places.next() };
                let entry = match place {
                    Some(&host) => {
                        self.tables.write(
                            OverlapChecks::BITMAP_DIRECTORY,
                            host,
                            &bits.stored(index * size, size),
                        )?;
                        BitmapTableEntry::Data(host)
                    }
                    None => BitmapTableEntry::Ones,
                };
                table[index as usize] = entry.encode();
            }
            assert!(places.next().is_none(), "bitmap {index} has more reserved clusters than it needs");
            let bytes = table_bytes(table);
            self.tables.write(OverlapChecks::BITMAP_DIRECTORY, live.entry.table_offset, &bytes)?;
        }
        if let Some(extension) = new.extension {
            let at = extension.directory_offset;
            self.tables.write(OverlapChecks::BITMAP_DIRECTORY, at, &new.directory)?;
        }
        // The header extension is the switch: the new directory and everything below must be durable before.
        if self.file.keeps(OrderingRule::BitmapsBeforeHeader) {
            self.file.flush()?;
        }
        Ok(())
    }

    /// The clusters that the new directory replaces: the old directory, and the tables and bits that the new
    /// one does not use. Errors: `Corrupt` if one of them holds other metadata.
    pub(super) fn replaced_bitmaps(
        &self,
        header: &Header,
        old: &[Bitmap],
        state: &State,
    ) -> Result<Vec<Unlinked>> {
        let geometry = self.file.geometry();
        let mut replaced = Vec::new();
        // Bitmaps of a damaged image may share a table, which is freed once.
        let mut kept: BTreeSet<HostOffset> = state.live.iter().map(|live| live.entry.table_offset).collect();
        for bitmap in old {
            if !kept.insert(bitmap.table_offset) {
                continue;
            }
            let entries = u64::from(bitmap.table_entries);
            for raw in read_words(self.file.storage(), bitmap.table_offset, entries)? {
                if let Ok(BitmapTableEntry::Data(host)) = BitmapTableEntry::decode(raw, geometry) {
                    replaced.push(self.bitmap_run(host, geometry.cluster_size()));
                }
            }
            replaced.push(self.bitmap_run(bitmap.table_offset, entries * 8));
        }
        if let Some(extension) = header.trusted_bitmaps() {
            replaced.push(self.bitmap_run(extension.directory_offset, extension.directory_size));
        }
        replaced.iter().try_for_each(|&run| self.refcounts.check_freeable(run))?;
        Ok(replaced)
    }

    fn bitmap_run(&self, offset: HostOffset, len: u64) -> Unlinked {
        self.tables.run_of(OverlapChecks::BITMAP_DIRECTORY, offset, len)
    }
}

/// What is going to be written.
#[derive(Default)]
struct Stored {
    /// All reserved clusters.
    places: Vec<Unlinked>,
    /// For each changed bitmap its index, and the host offsets for its clusters of bits that are neither all
    /// clear nor all set.
    bits: Vec<(usize, Vec<HostOffset>)>,
    directory: Vec<u8>,
    extension: Option<BitmapsExtension>,
}
