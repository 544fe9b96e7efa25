//! Grows the refcount table by moving it to new clusters.
//!
//! Order on disk: changed refcount blocks, the new blocks, the new table; barrier; the header; barrier. Only
//! then the old table is freed.

use super::{RefcountStore, Refcounts};
use crate::error::{Error, ErrorKind, Result};
use crate::invariant;
use crate::meta::overlap::OverlapChecks;
use crate::meta::pending::Unlinked;
use crate::meta::run::ClusterRun;
use crate::port::event::Event;
use crate::rules::OrderingRule;
use crate::sync::lock;
use ::alloc::format;
use ::alloc::vec;
use ::alloc::vec::Vec;
use qcow2_format::HeaderField;
use qcow2_format::HostOffset;
use qcow2_format::bytes::{push_words, table_bytes};
use qcow2_format::refcount::{RefcountWidth, encode_table_entry};

/// The largest refcount table in bytes. Origin: QEMU.
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// The clusters of the new structure: blocks first, the table right behind them.
struct Layout {
    blocks: ClusterRun,
    table: ClusterRun,
}

impl RefcountStore {
    /// Makes the refcount table long enough for entry `index`. The new blocks and the new table lie past the
    /// range of the old table, so that the new blocks cover both. Errors: also `NoSpace`, before anything has
    /// changed.
    pub(super) fn grow_table(&self, refcounts: &mut Refcounts, index: u64) -> Result<()> {
        let layout = self.plan_growth(refcounts, index)?;
        let len = layout.blocks.len(self.geometry()) + layout.table.len(self.geometry());
        self.file.reserve_space(layout.blocks.offset(self.geometry()), len)?;
        let result = self.write_growth(refcounts, &layout);
        self.file.poison_on_error(result)
    }

    fn plan_growth(&self, refcounts: &Refcounts, index: u64) -> Result<Layout> {
        let geometry = self.geometry();
        let (cluster_size, per_block) = (geometry.cluster_size(), geometry.refcount_block_entries());
        let old_entries = refcounts.entries(geometry);
        let first = old_entries * per_block;
        // At least half as much again, so that the table moves ever more rarely as the file grows.
        let wanted = (index + 1).max(old_entries + old_entries / 2);
        // A fixed point: blocks and table must also cover their own clusters.
        let (mut blocks, mut table_clusters) = (1u64, 1u64);
        loop {
            let new_blocks = (blocks + table_clusters).div_ceil(per_block);
            let entries = wanted.max(old_entries + new_blocks);
            let new_clusters = (entries * 8).div_ceil(cluster_size);
            if (new_blocks, new_clusters) == (blocks, table_clusters) {
                break;
            }
            (blocks, table_clusters) = (new_blocks.max(blocks), new_clusters.max(table_clusters));
        }
        if table_clusters * cluster_size > MAX_TABLE_BYTES.max(cluster_size) {
            return Err(Error::new(
                ErrorKind::NoSpace,
                format!(
                    "refcount table would need {} bytes, allowed are {MAX_TABLE_BYTES}",
                    table_clusters * cluster_size
                ),
            ));
        }
        assert!(table_clusters * cluster_size / 8 > index, "a refcount table without entry {index}");
        let blocks = ClusterRun::new(first, blocks);
        let layout = Layout { blocks, table: ClusterRun::new(blocks.end(), table_clusters) };
        invariant::all_counted(old_entries + layout.blocks.count(), per_block, layout.table.end());
        Ok(layout)
    }

    fn write_growth(&self, refcounts: &mut Refcounts, layout: &Layout) -> Result<()> {
        // Waits for a running writeback: it has older copies of the blocks that are written below.
        let _writing = lock(&self.io);
        let geometry = self.geometry();
        let size = geometry.cluster_size();
        let used = layout.blocks.count() + layout.table.count();
        let old_entries = refcounts.entries(geometry) as usize;
        let mut table = refcounts.table.clone();
        let entries = layout.table.len(geometry) / 8;
        assert!(entries > old_entries as u64, "a refcount table that does not grow");
        table.resize(entries as usize, 0);
        for (block, entry) in layout.blocks.clusters().zip(&mut table[old_entries..]) {
            *entry = encode_table_entry(Some(HostOffset::new(block * size)));
        }
        let (pages, runs) = self.cache.take_dirty();
        self.tables.write_runs(OverlapChecks::REFCOUNT_BLOCK, &runs)?;
        drop(pages);
        let place = layout.blocks.offset(geometry);
        self.cache.forget(place, used * size);
        let mut bytes = self_counting_blocks(geometry.refcount_width(), layout.blocks.len(geometry), used);
        push_words(&mut bytes, table.iter().copied());
        self.file.event(Event::RefblockAllocWriteTable);
        self.tables.write(OverlapChecks::NONE, place, &bytes)?;
        // The header sector is the switch: the new table and blocks must be durable before.
        if self.file.keeps(OrderingRule::TableBeforeHeader) {
            self.file.flush()?;
        }
        let (offset, clusters) = (layout.table.offset(geometry), layout.table.count());
        self.file.event(Event::RefblockAllocSwitchTable);
        self.header.update(&[HeaderField::RefcountTable { offset, clusters: clusters as u32 }])?;
        self.tables.guard().note(OverlapChecks::REFCOUNT_BLOCK, layout.blocks);
        self.tables.guard().note(OverlapChecks::REFCOUNT_TABLE, layout.table);
        let old = refcounts.table_run(geometry);
        refcounts.table = table;
        refcounts.table_offset = offset;
        refcounts.table_clusters = clusters;
        refcounts.dirty_sectors.clear();
        self.lower_in(refcounts, Unlinked { clusters: old, kinds: OverlapChecks::REFCOUNT_TABLE })
    }
}

/// The bytes of refcount blocks, `len` in all, whose first `used` refcounts are one and the rest zero.
fn self_counting_blocks(width: RefcountWidth, len: u64, used: u64) -> Vec<u8> {
    let mut words = vec![0u64; (len / 8) as usize];
    debug_assert!(used <= words.len() as u64 * u64::from(64 / width.bits()), "{used} counts in {len} bytes");
    for slot in 0..used {
        let word = &mut words[width.word_index(slot)];
        *word = width.insert(*word, slot, 1);
    }
    table_bytes(words)
}
