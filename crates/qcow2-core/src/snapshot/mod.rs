//! Internal snapshots: taken, applied, deleted, and opened as disks of their own.
//!
//! A snapshot is an L1 table, a size and a name; everything below the table is shared by refcount. Each change is: what
//! is needed elsewhere, barrier, one sector of the header, barrier, and then what is no longer needed is freed. A crash
//! leaves the snapshot there or not there, the disk as before or as in the snapshot, and at worst leaked clusters and
//! copied flags that are more careful than they need be. Spec: "Snapshots".

mod disk;
mod table;

pub use table::read_snapshots;

use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::meta::bulk::{Tree, table_bytes};
use crate::meta::header::Field;
use crate::open::read_words;
use crate::port::disk::GuestDisk;
use crate::rules::OrderingRule;
use crate::sync::atomic::Ordering;
use crate::sync::{read, write};
use ::alloc::format;
use ::alloc::string::ToString;
use ::alloc::vec::Vec;
use qcow2_format::HostOffset;
use qcow2_format::limit::{MAX_L1_ENTRIES, MAX_SNAPSHOTS};
use qcow2_format::snapshot::Snapshot;
use table::{NewTable, Table};

/// What is recorded of a snapshot when it is taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NewSnapshot {
    /// Its name: any bytes, may be empty and need not be unique; at most 65535 bytes.
    pub name: Vec<u8>,
    /// The time, in seconds since 1970.
    pub date_seconds: u32,
    /// The fraction of that second, in nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// How many instructions the guest had executed, where that is known.
    pub icount: Option<u64>,
}

