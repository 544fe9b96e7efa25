//! Downgrade to version 2, which has no zero flag, no features and no bitmaps.
//!
//! In every L2 table, snapshots' included, a zero cluster with a host cluster of its own becomes a data
//! cluster of zeroes; any other one becomes a new data cluster of zeroes if there is a backing file, else
//! unallocated. Order on disk, for each table: refcounts and bytes of the data clusters, barrier, the table,
//! barrier. Then the header. Then the clusters of bitmaps are freed. Until the header changes, the image is a
//! valid version 3 image with the same guest data.

use super::{AmendProgress, stopped};
use crate::damage::{L2Slot, bad_l1_entry, bad_l2_entry};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::meta::file::read_words;
use crate::meta::overlap::OverlapChecks;
use crate::meta::pending::Unlinked;
use crate::meta::run::ClusterRun;
use crate::recover::count::ReferenceCounts;
use crate::sync::write;
use crate::walk::{TablePlace, overlay};
use ::alloc::collections::BTreeSet;
use ::alloc::format;
use ::alloc::vec;
use ::alloc::vec::Vec;
use qcow2_format::feature::{AutoclearFeatures, CompatibleFeatures, IncompatibleFeatures};
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::{ClusterEntry, L2Entry};
use qcow2_format::limit::{MAX_L1_ENTRIES, MAX_L1_TABLE_SIZE};
use qcow2_format::{CompressionType, Geometry, HostOffset, L1Index, L2Index, Snapshot, Version};

impl Image {
    /// Downgrades a version 3 image to version 2. The image takes no changes afterwards: reopen it. Removes
    /// persistent bitmaps and frees their clusters. Errors: `Unsupported` for what version 2 does not have
    /// (another refcount width than 16 bits, incompatible features, snapshots of another size or with 4 GiB
    /// or more of VM state), before anything has changed; `Stopped`: the image is still version 3 and usable;
    /// `Corrupt`, `ReadOnly`, `Poisoned`, `Storage`. Spec: "Header".
    pub fn downgrade(&self, progress: &mut AmendProgress<'_>) -> Result<()> {
        self.flush()?;
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        let header = self.header();
        if header.version < Version::V3 {
            return Ok(());
        }
        self.check_fits_version_2()?;
        self.flusher.settle()?;
        let bitmaps = self.recount().trusted_bitmaps()?;
        for (cluster, _) in bitmaps.used() {
            self.tables.check_owner(bitmap_run(cluster))?;
        }
        let tables = self.all_l2_tables()?;
        for &table in &tables {
            self.tables.check_place(OverlapChecks::L2, table, self.file.geometry().cluster_size())?;
        }
        let expanded = self.expand_zero_clusters(tables, progress);
        if expanded.as_ref().is_err_and(|error| error.kind() == ErrorKind::Stopped) {
            return self.flusher.settle().and(expanded);
        }
        self.file.poison_on_error(expanded)?;
        let mut header = self.header();
        header.version = Version::V2;
        header.features.incompatible = IncompatibleFeatures::NONE;
        header.features.compatible = CompatibleFeatures::NONE;
        header.features.autoclear = AutoclearFeatures::NONE;
        header.compression_type = CompressionType::Deflate;
        header.unknown_fields.clear();
        header.extensions.bitmaps = None;
        header.extensions.feature_names = None;
        self.header.switch_to(header)?;
        // Whether or not it succeeds: a version 2 image must not get entries of version 3.
        let freed = self.free_bitmaps(&bitmaps);
        self.end_use();
        freed
    }

    /// Frees the clusters of the bitmaps, which the header does not have any more.
    fn free_bitmaps(&self, bitmaps: &ReferenceCounts) -> Result<()> {
        for (cluster, count) in bitmaps.used() {
            // A damaged image may have far more references than its refcounts count.
            let counted = self.refcounts.count(cluster)?;
            (0..count.min(counted)).for_each(|_| self.refcounts.unlink(bitmap_run(cluster)));
            if self.refcounts.is_pressed() {
                self.flusher.settle()?;
            }
        }
        self.flusher.settle()
    }

