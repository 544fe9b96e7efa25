//! The end of the refcounts: blocks that count nothing any more, and the last cluster in use.

use super::{RefcountStore, Refcounts};
use crate::error::Result;
use crate::meta::overlap::OverlapChecks;
use crate::meta::page::SECTOR_SIZE;
use crate::meta::pending::Unlinked;
use crate::sync::lock;
use ::alloc::vec::Vec;
use qcow2_format::HostOffset;
use qcow2_format::refcount::{decode_table_entry, encode_table_entry};

impl RefcountStore {
    /// Takes the last blocks out of the table, in memory, as long as they count no cluster but their own. The
    /// next flush writes the table's entries. Until the caller has called
    /// [`forget_blocks`](Self::forget_blocks) after it, the blocks' clusters are not allocated anew: after a
    /// crash the entries on disk may still lead there (I3). Nothing is dropped where table or block share
    /// their place with other metadata. Disk: may read refcount blocks.
    pub(crate) fn drop_last_blocks(&self) -> Result<Vec<HostOffset>> {
        let mut refcounts = lock(&self.state);
        let mut dropped = Vec::new();
        if self
            .tables
            .guard()
            .hit_by(OverlapChecks::REFCOUNT_TABLE, refcounts.table_run(self.geometry()))
            .is_some()
        {
            return Ok(dropped);
        }
        let len = self.file.storage().len()?;
        // The first one counts the header.
        for index in (1..refcounts.table.len()).rev() {
            let raw = refcounts.table[index];
            if raw == 0 {
                continue;
            }
            let Ok(Some(block)) = decode_table_entry(raw, self.geometry()) else { break };
            // An entry that leads past the end of the file is damaged, and left to a repair.
            if block.value() >= len || !self.counts_only_itself(&refcounts, index as u64, block)? {
                break;
            }
            refcounts.table[index] = encode_table_entry(None);
            refcounts.dirty_sectors.insert(index as u64 * 8 / SECTOR_SIZE);
            self.cache.forget(block, self.geometry().cluster_size());
            dropped.push(block);
        }
        drop(refcounts);
        // Those that another block counts; the others have no refcount any more.
        for &block in &dropped {
            self.unlink(Unlinked::one(self.geometry(), OverlapChecks::REFCOUNT_BLOCK, block));
        }
        Ok(dropped)
    }

    /// Lets the clusters of dropped blocks be allocated, and discards their space. A flush has written the
    /// table without them.
    pub(crate) fn forget_blocks(&self, dropped: &[HostOffset]) -> Result<()> {
        let size = self.geometry().cluster_size();
        for &block in dropped {
            let cluster = self.geometry().host_cluster(block).value();
            let mut refcounts = lock(&self.state);
            let free = self.count_in(&refcounts, cluster)? == 0;
            self.tables.guard().forget(OverlapChecks::REFCOUNT_BLOCK, cluster);
            if free && self.discard_freed {
                // A hint: the cluster is free without it.
                let _ = self.file.storage().discard(block, size);
            }
            refcounts.first_free = refcounts.first_free.min(cluster);
        }
        Ok(())
    }

    /// True if the `index`-th block, which is at `block`, has no count but one for its own cluster.
    fn counts_only_itself(&self, refcounts: &Refcounts, index: u64, block: HostOffset) -> Result<bool> {
        let own = self.geometry().host_cluster(block).value();
        if self.tables.guard().kinds_at(own) != OverlapChecks::REFCOUNT_BLOCK {
            return Ok(false);
        }
        let (width, per_block) = (self.geometry().refcount_width(), self.geometry().refcount_block_entries());
        let mut at = index * per_block;
        while at < (index + 1) * per_block {
            let Some(slot) = self.slot(refcounts, at)? else { return Ok(false) };
            let own = (slot.base..slot.end).contains(&own).then(|| own - slot.base);
            let expected = |word| match own {
                Some(own) if width.word_index(own) == word => width.insert(0, own, 1),
                _ => 0,
            };
            if (0..slot.page.len()).any(|word| slot.page.word(word) != expected(word)) {
                return Ok(false);
            }
            at = slot.end;
        }
        Ok(true)
    }

    /// The first cluster after all with a refcount; `None` if an entry of the table is damaged. Disk: reads
    /// refcount blocks from the end on.
    pub(crate) fn counted_end(&self) -> Result<Option<u64>> {
        let refcounts = lock(&self.state);
        let (width, per_block) = (self.geometry().refcount_width(), self.geometry().refcount_block_entries());
        let per_word = u64::from(64 / width.bits());
        for (index, &raw) in refcounts.table.iter().enumerate().rev().filter(|&(_, &raw)| raw != 0) {
            if !matches!(decode_table_entry(raw, self.geometry()), Ok(Some(_))) {
                return Ok(None);
            }
            let first = index as u64 * per_block;
            let mut end = first + per_block;
            while end > first {
                let Some(slot) = self.slot(&refcounts, end - 1)? else { return Ok(None) };
                for word in (0..slot.page.len()).rev().filter(|&word| slot.page.word(word) != 0) {
                    let numbers = word as u64 * per_word..(word as u64 + 1) * per_word;
                    let counted = |&number: &u64| width.extract(slot.page.word(word), number) != 0;
                    if let Some(last) = numbers.rev().find(counted) {
                        return Ok(Some(slot.base + last + 1));
                    }
                }
                end = slot.base;
            }
        }
        Ok(None)
    }
}
