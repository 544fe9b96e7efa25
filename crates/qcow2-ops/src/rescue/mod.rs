//! Reads what can be read of an image that nothing else opens any more: without its header, L1 table, L2
//! tables, snapshot table, or the end of its file. Nothing is written to it.
//!
//! | step | file | what |
//! |---|---|---|
//! | 1 | `evidence` | the header, or cluster size and kind of entries by what the file holds |
//! | 2 | `counts` | the refcounts, if a structure counts itself: which tables are in use, which are old |
//! | 3 | `tables` | clusters that have the shape of tables, where nothing known leads |
//! | 4 | `place`, `anchor`, `border`, `landmarks` | which range each L2 table maps |
//! | 5 | `disk` | a disk that reads as the image did, and as zeroes where it cannot |
//!
//! Where the L1 table is whole, nothing is guessed. What is guessed is reported as such, and what is lost
//! with the reason. Each table and each stream is read where it is used once; memory is bounded by the named
//! limits, whatever the file holds.

mod anchor;
mod border;
mod counts;
mod disk;
mod entry;
mod evidence;
mod job;
mod landmarks;
mod marks;
mod place;
mod report;
mod tables;
#[cfg(test)]
mod tests;
mod text;

pub use disk::RescuedDisk;
pub use report::{Evidence, HeaderSource, L1Source, MAX_RANGES, Range, Ranges, Reason, RescueReport};

use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use disk::Files;
use job::{Bytes, Job, Known, failed, go_on, storage};
use marks::Marks;
use place::{Place, Placement, Slot};
use qcow2_core::walk::{Owner, Walk, overlay};
use qcow2_core::{ClusterCipher, Codecs, EncryptedLayer, GuestDisk, HostOffset, Keyring, Storage};
use qcow2_format::bitmap::BitmapTableEntry;
use qcow2_format::feature::IncompatibleFeatures;
use qcow2_format::limit::MAX_DISK_SIZE;
use qcow2_format::{CryptMethod, Header, bytes};
use std::cell::RefCell;
use std::sync::Arc;

/// What a rescue reads. No name inside the image is followed: what it stands on has to be given.
#[derive(Clone)]
#[non_exhaustive]
pub struct RescueFiles<'a> {
    /// The image file.
    pub image: Arc<dyn Storage>,
    /// Its external data file.
    pub data: Option<Arc<dyn Storage>>,
    /// The disk of its backing file.
    pub backing: Option<Arc<dyn GuestDisk>>,
    /// How compressed clusters are expanded.
    pub codecs: Codecs,
    /// The keys of an encrypted image, and the image's name for messages.
    pub keys: Option<(&'a dyn Keyring, &'a str)>,
}

impl RescueFiles<'_> {
    /// The image in `image`, on its own.
    pub fn new(image: Arc<dyn Storage>, codecs: Codecs) -> Self {
        Self { image, data: None, backing: None, codecs, keys: None }
    }
}

/// What the caller knows better than the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RescueOptions {
    /// Bytes of a cluster. A header with another one is not believed.
    pub cluster_size: Option<u64>,
    /// Bytes of the disk.
    pub size: Option<u64>,
    /// Where the L1 table is: another one than the header says, a snapshot's for example.
    pub l1_table: Option<HostOffset>,
}

/// Bytes of a bitmap's table that are read at once.
const TABLE_PIECE: u64 = 1 << 16;

/// What is left of an image.
pub struct Rescue {
    disk: Arc<RescuedDisk>,
    report: RescueReport,
}

impl Rescue {
    /// The disk, for [`convert`](crate::convert::convert()) for example.
    pub fn disk(&self) -> Arc<dyn GuestDisk> {
        Arc::clone(&self.disk) as _
    }

    /// What was found, with what reading the disk has shown to be lost until now.
    pub fn report(&self) -> RescueReport {
        let mut report = self.report.clone();
        report.lost = self.disk.with_losses(&report.lost);
        report
    }
}