    fn check_fits_version_2(&self) -> Result<()> {
        let header = self.header();
        let unsupported = |message: ::alloc::string::String| Err(Error::new(ErrorKind::Unsupported, message));
        if self.file.geometry().refcount_width().bits() != 16 {
            return unsupported(format!(
                "refcounts of version 2 have 16 bits, these have {}",
                self.file.geometry().refcount_width().bits()
            ));
        }
        // The compression type bit may be set as long as nothing is compressed.
        let may_go = IncompatibleFeatures::DIRTY.bits() | IncompatibleFeatures::COMPRESSION_TYPE.bits();
        let features = header.features.incompatible.bits() & !may_go;
        if features != 0 {
            return unsupported(format!("version 2 has no incompatible features, these are {features:#x}"));
        }
        if header.compression_type != CompressionType::Deflate && self.has_compressed_clusters()? {
            return unsupported("version 2 has no other compression than deflate".into());
        }
        for snapshot in crate::snapshot::read_snapshots(self.file.storage(), &header)? {
            if snapshot.disk_size != header.disk_size() || snapshot.vm_state_size > u64::from(u32::MAX) {
                return unsupported(format!(
                    "snapshot '{}' has a disk of another size or too large a machine state for version 2",
                    snapshot.id_text().escape_debug()
                ));
            }
        }
        Ok(())
    }