impl Image {
    /// The image's snapshots, in the order of the table. Errors: `Corrupt` for a damaged table, `Storage`.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let _structure = read(&self.structure);
        read_snapshots(&*self.meta.storage, &self.header())
    }

    /// Takes a snapshot of the disk as it is now. Its id is one more than the largest number among the others'. Waits for
    /// requests under way and holds others back meanwhile.
    ///
    /// Disk: everything flushed; refcounts of all that the active L1 table leads to raised, copied flags cleared, a copy
    /// of the table and a new snapshot table written; barrier; the header; barrier. Errors: `Unsupported` with an external
    /// data file; `NoSpace` for more than 65536 snapshots or where a refcount cannot be raised, nothing having changed;
    /// `Corrupt` for damaged tables; `ReadOnly`, `Poisoned`, `Storage`.
    pub fn create_snapshot(&self, new: &NewSnapshot) -> Result<Snapshot> {
        let _alone = write(&self.structure);
        let mut table = self.begin_snapshot_change()?;
        if table.snapshots.len() as u64 >= u64::from(MAX_SNAPSHOTS) {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("image has {MAX_SNAPSHOTS} snapshots already"),
            ));
        }
        let meta = &self.meta;
        let header = self.header();
        let (_, entries) = meta.l1.contents();
        let tree = Tree::new(&entries, &meta.geometry)?;
        let copy = self.reserve_l1(entries.len())?;
        let snapshot = Snapshot {
            l1_table_offset: copy,
            l1_size: header.l1_size,
            id: next_id(&table.snapshots).to_string().into_bytes(),
            name: new.name.clone(),
            date_seconds: new.date_seconds,
            date_nanoseconds: new.date_nanoseconds,
            vm_clock_nanoseconds: new.vm_clock_nanoseconds,
            vm_state_size: 0,
            disk_size: self.size(),
            icount: new.icount,
            unknown_extra: Vec::new(),
        };
        table.snapshots.push(snapshot.clone());
        let len = entries.len() as u64 * 8;
        let new_table = match meta.reserve_snapshot_table(&table.snapshots) {
            Ok(new_table) => new_table,
            Err(error) => return self.abandon(&[(copy, len)], error),
        };
        if let Err(error) = meta.flush().and_then(|()| meta.raise_tree(&tree)) {
            return self.abandon(&[(copy, len), new_table.place()], error);
        }
        meta.poison_on_error(self.write_snapshot(&tree, entries, copy, &new_table))?;
        meta.unlink_table(header.snapshots_offset, table.len);
        self.finish()?;
        Ok(snapshot)
    }

    fn write_snapshot(
        &self,
        tree: &Tree,
        mut entries: Vec<u64>,
        copy: HostOffset,
        table: &NewTable,
    ) -> Result<()> {
        let meta = &self.meta;
        meta.clear_copied(tree)?;
        let (active, _) = meta.l1.contents();
        entries.iter_mut().for_each(|raw| *raw &= !COPIED);
        let bytes = table_bytes(&entries);
        if self.meta.rules.keep(OrderingRule::CopiedClearedBeforeSnapshot) {
            meta.storage.write_at(active, &bytes)?;
        }
        meta.storage.write_at(copy, &bytes)?;
        meta.l1.replace(active, entries);
        meta.switch_snapshot_table(table)
    }

    /// Makes the disk what it was when `snapshot`, one of [`snapshots`](Self::snapshots), was taken, its size included.
    /// The snapshot stays. Machine state stays where it is.
    ///
    /// Disk: everything flushed; refcounts of all that the snapshot leads to raised; a new active L1 table elsewhere;
    /// barrier; the header's size and L1 table in one sector; barrier; what only the old disk had is freed. Errors:
    /// `NotFound`; `Unsupported` with an external data file, with persistent bitmaps, or for another size in version 2;
    /// otherwise as [`create_snapshot`](Self::create_snapshot).
    pub fn apply_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let _alone = write(&self.structure);
        let meta = &self.meta;
        let size = snapshot.disk_size & !511;
        meta.check_writable()?;
        self.check_applicable(snapshot, size)?;
        find(&self.begin_snapshot_change()?, snapshot)?;
        self.begin_change()?;
        let mut entries = self.snapshot_l1(snapshot)?;
        let tree = Tree::new(&entries, &meta.geometry)?;
        let (old_offset, old_entries) = meta.l1.contents();
        let old_tree = Tree::new(&old_entries, &meta.geometry)?;
        let needed = meta.geometry.l1_entries_for(size).max(old_entries.len() as u64);
        entries.resize(entries.len().max(needed as usize), 0);
        entries.iter_mut().for_each(|raw| *raw &= !COPIED);
        let l1 = self.reserve_l1(entries.len())?;
        if let Err(error) = meta.flush().and_then(|()| meta.raise_tree(&tree)) {
            return self.abandon(&[(l1, entries.len() as u64 * 8)], error);
        }
        meta.poison_on_error(self.switch_disk(&tree, l1, entries, size))?;
        meta.poison_on_error(meta.lower_tree(&old_tree, None))?;
        tree.offsets().for_each(|table| meta.note_metadata(meta.geometry.host_cluster(table).value(), 1));
        meta.unlink_table(old_offset, old_entries.len() as u64 * 8);
        self.finish()
    }

    fn switch_disk(&self, tree: &Tree, l1: HostOffset, entries: Vec<u64>, size: u64) -> Result<()> {
        let meta = &self.meta;
        meta.clear_copied(tree)?;
        meta.storage.write_at(l1, &table_bytes(&entries))?;
        if meta.rules.keep(OrderingRule::SnapshotBeforeHeader) {
            meta.storage.flush()?;
        }
        let count = entries.len() as u32;
        meta.update_header(&[Field::Size(size), Field::L1 { entries: count, offset: l1 }])?;
        meta.l1.replace(l1, entries);
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn check_applicable(&self, snapshot: &Snapshot, size: u64) -> Result<()> {
        let unsupported = |message| Err(Error::new(ErrorKind::Unsupported, message));
        if self.header().trusted_bitmaps().is_some() {
            return unsupported("image has persistent bitmaps, which do not go back in time");
        }
        if size != self.size() && !self.meta.l2_format.zero_flag {
            return unsupported("a version 2 image cannot go back to a snapshot of another size");
        }
        check_size(snapshot, &self.meta.geometry)
    }

    /// Deletes `snapshot`, one of [`snapshots`](Self::snapshots). What only it had is freed and given back to the storage.
    ///
    /// Disk: everything flushed; a new snapshot table; barrier; the header; barrier; refcounts lowered and copied flags set
    /// where a cluster has one reference left; barrier. Errors: `NotFound`; otherwise as
    /// [`create_snapshot`](Self::create_snapshot).
    pub fn delete_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let _alone = write(&self.structure);
        let mut table = self.begin_snapshot_change()?;
        let index = find(&table, snapshot)?;
        let meta = &self.meta;
        let old_offset = self.header().snapshots_offset;
        let tree = Tree::new(&self.snapshot_l1(snapshot)?, &meta.geometry)?;
        table.snapshots.remove(index);
        let new_table = meta.reserve_snapshot_table(&table.snapshots)?;
        meta.flush()?;
        if meta.rules.keep(OrderingRule::UnlinkBeforeFree) {
            meta.poison_on_error(meta.switch_snapshot_table(&new_table))?;
        }
        let (l1_offset, mut entries) = meta.l1.contents();
        meta.poison_on_error(meta.lower_tree(&tree, Some(&mut entries)))?;
        if !meta.rules.keep(OrderingRule::UnlinkBeforeFree) {
            meta.poison_on_error(meta.switch_snapshot_table(&new_table))?;
        }
        let written = meta.storage.write_at(l1_offset, &table_bytes(&entries));
        meta.poison_on_error(written.map_err(Error::from))?;
        meta.l1.replace(l1_offset, entries);
        meta.unlink_table(snapshot.l1_table_offset, u64::from(snapshot.l1_size) * 8);
        meta.unlink_table(old_offset, table.len);
        self.finish()
    }

    /// Writes the snapshot table anew, with everything in each entry that version 3 wants.
    pub(crate) fn rewrite_snapshot_table(&self) -> Result<()> {
        let table = self.begin_snapshot_change()?;
        let (meta, old_offset) = (&self.meta, self.header().snapshots_offset);
        let new_table = meta.reserve_snapshot_table(&table.snapshots)?;
        meta.flush()?;
        meta.poison_on_error(meta.switch_snapshot_table(&new_table))?;
        meta.unlink_table(old_offset, table.len);
        self.finish()
    }

    /// What every change begins with: all tables on disk, nothing waiting to be freed, the snapshot table known.
    fn begin_snapshot_change(&self) -> Result<Table> {
        self.meta.check_writable()?;
        if self.meta.has_data_file() {
            let message = "an image with an external data file has no snapshots";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let table = Table::read(&*self.meta.storage, &self.header())?;
        self.meta.settle()?;
        Ok(table)
    }

    /// What every change ends with: what was unlinked is free, on disk too.
    fn finish(&self) -> Result<()> {
        self.meta.settle()?;
        self.meta.pad_file()
    }

    /// Room for an L1 table; a table without entries is nowhere.
    fn reserve_l1(&self, entries: usize) -> Result<HostOffset> {
        match self.meta.geometry.clusters_for(entries as u64 * 8) {
            0 => Ok(HostOffset::new(0)),
            clusters => Ok(self.meta.allocate_with_space(clusters)?.offset),
        }
    }

    /// Gives back what was reserved for a change that cannot be made because of `error`.
    fn abandon<T>(&self, places: &[(HostOffset, u64)], error: Error) -> Result<T> {
        places.iter().for_each(|&(offset, len)| self.meta.unlink_table(offset, len));
        if !self.meta.poisoned.load(Ordering::Acquire) {
            self.finish()?;
        }
        Err(error)
    }

    /// The raw entries of a snapshot's L1 table.
    fn snapshot_l1(&self, snapshot: &Snapshot) -> Result<Vec<u64>> {
        check_l1(snapshot, &self.meta.geometry)?;
        read_words(&*self.meta.storage, snapshot.l1_table_offset, u64::from(snapshot.l1_size))
    }
}

