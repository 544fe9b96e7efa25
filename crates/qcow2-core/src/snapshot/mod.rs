//! Internal snapshots: taken, applied, deleted, and opened as disks of their own.
//!
//! A snapshot is a copy of the L1 table, a size and a name; it shares L2 tables and data clusters with the
//! active disk through refcounts. The order of each change: new tables and refcounts, barrier, one sector of
//! the header, barrier, then the old tables are freed. A crash leaves either the old or the new state; at
//! worst clusters leak, and copied flags are clear where they could be set. Spec: "Snapshots".

mod disk;
mod table;

pub use table::{read_snapshots, read_snapshots_padded};

use crate::error::{Error, ErrorKind, Result, TableKind};
use crate::image::Image;
use crate::invariant;
use crate::meta::bulk::Tree;
use crate::meta::file::read_words;
use crate::meta::known::MAX_L1_UNASKED;
use crate::meta::overlap::OverlapChecks;
use crate::meta::pending::Unlinked;
use crate::meta::run::ClusterRun;
use crate::rules::OrderingRule;
use crate::sync::atomic::Ordering;
use crate::sync::{read, write};
use ::alloc::format;
use ::alloc::string::ToString;
use ::alloc::vec::Vec;
use qcow2_format::bytes::table_bytes;
use qcow2_format::l1::without_copied;
use qcow2_format::limit::{MAX_L1_ENTRIES, MAX_SNAPSHOTS};
use qcow2_format::snapshot::Snapshot;
use qcow2_format::{FormatError, FormatErrorKind, HeaderField, HostOffset};
use table::{NewTable, Table};

/// The caller's part of a new snapshot's table entry.
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
    /// How many instructions the guest had executed, if known.
    pub icount: Option<u64>,
}