    fn has_compressed_clusters(&self) -> Result<bool> {
        for table in self.all_l2_tables()?.into_iter().filter(|&table| !self.is_hole(table)) {
            for raw in read_words(self.file.storage(), table, self.file.geometry().cluster_size() / 8)? {
                let entry = self.file.l2_format().decode(raw, 0);
                if matches!(entry, Ok(L2Entry::Compressed(_))) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Every L2 table of the active disk and the snapshots, once.
    fn all_l2_tables(&self) -> Result<BTreeSet<HostOffset>> {
        let mut tables = BTreeSet::new();
        let mut add = |l1: &[u64]| {
            let added = l2_tables_of(self.file.geometry(), l1, &mut tables);
            added.map_err(|error| self.header.marked_if_damaged(error))
        };
        add(&self.mapping().l1_contents().1)?;
        let snapshots = crate::snapshot::read_snapshots(self.file.storage(), &self.header())?;
        for snapshot in &snapshots {
            crate::snapshot::check_l1(snapshot, self.file.geometry())?;
        }
        let l1_tables = snapshots.iter().map(|snapshot| TablePlace {
            offset: snapshot.l1_table_offset,
            entries: u64::from(snapshot.l1_size),
        });
        // What the tables of several snapshots share is read once.
        for segment in overlay(&l1_tables.collect::<Vec<_>>()) {
            for start in (0..segment.len).step_by(MAX_L1_TABLE_SIZE as usize) {
                let (offset, len) = (segment.offset.value() + start, segment.len - start);
                let entries = len.min(MAX_L1_TABLE_SIZE) / 8;
                add(&read_words(self.file.storage(), HostOffset::new(offset), entries)?)?;
            }
        }
        Ok(tables)
    }

    /// Expands each of `tables`, in the order of the L1 tables. An L1 entry is a step.
    fn expand_zero_clusters(
        &self,
        mut tables: BTreeSet<HostOffset>,
        progress: &mut AmendProgress<'_>,
    ) -> Result<()> {
        let snapshots = crate::snapshot::read_snapshots(self.file.storage(), &self.header())?;
        let entries = |snapshot: &Snapshot| u64::from(snapshot.l1_size).min(MAX_L1_ENTRIES);
        let total = self.mapping().l1_len() + snapshots.iter().map(entries).sum::<u64>();
        let mut done = 0;
        let mut expand = |l1: &[u64]| {
            for &raw in l1 {
                let table = L1Entry::decode(raw, self.file.geometry()).ok().and_then(|entry| entry.l2_table);
                if let Some(table) = table.filter(|table| tables.remove(table)) {
                    self.expand_table(table, self.backing.is_some() || self.backing_unopened)?;
                }
                done += 1;
                stopped(progress(done, total))?;
            }
            Ok::<_, Error>(tables.is_empty())
        };
        let mut all_done = expand(&self.mapping().l1_contents().1)?;
        for snapshot in &snapshots {
            if all_done {
                return stopped(progress(total, total));
            }
            let l1 = read_words(self.file.storage(), snapshot.l1_table_offset, entries(snapshot))?;
            all_done = expand(&l1)?;
        }
        assert!(all_done, "an l2 table is in no l1 table");
        Ok(())
    }

    /// Rewrites one L2 table without zero flags. There are no subclusters: extended L2 entries are an
    /// incompatible feature and were refused.
    fn expand_table(&self, table: HostOffset, backing: bool) -> Result<()> {
        if self.is_hole(table) {
            return Ok(());
        }
        let size = self.file.geometry().cluster_size();
        let mut words = read_words(self.file.storage(), table, size / 8)?;
        let references = self.refcount_at(table)?;
        let (mut changed, mut unlinked) = (false, Vec::new());
        for (index, word) in (0..).map(L2Index::new).zip(&mut words) {
            let slot = L2Slot { table, index };
            let entry = self.file.l2_format().decode(*word, 0);
            let zero = self.file.l2_format().has_zero_flag(*word);
            let entry = entry.map_err(|e| self.header.marked_if_damaged(bad_l2_entry(slot, zero, e)))?;
            let L2Entry::Standard(cluster) = entry else { continue };
            if cluster.zero == 0 {
                continue;
            }
            let own = match cluster.host {
                Some(host) => self.refcount_at(host)? == references,
                None => false,
            };
            if let Some(host) = cluster.host.filter(|_| !own) {
                // The host cluster is shared: it may hold data for another table, so it must not be
                // overwritten.
                let shared = ClusterRun::one(self.file.geometry().host_cluster(host).value());
                unlinked.extend((0..references).map(|_| Unlinked::data(shared)));
            }
            let new = match cluster.host.filter(|_| own) {
                Some(host) => {
                    self.write_zero_cluster(host)?;
                    ClusterEntry { allocated: 1, zero: 0, ..cluster }
                }
                None if backing => {
                    let host = self.refcounts.allocate_shared(references)?;
                    self.write_zero_cluster(host)?;
                    ClusterEntry { host: Some(host), copied: references == 1, allocated: 1, zero: 0 }
                }
                None => ClusterEntry::UNALLOCATED,
            };
            debug_assert!(new.zero == 0, "version 2 has no zero flag");
            let encoded = self.file.l2_format().encode(&L2Entry::Standard(new));
            *word = encoded.ok_or_else(|| Error::new(ErrorKind::NoSpace, "host offset is too large"))?.0;
            changed = true;
        }
        if !changed {
            return Ok(());
        }
        self.flusher.flush()?;
        self.file.flush()?;
        self.tables.write_words(OverlapChecks::L2, table, &words)?;
        self.file.flush()?;
        self.mapping().forget_table(table);
        unlinked.into_iter().for_each(|run| self.refcounts.unlink(run));
        Ok(())
    }

    /// Whether no entry of a table was ever written.
    fn is_hole(&self, table: HostOffset) -> bool {
        let end = table.value().saturating_add(self.file.geometry().cluster_size());
        self.file.hole_at(table.value()).is_some_and(|hole| end <= hole.end)
    }

    fn refcount_at(&self, host: HostOffset) -> Result<u64> {
        self.refcounts.count(self.file.geometry().host_cluster(host).value())
    }

    fn write_zero_cluster(&self, host: HostOffset) -> Result<()> {
        let zeroes = vec![0; self.file.geometry().cluster_size() as usize];
        self.tables.check_data_place(host, zeroes.len() as u64)?;
        Ok(self.file.storage().write_at(host, &zeroes)?)
    }
}

/// Adds the L2 tables that the raw entries of an L1 table point to.
fn l2_tables_of(geometry: &Geometry, l1: &[u64], tables: &mut BTreeSet<HostOffset>) -> Result<()> {
    for (index, &raw) in (0..).map(L1Index::new).zip(l1) {
        let entry = L1Entry::decode(raw, geometry).map_err(|e| bad_l1_entry(index, e))?;
        tables.extend(entry.l2_table);
    }
    Ok(())
}

/// A reference to a cluster of a bitmap, of its table or of the directory.
fn bitmap_run(cluster: u64) -> Unlinked {
    Unlinked { clusters: ClusterRun::one(cluster), kinds: OverlapChecks::BITMAP_DIRECTORY }
}