/// Finds what is left of an image. Disk: reads every table; where some are missing the beginning of each
/// cluster that no table leads to. Never writes. Memory: at most 16 bytes for each L1 entry, 64 for each
/// cluster that can be a table, and a bit for each cluster in use, each below a named limit.
///
/// Errors: `Metadata` if nothing in the file tells the cluster size, or the storage has no length;
/// `InvalidOption`; `Open` for a missing key; `Stopped`.
pub fn rescue(files: &RescueFiles<'_>, options: &RescueOptions, progress: &dyn Progress) -> Result<Rescue> {
    let bytes = Bytes::new(&*files.image)?;
    let (mut header, source) = evidence::header(bytes, options, progress)?;
    if files.data.is_some() {
        header.features.incompatible.set(IncompatibleFeatures::DATA_FILE, true);
    }
    let format = header.l2_format().map_err(failed)?;
    check_l1_offset(options, 1 << header.cluster_bits, bytes.len)?;
    let size = match (options.size, source) {
        (None, HeaderSource::Derived) => None,
        (None, HeaderSource::Found) => Some(header.disk_size()),
        (Some(size), _) => Some(size),
    };
    if size.is_some_and(|size| size > MAX_DISK_SIZE) {
        return Err(Error::new(ErrorKind::InvalidOption, format!("size is above {MAX_DISK_SIZE} bytes")));
    }
    let data_len = match (&files.data, format.external_data) {
        (Some(data), _) => data.len().map_err(storage)?,
        (None, true) => u64::MAX,
        (None, false) => bytes.len,
    };
    let cipher = unlock(files, &header)?;
    let known = Known { format, image_len: bytes.len, data_len, metadata: Marks::default() };
    let mut job = Job {
        bytes,
        header,
        known,
        counts: None,
        tables: Marks::default(),
        mapped: Marks::default(),
        worths: RefCell::default(),
        extent: RefCell::new((0..0, true)),
        progress,
    };
    let older = job.note_metadata(source)?;
    let entries = size.map(|size| format.geometry.l1_entries_for(size));
    let l1 = job.l1_place(options, source, entries);
    let placement = job.place(l1, &older, entries)?;
    let mut report = job.first_report(source, size, &placement);
    let leaky = job.has_lost_tables(&placement.slots)?;
    let whole = source == HeaderSource::Found;
    let files = Files {
        image: Arc::clone(&files.image),
        data: files.data.clone(),
        backing: files.backing.clone(),
        is_overlay: job.header.backing_file.is_some(),
        codecs: files.codecs.clone(),
        compression: whole.then_some(job.header.compression_type),
        cipher,
        encrypted: job.header.crypt_method != CryptMethod::None,
    };
    let mut disk = RescuedDisk::new(files, job.known, report.size, placement);
    disk.leaky = leaky;
    report.lost = disk.lost(&|| go_on(progress))?;
    let past_end = |reason| matches!(reason, Reason::PastEnd | Reason::TablePastEnd);
    if report.lost.listed.iter().any(|range| past_end(range.what)) {
        disk.cut = true;
        report.lost = disk.lost(&|| go_on(progress))?;
    }
    note_places(&disk, format.geometry.l2_coverage(), &mut report);
    Ok(Rescue { disk: Arc::new(disk), report })
}

/// An L1 table that is named must be one that can be: elsewhere all entries would be taken out of noise.
fn check_l1_offset(options: &RescueOptions, cluster_size: u64, len: u64) -> Result<()> {
    let Some(at) = options.l1_table.map(HostOffset::value) else { return Ok(()) };
    if at != 0 && at.is_multiple_of(cluster_size) && at < len {
        return Ok(());
    }
    let text =
        format!("l1 table at {at:#x}: allowed are multiples of {cluster_size} above 0 and below {len}");
    Err(Error::new(ErrorKind::InvalidOption, text))
}

/// The cipher of an encrypted image; `None` without keys. Errors: `Open`.
fn unlock(files: &RescueFiles<'_>, header: &Header) -> Result<Option<Arc<dyn ClusterCipher>>> {
    let Some((keys, name)) = files.keys.filter(|_| header.crypt_method != CryptMethod::None) else {
        return Ok(None);
    };
    let luks = header.extensions.luks;
    let layer = EncryptedLayer::new((0, name), header.crypt_method, luks, &*files.image);
    let unlocked = keys.unlock(&layer);
    unlocked.map(Some).map_err(|e| Error::new(ErrorKind::Open, "unlocking the image").with_source(e))
}

/// Reports the tables whose ranges are known by something else than the L1 table.
fn note_places(disk: &RescuedDisk, coverage: u64, report: &mut RescueReport) {
    let mut start = 0u64;
    for slot in disk.slots() {
        let end = start.saturating_add(coverage).min(report.size);
        match slot {
            Slot::Table(table, evidence) if *evidence != Evidence::L1 => {
                report.placed.push(start, end.saturating_sub(start), (*evidence, *table));
            }
            _ => {}
        }
        start = end;
    }
}

