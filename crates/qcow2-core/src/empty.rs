//! Drops all allocations of an overlay: every byte then comes from the backing file.
//!
//! Order on disk: the emptied L1 table; barrier. From then on only the header, the L1 table and the refcount
//! structure are in use, and refcounts only go down: the refcount table without the blocks that are no longer
//! needed; barrier; the remaining blocks; barrier; the file is truncated. A crash before the first barrier
//! may keep some of the layer's clusters; a later one leaks clusters.

use crate::error::{Error, Result};
use crate::image::Image;
use crate::meta::overlap::OverlapChecks;
use crate::meta::run::ClusterRun;
use crate::sync::write;
use ::alloc::collections::{BTreeMap, BTreeSet};
use ::alloc::format;
use ::alloc::vec;
use ::alloc::vec::Vec;
use qcow2_format::refcount::{decode_table_entry, encode_table_entry};
use qcow2_format::{GuestOffset, GuestRange, HostOffset};

impl Image {
    /// Deallocates every cluster of this layer, so that the whole disk comes from the backing file. Internal
    /// snapshots keep their clusters. Without snapshots, bitmaps, LUKS or a data file, the image file gets as
    /// short as that of a new image.
    ///
    /// Disk: writes the empty L1 table, then the refcounts, with a barrier after each, then truncates the
    /// file. With snapshots, bitmaps, LUKS or a data file: cluster by cluster, as a discard does. Errors:
    /// `Storage`, `Corrupt`, `ReadOnly`, `Poisoned`.
    pub fn make_empty(&self) -> Result<()> {
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        self.begin_change()?;
        self.bitmaps.mark(GuestRange::between(GuestOffset::new(0), GuestOffset::new(self.size())));
        let header = self.header();
        let others = header.nb_snapshots > 0
            || header.extensions.luks.is_some()
            || header.extensions.bitmaps.is_some()
            || self.file.has_data_file();
        if others {
            let end = self.file.geometry().align_up(self.size()).unwrap_or(self.size());
            self.forget_clusters(GuestRange::between(GuestOffset::new(0), GuestOffset::new(end)))?;
            self.flusher.settle()?;
            return self.give_back_data_file();
        }
        self.flusher.settle()?;
        let result = self.drop_all_clusters();
        self.file.poison_on_error(result)
    }
}

impl Image {
    /// Discards the whole external data file, which no L2 entry refers to any more.
    fn give_back_data_file(&self) -> Result<()> {
        let Some(data) = self.file.opened_data().filter(|_| self.file.has_data_file()) else { return Ok(()) };
        let len = data.len()?;
        if len > 0 {
            data.discard(HostOffset::new(0), len)?;
        }
        Ok(())
    }
}

/// The remaining refcount blocks: index in the refcount table, and host offset.
type Blocks = BTreeMap<u64, HostOffset>;

impl Image {
    /// The fast path, for an image in which every data cluster belongs to the active disk.
    fn drop_all_clusters(&self) -> Result<()> {
        let (l1_offset, l1) = self.mapping().l1_contents();
        let (mut table, table_run) = self.refcounts.copy_table();
        let table_offset = table_run.offset(self.file.geometry());
        let mut used: BTreeSet<u64> = [0].into();
        let l1_run = ClusterRun::touched(self.file.geometry(), l1_offset, l1.len() as u64 * 8);
        used.extend(l1_run.clusters().chain(table_run.clusters()));
        let blocks = self.blocks_for(&mut used, &table)?;
        let per_block = self.file.geometry().refcount_block_entries();
        debug_assert!(used.iter().all(|cluster| blocks.contains_key(&(cluster / per_block))), "{used:?}");
        self.check_places(l1_run, table_run, &blocks)?;
        // Links before refcounts: a crash in between leaks clusters. The other order would leave links to
        // clusters that count as free (I1).
        self.tables.write_words(OverlapChecks::ACTIVE_L1, l1_offset, &vec![0; l1.len()])?;
        self.file.flush()?;
        self.mapping().replace_l1(l1_offset, vec![0; l1.len()]);
        self.mapping().expanded().clear();
        let mut changed = false;
        for (index, entry) in table.iter_mut().enumerate().filter(|(_, entry)| **entry != 0) {
            if !blocks.contains_key(&(index as u64)) {
                (*entry, changed) = (encode_table_entry(None), true);
            }
        }
        // Table entries before blocks: the cluster of a dropped block is free once the blocks are written, so
        // no entry on disk may point to it then.
        if changed {
            self.tables.write_words(OverlapChecks::REFCOUNT_TABLE, table_offset, &table)?;
            self.file.flush()?;
        }
        self.write_blocks(&blocks, &used)?;
        self.file.flush()?;
        self.refcounts.adopt_table(table, table_run);
        self.learn_metadata()?;
        self.cut_after(used.last().map_or(1, |last| last + 1))
    }

    /// Checks that no write of this procedure would hit other metadata, before anything has changed.
    fn check_places(&self, l1: ClusterRun, table: ClusterRun, blocks: &Blocks) -> Result<()> {
        let size = self.file.geometry().cluster_size();
        for (kind, run) in [(OverlapChecks::ACTIVE_L1, l1), (OverlapChecks::REFCOUNT_TABLE, table)] {
            self.tables.check_place(kind, run.offset(self.file.geometry()), run.len(self.file.geometry()))?;
        }
        let mut places = blocks.values();
        places.try_for_each(|&block| self.tables.check_place(OverlapChecks::REFCOUNT_BLOCK, block, size))
    }

    /// The blocks that hold the refcounts of the clusters in `used` and of the blocks themselves. Adds the
    /// blocks' clusters to `used`.
    fn blocks_for(&self, used: &mut BTreeSet<u64>, table: &[u64]) -> Result<Blocks> {
        let per_block = self.file.geometry().refcount_block_entries();
        let (mut blocks, mut open) = (Blocks::new(), used.iter().copied().collect::<Vec<_>>());
        while let Some(cluster) = open.pop() {
            let index = cluster / per_block;
            if blocks.contains_key(&index) {
                continue;
            }
            let raw = table.get(index as usize).copied().unwrap_or(0);
            let block = decode_table_entry(raw, self.file.geometry()).ok().flatten().ok_or_else(|| {
                Error::corrupt(format!("host cluster {cluster} is in use and has no refcount block"))
            })?;
            blocks.insert(index, block);
            let cluster = self.file.geometry().host_cluster(block).value();
            if !used.insert(cluster) {
                return Err(self
                    .header
                    .mark_corrupt(format!("refcount block at {block} is something else too")));
            }
            open.push(cluster);
        }
        Ok(blocks)
    }

    /// Overwrites the blocks: refcount 1 for the clusters in `used`, 0 for all others.
    fn write_blocks(&self, blocks: &Blocks, used: &BTreeSet<u64>) -> Result<()> {
        let (per_block, width) =
            (self.file.geometry().refcount_block_entries(), self.file.geometry().refcount_width());
        for (index, &block) in blocks {
            let mut words = vec![0u64; (self.file.geometry().cluster_size() / 8) as usize];
            for cluster in used.range(index * per_block..(index + 1) * per_block) {
                let word = &mut words[width.word_index(cluster % per_block)];
                *word = width.insert(*word, cluster % per_block, 1);
            }
            self.tables.write_words(OverlapChecks::REFCOUNT_BLOCK, block, &words)?;
        }
        Ok(())
    }
}