impl Image {
    /// The image's snapshots, in the order of the table. Errors: `Corrupt` for a damaged table, `Storage`.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        let _structure = read(&self.structure);
        read_snapshots(self.file.storage(), &self.header())
    }

    /// Takes a snapshot of the disk as it is now. Its id is the largest numeric id so far plus one. Waits for
    /// running requests and blocks new ones until it returns.
    ///
    /// Disk: flushes everything; raises the refcounts of all clusters below the active L1 table, clears the
    /// copied flags, writes a copy of the L1 table and a new snapshot table; barrier; the header; barrier.
    /// Errors: `Unsupported` with an external data file; `NoSpace` for more than 65536 snapshots or if a
    /// refcount is at its maximum, before anything has changed; `Corrupt` for damaged tables; `ReadOnly`,
    /// `Poisoned`, `Storage`.
    pub fn create_snapshot(&self, new: &NewSnapshot) -> Result<Snapshot> {
        let _alone = write(&self.structure);
        let mut table = self.begin_snapshot_change()?;
        if table.snapshots.len() as u64 >= u64::from(MAX_SNAPSHOTS) {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!("image has {MAX_SNAPSHOTS} snapshots already"),
            ));
        }
        let header = self.header();
        let (active, entries) = self.mapping().l1_contents();
        self.tables.check_place(OverlapChecks::ACTIVE_L1, active, entries.len() as u64 * 8)?;
        let tree = self.tree(&entries)?;
        let old_table = self.old_table(&table)?;
        self.bulk().check_tables(&tree)?;
        let copy = self.reserve_l1(OverlapChecks::INACTIVE_L1, entries.len())?;
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
        let copy_run = self.tables.run_of(OverlapChecks::INACTIVE_L1, copy, entries.len() as u64 * 8);
        let new_table = match self.reserve_snapshot_table(&table.snapshots) {
            Ok(new_table) => new_table,
            Err(error) => return self.abandon(&[copy_run], error),
        };
        if let Err(error) = self.flusher.flush().and_then(|()| self.bulk().raise_tree(&tree)) {
            return self.abandon(&[copy_run, new_table.run(self.file.geometry())], error);
        }
        self.file.poison_on_error(self.write_snapshot(&tree, entries, copy, &new_table))?;
        self.refcounts.unlink(old_table);
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
        self.bulk().clear_copied(tree)?;
        let (active, _) = self.mapping().l1_contents();
        entries.iter_mut().for_each(|raw| *raw = without_copied(*raw));
        invariant::none_copied(&entries);
        let bytes = table_bytes(entries.iter().copied());
        // Before the header switch: an active L2 table whose copied flag is still set would be written in
        // place, and the snapshot would change with it (I4).
        if self.file.keeps(OrderingRule::CopiedClearedBeforeSnapshot) {
            self.tables.write(OverlapChecks::ACTIVE_L1, active, &bytes)?;
        }
        self.tables.write(OverlapChecks::INACTIVE_L1, copy, &bytes)?;
        self.mapping().replace_l1(active, entries);
        self.switch_snapshot_table(table)
    }

    /// Reverts the disk, its size included, to `snapshot`, one of [`snapshots`](Self::snapshots). The
    /// snapshot itself and its VM state do not change.
    ///
    /// Disk: flushes everything; raises the refcounts of all clusters below the snapshot's L1 table; writes a
    /// new active L1 table at a new host offset; barrier; the header's size and L1 table in one sector;
    /// barrier; frees the clusters that only the old disk used. Errors: `NotFound`; `Unsupported` with an
    /// external data file, with persistent bitmaps, or for another size in version 2; otherwise as
    /// [`create_snapshot`](Self::create_snapshot).
    pub fn apply_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let _alone = write(&self.structure);
        let size = snapshot.disk_size & !511;
        self.file.check_writable()?;
        self.check_applicable(snapshot, size)?;
        let table = self.begin_snapshot_change()?;
        find(&table, snapshot)?;
        self.begin_change()?;
        let mut entries = self.snapshot_l1(snapshot)?;
        let tree = self.tree(&entries)?;
        let (old_offset, old_entries) = self.mapping().l1_contents();
        let old_tree = self.tree(&old_entries)?;
        let needed = self.file.geometry().l1_entries_for(size).max(old_entries.len() as u64);
        entries.resize(entries.len().max(needed as usize), 0);
        entries.iter_mut().for_each(|raw| *raw = without_copied(*raw));
        let old_l1 = self.tables.run_of(OverlapChecks::ACTIVE_L1, old_offset, old_entries.len() as u64 * 8);
        self.bulk().check_tables(&tree)?;
        self.refcounts.check_freeable(old_l1)?;
        self.bulk().check_lowering(&old_tree, &self.trees_of(&table)?)?;
        let l1 = self.reserve_l1(OverlapChecks::ACTIVE_L1, entries.len())?;
        if let Err(error) = self.flusher.flush().and_then(|()| self.bulk().raise_tree(&tree)) {
            let run = self.tables.run_of(OverlapChecks::ACTIVE_L1, l1, entries.len() as u64 * 8);
            return self.abandon(&[run], error);
        }
        let switched =
            self.bulk().lower_tree(&old_tree, &[], None, || self.switch_disk(&tree, l1, entries, size));
        self.file.poison_on_error(switched)?;
        self.refcounts.unlink(old_l1);
        self.finish()
    }

    fn switch_disk(&self, tree: &Tree, l1: HostOffset, entries: Vec<u64>, size: u64) -> Result<()> {
        self.bulk().clear_copied(tree)?;
        self.tables.write(OverlapChecks::ACTIVE_L1, l1, &table_bytes(entries.iter().copied()))?;
        // The header sector is the switch: everything it points to must be durable before.
        if self.file.keeps(OrderingRule::SnapshotBeforeHeader) {
            self.file.flush()?;
        }
        invariant::none_copied(&entries);
        assert!(entries.len() as u64 <= MAX_L1_ENTRIES, "an l1 table of {} entries", entries.len());
        let count = entries.len() as u32;
        self.header.update(&[HeaderField::Size(size), HeaderField::L1 { entries: count, offset: l1 }])?;
        self.mapping().replace_l1(l1, entries);
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn check_applicable(&self, snapshot: &Snapshot, size: u64) -> Result<()> {
        let unsupported = |message| Err(Error::new(ErrorKind::Unsupported, message));
        if self.header().trusted_bitmaps().is_some() {
            return unsupported("image has persistent bitmaps, which cannot be reverted to a snapshot");
        }
        if size != self.size() && !self.file.l2_format().zero_flag {
            return unsupported("a version 2 image cannot be reverted to a snapshot of another size");
        }
        check_size(snapshot, self.file.geometry())
    }

    /// Deletes `snapshot`, one of [`snapshots`](Self::snapshots). Frees the clusters that only it used, and
    /// discards them in the storage.
    ///
    /// Disk: flushes everything; writes a new snapshot table; barrier; the header; barrier; lowers refcounts
    /// and sets the copied flag of clusters with one reference left; barrier. Errors: `NotFound`; otherwise
    /// as [`create_snapshot`](Self::create_snapshot).
    pub fn delete_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let _alone = write(&self.structure);
        let mut table = self.begin_snapshot_change()?;
        let index = find(&table, snapshot)?;
        let tree = self.tree(&self.snapshot_l1(snapshot)?)?;
        let l1_len = u64::from(snapshot.l1_size) * 8;
        let old_l1 = self.tables.run_of(OverlapChecks::INACTIVE_L1, snapshot.l1_table_offset, l1_len);
        let old_table = self.old_table(&table)?;
        self.refcounts.check_freeable(old_l1)?;
        let (l1_offset, mut entries) = self.mapping().l1_contents();
        self.tables.check_place(OverlapChecks::ACTIVE_L1, l1_offset, entries.len() as u64 * 8)?;
        table.snapshots.remove(index);
        let mut kept = self.trees_of(&table)?;
        kept.push(self.tree(&entries)?);
        let new_table = self.reserve_snapshot_table(&table.snapshots)?;
        if let Err(error) = self.flusher.flush() {
            return self.abandon(&[new_table.run(self.file.geometry())], error);
        }
        // Until the header has switched, an error changes nothing; after that memory and disk may differ, so
        // the image is poisoned.
        let mut unlinked = false;
        let lowered = self.bulk().lower_tree(&tree, &kept, Some(&mut entries), || {
            unlinked = true;
            self.switch_snapshot_table(&new_table)
        });
        match lowered {
            Err(error) if !unlinked => return self.abandon(&[new_table.run(self.file.geometry())], error),
            lowered => self.file.poison_on_error(lowered)?,
        }
        let written =
            self.tables.write(OverlapChecks::ACTIVE_L1, l1_offset, &table_bytes(entries.iter().copied()));
        self.file.poison_on_error(written)?;
        self.mapping().replace_l1(l1_offset, entries);
        self.refcounts.unlink(old_l1);
        self.refcounts.unlink(old_table);
        self.finish()
    }

    /// The L2 tables that these raw L1 entries point to. A damaged entry marks the image corrupt.
    fn tree(&self, entries: &[u64]) -> Result<Tree> {
        Tree::new(entries, self.file.geometry()).map_err(|error| self.header.marked_if_damaged(error))
    }

    /// The L2 tables of the snapshots in `table`. Empty if all their L1 tables together exceed
    /// [`MAX_L1_UNASKED`]: reading them would take too long for an extra check.
    fn trees_of(&self, table: &Table) -> Result<Vec<Tree>> {
        let bytes = |snapshot: &Snapshot| u64::from(snapshot.l1_size) * 8;
        if table.snapshots.iter().map(bytes).sum::<u64>() > MAX_L1_UNASKED {
            return Ok(Vec::new());
        }
        let tree = |snapshot| Tree::new(&self.snapshot_l1(snapshot)?, self.file.geometry());
        table.snapshots.iter().map(tree).collect()
    }

    /// Refuses snapshots whose L1 tables share clusters: deleting one would free the other's table.
    fn check_apart(&self, table: &Table) -> Result<()> {
        let run = |snapshot: &Snapshot| {
            let len = u64::from(snapshot.l1_size) * 8;
            ClusterRun::touched(self.file.geometry(), snapshot.l1_table_offset, len)
        };
        let mut runs: Vec<_> = table.snapshots.iter().map(run).filter(|run| !run.is_empty()).collect();
        runs.sort_unstable_by_key(|run| run.first());
        match runs.windows(2).find(|pair| pair[0].end() > pair[1].first()) {
            None => Ok(()),
            Some(pair) => Err(self.header.mark_corrupt(format!(
                "two snapshots have their l1 tables in host cluster {}",
                pair[1].first()
            ))),
        }
    }

    /// The clusters of the snapshot table on disk, after checking that they can be freed.
    fn old_table(&self, table: &Table) -> Result<Unlinked> {
        let offset = self.header().snapshots_offset;
        let run = self.tables.run_of(OverlapChecks::SNAPSHOT_TABLE, offset, table.len);
        self.refcounts.check_freeable(run)?;
        Ok(run)
    }

    /// Rewrites the snapshot table with the extra fields that version 3 requires in each entry.
    pub(crate) fn rewrite_snapshot_table(&self) -> Result<()> {
        let table = self.begin_snapshot_change()?;
        let old_table = self.old_table(&table)?;
        let new_table = self.reserve_snapshot_table(&table.snapshots)?;
        if let Err(error) = self.flusher.flush() {
            return self.abandon(&[new_table.run(self.file.geometry())], error);
        }
        self.file.poison_on_error(self.switch_snapshot_table(&new_table))?;
        self.refcounts.unlink(old_table);
        self.finish()
    }

    /// Common start of every change: reads and checks the snapshot table, flushes all tables and frees
    /// everything that is waiting to be freed.
    fn begin_snapshot_change(&self) -> Result<Table> {
        self.file.check_writable()?;
        if self.file.has_data_file() {
            let message = "an image with an external data file has no snapshots";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let table = Table::read(self.file.storage(), &self.header(), false)?;
        self.check_apart(&table)?;
        self.flusher.settle()?;
        Ok(table)
    }

    /// Common end of every change: frees what was unlinked, on disk too, and reloads the metadata map with
    /// the snapshots' new tables.
    fn finish(&self) -> Result<()> {
        self.flusher.settle()?;
        self.learn_metadata()?;
        self.pad_file()
    }

    /// Reserves clusters for an L1 table. For a table without entries: no clusters and offset 0.
    fn reserve_l1(&self, kind: OverlapChecks, entries: usize) -> Result<HostOffset> {
        match self.file.geometry().clusters_for(entries as u64 * 8) {
            0 => Ok(HostOffset::new(0)),
            clusters => Ok(self.refcounts.allocate_with_space(kind, clusters)?.offset),
        }
    }

    /// Frees what was reserved for a change that failed with `error`.
    fn abandon<T>(&self, reserved: &[Unlinked], error: Error) -> Result<T> {
        reserved.iter().for_each(|&run| self.refcounts.unlink(run));
        if !self.file.is_poisoned() {
            self.finish()?;
        }
        Err(error)
    }

    /// The raw entries of a snapshot's L1 table.
    pub(crate) fn snapshot_l1(&self, snapshot: &Snapshot) -> Result<Vec<u64>> {
        check_l1(snapshot, self.file.geometry())?;
        read_words(self.file.storage(), snapshot.l1_table_offset, u64::from(snapshot.l1_size))
    }
}

