//! Makes refcounts agree with the tables: corrects them in place, or writes a new refcount structure.
//!
//! Order on disk for a new structure: blocks and table behind all clusters in use; barrier; the header's
//! switch to them; barrier.

use super::RefcountStore;
use crate::error::{Error, Result};
use crate::invariant;
use crate::meta::overlap::OverlapChecks;
use crate::meta::run::ClusterRun;
use crate::recover::count::ReferenceCounts;
use crate::sync::lock;
use ::alloc::format;
use ::alloc::vec;
use qcow2_format::refcount::{decode_table_entry, encode_table_entry};
use qcow2_format::{HeaderField, HostOffset};

impl RefcountStore {
    /// Corrects the refcounts in the existing blocks, with `only_lower` only those that are too high. Returns
    /// false, without a change, if a cluster in use has no refcount block or the refcount structure itself is
    /// damaged. Calls `relieve` after each block, to flush if much has changed.
    pub(crate) fn correct_blocks(
        &self,
        counts: &ReferenceCounts,
        only_lower: bool,
        relieve: &mut dyn FnMut() -> Result<()>,
    ) -> Result<bool> {
        let table = lock(&self.state).table.clone();
        let Some(own) = self.own_clusters(&table)? else { return Ok(false) };
        if own.used().any(|(cluster, times)| times > 1 || counts.of(cluster) > 0) {
            // A block has another reference: it may hold that owner's bytes, so it must not be written.
            return Ok(false);
        }
        let per_block = self.geometry().refcount_block_entries();
        let has_block = |cluster: u64| table.get((cluster / per_block) as usize).is_some_and(|&raw| raw != 0);
        if !counts.used().chain(own.used()).all(|(cluster, _)| has_block(cluster)) {
            return Ok(false);
        }
        for (index, _) in table.iter().enumerate().filter(|&(_, &raw)| raw != 0) {
            let first = index as u64 * per_block;
            for cluster in first..first + per_block {
                self.correct(cluster, counts.of(cluster) + own.of(cluster), only_lower)?;
            }
            relieve()?;
        }
        Ok(true)
    }

    fn correct(&self, cluster: u64, count: u64, only_lower: bool) -> Result<()> {
        let refcounts = lock(&self.state);
        let old = self.count_in(&refcounts, cluster)?;
        if old != count && (old > count || !only_lower) {
            self.check_fits(count)?;
            self.set_count(&refcounts, cluster, count)?;
        }
        Ok(())
    }

    fn check_fits(&self, count: u64) -> Result<()> {
        let max = self.geometry().refcount_width().max();
        if count > max {
            let message = format!("a cluster has {count} references, its refcount holds at most {max}");
            return Err(Error::corrupt(message));
        }
        Ok(())
    }

    /// The clusters of the refcount structure itself, or `None` if the table is damaged.
    fn own_clusters(&self, table: &[u64]) -> Result<Option<ReferenceCounts>> {
        let mut own = ReferenceCounts::new(self.geometry().clusters_for(self.file.storage().len()?));
        let table_run = lock(&self.state).table_run(self.geometry());
        if own.add(table_run, 1).is_err() {
            return Ok(None);
        }
        for &raw in table.iter().filter(|&&raw| raw != 0) {
            match decode_table_entry(raw, self.geometry()) {
                Ok(None) => {}
                Ok(Some(block)) => {
                    let block = ClusterRun::one(self.geometry().host_cluster(block).value());
                    if own.add(block, 1).is_err() {
                        return Ok(None);
                    }
                }
                Err(_) => return Ok(None),
            }
        }
        Ok(Some(own))
    }

    /// Writes a new refcount structure behind the last cluster in use, and switches the header to it.
    pub(crate) fn rebuild(&self, counts: &ReferenceCounts) -> Result<()> {
        let (size, per_block) = (self.geometry().cluster_size(), self.geometry().refcount_block_entries());
        let file_end = self.geometry().clusters_for(self.file.storage().len()?);
        let first = counts.used().last().map_or(0, |(cluster, _)| cluster + 1).max(file_end);
        // A fixed point: blocks and table must also cover their own clusters.
        let (mut blocks, mut table) = (1u64, 1u64);
        while (blocks, table) != self.needed(first + blocks + table) {
            let needed = self.needed(first + blocks + table);
            (blocks, table) = (needed.0.max(blocks), needed.1.max(table));
        }
        let blocks = ClusterRun::new(first, blocks);
        let table = ClusterRun::new(blocks.end(), table);
        invariant::all_counted(blocks.count(), per_block, table.end());
        let table_offset = table.offset(self.geometry());
        let width = self.geometry().refcount_width();
        for (index, block) in (0u64..).zip(blocks.clusters()) {
            let mut words = vec![0u64; (size / 8) as usize];
            for slot in 0..per_block {
                let cluster = index * per_block + slot;
                let own = (first..table.end()).contains(&cluster);
                let count = counts.of(cluster) + u64::from(own);
                self.check_fits(count)?;
                if count > 0 {
                    let word = &mut words[width.word_index(slot)];
                    *word = width.insert(*word, slot, count);
                }
            }
            self.tables.write_words(OverlapChecks::NONE, HostOffset::new(block * size), &words)?;
        }
        let mut entries = vec![0u64; (table.len(self.geometry()) / 8) as usize];
        for (block, entry) in blocks.clusters().zip(&mut entries) {
            *entry = encode_table_entry(Some(HostOffset::new(block * size)));
        }
        self.tables.write_words(OverlapChecks::NONE, table_offset, &entries)?;
        self.file.flush()?;
        let clusters = table.count() as u32;
        self.header.update(&[HeaderField::RefcountTable { offset: table_offset, clusters }])?;
        self.adopt_table(entries, table);
        Ok(())
    }

    /// The numbers of blocks and of table clusters that `clusters` clusters need.
    fn needed(&self, clusters: u64) -> (u64, u64) {
        let blocks = clusters.div_ceil(self.geometry().refcount_block_entries());
        (blocks, self.geometry().clusters_for(blocks * 8))
    }
}