impl Job<'_> {
    /// The report before anything of the disk is looked at. `size`: of the disk, if it is known.
    fn first_report(&self, header: HeaderSource, size: Option<u64>, placement: &Placement) -> RescueReport {
        let (geometry, slots) = (self.known.format.geometry, &placement.slots);
        let used = slots.iter().rposition(|slot| *slot != Slot::None).map_or(0, |last| last as u64 + 1);
        let reach = used.saturating_mul(geometry.l2_coverage()).min(MAX_DISK_SIZE);
        let (unplaced, clusters) = placement.unplaced;
        RescueReport {
            header,
            cluster_size: geometry.cluster_size(),
            extended_l2: geometry.extended_l2(),
            size: size.unwrap_or(reach),
            size_known: size.is_some(),
            refcounts: self.counts.is_some(),
            l1: placement.l1,
            other_l1: placement.other_l1.clone(),
            tables: slots.iter().filter(|slot| matches!(slot, Slot::Table(..))).count() as u64,
            unplaced: (unplaced, clusters.saturating_mul(geometry.cluster_size())),
            lost: Ranges::default(),
            placed: Ranges::default(),
        }
    }

    /// Takes the clusters of all metadata that is known by the header, and the refcounts. Returns the L1
    /// tables of snapshots.
    fn note_metadata(&mut self, source: HeaderSource) -> Result<Vec<Place>> {
        self.known.metadata.insert(0);
        self.use_counts(&self.header.clone())?;
        if source == HeaderSource::Derived {
            return Ok(Vec::new());
        }
        let header = self.header.clone();
        let walk = Walk::new(self.bytes.storage, &header).map_err(failed)?;
        let mut runs: Vec<(HostOffset, u64)> = walk
            .header_references()
            .filter(|place| matches!(place.owner, Owner::Luks | Owner::BitmapDirectory))
            .map(|place| (place.offset, place.len))
            .collect();
        // A table that cannot be read tells nothing.
        let bitmaps = walk.bitmaps().map(|(tables, _)| tables).unwrap_or_default();
        for table in overlay(&bitmaps) {
            runs.push((table.offset, table.len));
            self.note_bits(table.offset, table.len)?;
        }
        let mut older = Vec::new();
        if let Ok(Some(table)) = walk.snapshots(&mut |_| {}) {
            runs.push((header.snapshots_offset, table.len));
            older.extend(table.l1_tables.into_iter().map(|table| (table.offset, table.entries)));
        }
        for (at, len) in runs {
            self.known.metadata.insert_each(self.known.clusters(at, len));
        }
        Ok(older)
    }

    /// Takes the clusters with the bits of bitmaps, whose tables are the `len` bytes at `at`. They are noted
    /// as mapped, not as metadata: a table may be damaged and lead to the guest's data, which is to be read.
    fn note_bits(&mut self, at: HostOffset, len: u64) -> Result<()> {
        let end = at.value().saturating_add(len).min(self.bytes.len);
        let mut content = vec![0; TABLE_PIECE as usize];
        for start in (at.value()..end).step_by(TABLE_PIECE as usize) {
            self.go_on()?;
            let piece = &mut content[..(end - start).min(TABLE_PIECE) as usize];
            self.bytes.read(HostOffset::new(start), piece)?;
            for raw in bytes::words(piece) {
                if let Ok(BitmapTableEntry::Data(bits)) =
                    BitmapTableEntry::decode(raw, &self.known.format.geometry)
                {
                    self.mapped.insert_each(self.known.clusters(bits, 1));
                }
            }
        }
        Ok(())
    }

    /// Where the L1 table should be.
    fn l1_place(&self, options: &RescueOptions, source: HeaderSource, entries: Option<u64>) -> Option<Place> {
        let named = match source {
            HeaderSource::Found => Some((self.header.l1_table_offset, u64::from(self.header.l1_size))),
            HeaderSource::Derived => None,
        };
        match (options.l1_table, named) {
            (Some(at), named) => {
                let most = self.known.format.geometry.cluster_size() / 8;
                Some((at, entries.or(named.map(|(_, entries)| entries)).unwrap_or(most)))
            }
            (None, named) => named.filter(|(_, entries)| *entries > 0),
        }
    }

    /// Whether an L2 table of zeroes was one with entries: clusters are in use that no table maps.
    fn has_lost_tables(&self, slots: &[Slot]) -> Result<bool> {
        Ok(slots.iter().any(|slot| matches!(slot, Slot::Empty(_))) && self.has_leaks()?)
    }

    /// Whether clusters are in use by the refcounts and by nothing else that is known.
    fn has_leaks(&self) -> Result<bool> {
        let Some(counts) = &self.counts else { return Ok(false) };
        for cluster in 0..self.known.format.geometry.clusters_for(self.bytes.len) {
            let known = self.mapped.contains(cluster) || self.known.metadata.contains(cluster);
            if !known && counts.count(cluster)?.is_some_and(|count| count > 0) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