/// Judges where a snapshot's L1 table is said to be.
fn check_l1(snapshot: &Snapshot, geometry: &qcow2_format::Geometry) -> Result<()> {
    let (offset, entries) = (snapshot.l1_table_offset, u64::from(snapshot.l1_size));
    let end = offset.checked_add(entries * 8);
    if entries > MAX_L1_ENTRIES || !geometry.is_aligned(offset.value()) || end.is_none() {
        return Err(Error::corrupt(format!(
            "snapshot '{}': l1 table of {entries} entries at {offset}, allowed are {MAX_L1_ENTRIES} at a cluster",
            snapshot.id_text().escape_debug()
        )));
    }
    Ok(())
}

/// Judges the size that a snapshot's disk is said to have.
fn check_size(snapshot: &Snapshot, geometry: &qcow2_format::Geometry) -> Result<()> {
    match geometry.l1_entries_for(snapshot.disk_size & !511) > MAX_L1_ENTRIES {
        true => Err(Error::corrupt(format!("snapshot's disk of {} bytes is too large", snapshot.disk_size))),
        false => Ok(()),
    }
}

fn find(table: &Table, snapshot: &Snapshot) -> Result<usize> {
    table.snapshots.iter().position(|other| other == snapshot).ok_or_else(|| {
        let id = snapshot.id_text();
        Error::new(ErrorKind::NotFound, format!("image has no such snapshot '{}'", id.escape_debug()))
    })
}

/// One more than the largest id that is a number.
fn next_id(snapshots: &[Snapshot]) -> u64 {
    let ids = snapshots.iter().filter_map(|s| core::str::from_utf8(&s.id).ok()?.parse::<u64>().ok());
    ids.max().unwrap_or(0).saturating_add(1)
}

/// The copied flag of an L1 entry.
const COPIED: u64 = 1 << 63;