/// Checks offset and length of a snapshot's L1 table.
pub(crate) fn check_l1(snapshot: &Snapshot, geometry: &qcow2_format::Geometry) -> Result<()> {
    let (offset, entries) = (snapshot.l1_table_offset, u64::from(snapshot.l1_size));
    let end = offset.checked_add(entries * 8);
    if entries > MAX_L1_ENTRIES || !geometry.is_aligned(offset.value()) || end.is_none() {
        let message = format!(
            "snapshot '{}': l1 table of {entries} entries at {offset}, allowed are {MAX_L1_ENTRIES} at a \
             cluster",
            snapshot.id_text().escape_debug()
        );
        let kind = match entries > MAX_L1_ENTRIES {
            true => FormatErrorKind::TableTooLarge(qcow2_format::Table::SnapshotL1),
            false => FormatErrorKind::TableOffset(qcow2_format::Table::SnapshotL1),
        };
        let source = FormatError::new(kind, "it cannot be there");
        return Err(Error::corrupt(message).in_table(TableKind::L1).at_host(offset).with_source(source));
    }
    Ok(())
}

/// Checks the disk size in a snapshot's entry.
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

/// The largest id that is a number, plus one.
fn next_id(snapshots: &[Snapshot]) -> u64 {
    let ids = snapshots.iter().filter_map(|s| core::str::from_utf8(&s.id).ok()?.parse::<u64>().ok());
    ids.max().unwrap_or(0).saturating_add(1)
}
