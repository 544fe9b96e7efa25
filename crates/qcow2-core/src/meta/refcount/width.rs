//! Changes the refcount width: writes every block again in the new width, behind all clusters in use.
//!
//! The new blocks count themselves, and not the old structure: its clusters are free once the header has
//! switched.

use super::{RefcountStore, Refcounts};
use crate::damage::bad_refcount_table_entry;
use crate::error::{Error, ErrorKind, Result};
use crate::invariant;
use crate::meta::overlap::OverlapChecks;
use crate::meta::run::ClusterRun;
use crate::sync::lock;
use ::alloc::collections::BTreeSet;
use ::alloc::format;
use ::alloc::vec;
use qcow2_format::refcount::{decode_table_entry, encode_table_entry};
use qcow2_format::{Geometry, HostOffset};

/// The clusters of the new structure.
pub(crate) struct WidthPlan {
    /// The image's geometry with the new width.
    geometry: Geometry,
    blocks: ClusterRun,
    table: ClusterRun,
    /// Clusters of the old structure.
    old: BTreeSet<u64>,
}

impl WidthPlan {
    /// Host offset of the new refcount table.
    pub(crate) fn table_offset(&self) -> HostOffset {
        self.table.offset(&self.geometry)
    }

    /// Number of clusters of the new refcount table.
    pub(crate) fn table_clusters(&self) -> u64 {
        self.table.count()
    }
}

impl RefcountStore {
    /// Plans a structure with refcounts of `bits` bits, a power of two up to 64. Disk: reads every refcount
    /// block. Errors: `Corrupt` if the present refcount structure is damaged, `NoSpace` if the new table
    /// would exceed its limit, `Storage`.
    pub(crate) fn plan_width(&self, bits: u32) -> Result<WidthPlan> {
        let geometry = self
            .geometry()
            .with_refcount_order(bits.trailing_zeros())
            .map_err(|e| Error::new(ErrorKind::InvalidOption, "refcount width").with_source(e))?;
        let refcounts = lock(&self.state);
        self.check_counted(&refcounts)?;
        let mut old: BTreeSet<u64> = refcounts.table_run(self.geometry()).clusters().collect();
        // A device has room only before its end, and a cluster is free there if it is not counted.
        let storage = self.file.storage();
        let mut first = match storage.limits().growable() {
            true => self.geometry().clusters_for(storage.len()?),
            false => 0,
        };
        let per_old = self.geometry().refcount_block_entries();
        for (index, &raw) in (0u64..).zip(&refcounts.table) {
            let block = decode_table_entry(raw, self.geometry())
                .map_err(|e| self.header.marked(bad_refcount_table_entry(index, e)))?;
            let Some(block) = block else { continue };
            old.insert(self.geometry().host_cluster(block).value());
            self.tables.check_place(OverlapChecks::REFCOUNT_BLOCK, block, self.geometry().cluster_size())?;
            // Clusters past the end of the file can have refcounts too.
            let start = (index * per_old).max(first);
            if let Some(last) = self.last_counted(&refcounts, start, (index + 1) * per_old)? {
                first = last + 1;
            }
        }
        // A fixed point: blocks and table must also cover their own clusters.
        let (mut blocks, mut table) = (0, 0);
        loop {
            let needed = (first + blocks + table).div_ceil(geometry.refcount_block_entries());
            let clusters = geometry.clusters_for(needed * 8);
            if (needed, clusters) == (blocks, table) {
                break;
            }
            (blocks, table) = (needed, clusters);
        }
        if table * geometry.cluster_size() > qcow2_format::limit::MAX_REFCOUNT_TABLE_SIZE {
            return Err(Error::new(ErrorKind::NoSpace, "the refcount table would pass its limit"));
        }
        let blocks = ClusterRun::new(first, blocks);
        let table = ClusterRun::new(blocks.end(), table);
        invariant::all_counted(blocks.count(), geometry.refcount_block_entries(), table.end());
        Ok(WidthPlan { geometry, blocks, table, old })
    }

    /// Refuses a refcount table that is obviously wrong: one in the place of other metadata, or in which the
    /// header's cluster or the table's own has refcount 0.
    fn check_counted(&self, refcounts: &Refcounts) -> Result<()> {
        let len = self.geometry().bytes_of(refcounts.table_clusters);
        self.tables.check_place(OverlapChecks::REFCOUNT_TABLE, refcounts.table_offset, len)?;
        for cluster in [0, self.geometry().host_cluster(refcounts.table_offset).value()] {
            if self.count_in(refcounts, cluster)? == 0 {
                let message = format!("host cluster {cluster} holds metadata but its refcount is 0");
                return Err(self.header.mark_corrupt(message));
            }
        }
        Ok(())
    }

    /// The last cluster in `first..end` with a nonzero refcount.
    fn last_counted(&self, refcounts: &Refcounts, first: u64, end: u64) -> Result<Option<u64>> {
        for cluster in (first..end).rev() {
            if self.count_in(refcounts, cluster)? > 0 {
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }

    /// Writes the new blocks and the new table; durable when it returns. Nothing points to them yet.
    /// `progress` gets the number of written blocks and the total; its error stops the work. Errors: those of
    /// `progress`; `OutOfRange` if a refcount does not fit; `Storage`.
    pub(crate) fn write_width(
        &self,
        plan: &WidthPlan,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let per_block = plan.geometry.refcount_block_entries();
        let own = plan.blocks.first()..plan.table.end();
        let mut table = vec![0u64; (plan.table.len(&plan.geometry) / 8) as usize];
        for (block, place) in (0u64..).zip(plan.blocks.clusters()) {
            let place = ClusterRun::one(place).offset(&plan.geometry);
            let mut words = vec![0u64; (plan.geometry.cluster_size() / 8) as usize];
            for slot in 0..per_block {
                let cluster = block * per_block + slot;
                let count = match own.contains(&cluster) {
                    true => 1,
                    false => self.count_without(cluster, &plan.old)?,
                };
                put(&mut words, &plan.geometry, cluster, count)?;
            }
            self.tables.write_words(OverlapChecks::NONE, place, &words)?;
            table[block as usize] = encode_table_entry(Some(place));
            progress(block + 1, plan.blocks.count())?;
        }
        self.tables.write_words(OverlapChecks::NONE, plan.table.offset(&plan.geometry), &table)?;
        self.file.flush()
    }

    /// The refcount of `cluster` without the reference from the old structure.
    fn count_without(&self, cluster: u64, old: &BTreeSet<u64>) -> Result<u64> {
        let refcounts = lock(&self.state);
        let count = self.count_in(&refcounts, cluster)?;
        Ok(count.saturating_sub(u64::from(old.contains(&cluster))))
    }
}

fn put(words: &mut [u64], geometry: &Geometry, cluster: u64, count: u64) -> Result<()> {
    let (width, cluster_size) = (geometry.refcount_width(), geometry.cluster_size());
    let slot = cluster % geometry.refcount_block_entries();
    if count > width.max() {
        let message = format!("cluster at offset {:#x} has a refcount of {count}", cluster * cluster_size);
        return Err(Error::new(ErrorKind::OutOfRange, message));
    }
    if count > 0 {
        let word = &mut words[width.word_index(slot)];
        *word = width.insert(*word, slot, count);
    }
    Ok(())
}
