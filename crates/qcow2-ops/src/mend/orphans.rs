//! L1 entries that lead to no L2 table, and the L2 tables that no L1 entry leads to.

use super::fix::Fix;
use super::job::{Job, failed, storage};
use super::mapping::Slot;
use crate::check::{count_references, stored_refcount};
use crate::error::Result;
use qcow2_core::walk::{Reference, TablePlace};
use qcow2_core::{HostOffset, Storage};
use qcow2_format::L2Index;
use qcow2_format::l1::{self, L1Entry};
use qcow2_format::l2::L2Entry;
use qcow2_format::refcount::decode_table_entry;
use std::collections::BTreeSet;

/// Clusters that are looked at as perhaps a lost L2 table. Origin: ours; each is read.
const MAX_CANDIDATES: usize = 1 << 14;

impl Job<'_> {
    /// The clusters of all metadata but L2 tables, as the header and the tables tell. `l1_tables`: the active
    /// one and those of snapshots.
    pub(super) fn metadata(&self, l1_tables: &[TablePlace]) -> Result<BTreeSet<u64>> {
        let geometry = self.format.geometry;
        let header = self.header.clone();
        let clusters = geometry.clusters_for(self.draft.len().map_err(storage)?);
        let mut found = BTreeSet::new();
        let mut add = |start: HostOffset, len: u64| {
            let first = geometry.host_cluster(start).value();
            let end = geometry.clusters_for(start.value().saturating_add(len)).min(clusters);
            found.extend(first..end.max(first));
        };
        self.walk(&header, |walk| {
            for Reference { offset, len, .. } in walk.header_references() {
                add(offset, len);
            }
            for table in l1_tables {
                add(table.offset, table.len());
            }
            for table in walk.bitmaps().map_err(failed)?.0 {
                add(table.offset, table.len());
            }
            if let Some(table) = walk.snapshots(&mut |_| {}).map_err(failed)? {
                add(walk.header().snapshots_offset, table.len);
            }
            for raw in walk.refcount_table().map_err(failed)? {
                if let Ok(Some(block)) = decode_table_entry(raw, &geometry) {
                    add(block, geometry.cluster_size());
                }
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Makes `slots` lead to the L2 table that they lost, where there is exactly one such table: counted as
    /// used, referred to by nothing, and mapping clusters that nothing else maps. Slots with the same word led
    /// to the same table. Returns the table.
    pub(super) fn fill_slots(&mut self, slots: &[Slot], metadata: &BTreeSet<u64>) -> Result<Option<u64>> {
        if slots.is_empty() {
            return Ok(None);
        }
        slots.iter().try_for_each(|slot| self.set_words(slot.at, &[0]))?;
        let orphans = self.orphans()?.map(|orphans| {
            // What else is known as metadata comes after what is not: either of both claims may be wrong.
            let known =
                |table: &HostOffset| metadata.contains(&self.format.geometry.host_cluster(*table).value());
            let (known, unknown): (Vec<_>, Vec<_>) = orphans.into_iter().partition(known);
            let said =
                L1Entry::decode(slots[0].raw, &self.format.geometry).ok().and_then(|entry| entry.l2_table);
            match (unknown.is_empty(), said.filter(|table| known.contains(table))) {
                (true, Some(said)) => vec![said],
                (true, None) => known,
                (false, _) => unknown,
            }
        });
        let one_word =
            slots.iter().all(|slot| l1::without_copied(slot.raw) == l1::without_copied(slots[0].raw));
        let table = match (orphans.as_deref(), one_word) {
            (Some([only]), true) => *only,
            _ => {
                // What they may have led to is kept; where there is nothing of the kind, nothing is lost.
                self.tables_missing |= orphans.is_none_or(|orphans| !orphans.is_empty());
                slots.iter().try_for_each(|slot| self.set_words(slot.at, &[slot.raw]))?;
                return Ok(None);
            }
        };
        let refcounts = self.walk(&self.header, |walk| walk.refcount_table().map_err(failed))?;
        let cluster = self.format.geometry.host_cluster(table).value();
        let stored = self.walk(&self.header, |walk| stored_refcount(walk, &refcounts, cluster))?;
        for slot in slots {
            let copied = stored == Some(1);
            let to = L1Entry { l2_table: Some(table), copied }.encode();
            self.set_words(slot.at, &[to])?;
            if to != slot.raw {
                self.fixed(Fix::L1Entry { at: slot.at, from: slot.raw, to });
            }
        }
        Ok(Some(table.value()))
    }

    /// The L2 tables that nothing refers to; `None` where there are too many candidates to look at.
    fn orphans(&self) -> Result<Option<Vec<HostOffset>>> {
        // Without the refcount structure, whose own entries may be what is wrong.
        let mut bare = self.header.clone();
        bare.refcount_table_clusters = 0;
        let table = self.walk(&self.header, |walk| walk.refcount_table().map_err(failed))?;
        let clusters = self.format.geometry.clusters_for(self.draft.len().map_err(storage)?);
        let (mut free, mut candidates, mut many) = (BTreeSet::new(), Vec::new(), false);
        self.walk(&bare, |walk| {
            count_references(walk, self.executor, self.progress, &mut |counters| {
                for cluster in counters.window().filter(|&cluster| cluster > 0 && cluster < clusters) {
                    if counters.count(cluster) > 0
                        || stored_refcount(walk, &table, cluster)?.is_none_or(|stored| stored == 0)
                    {
                        continue;
                    }
                    free.insert(cluster);
                    many |= candidates.len() >= MAX_CANDIDATES;
                    if !many {
                        candidates.push(cluster);
                    }
                }
                Ok(())
            })
        })?;
        if many {
            return Ok(None);
        }
        let mut found = Vec::new();
        for cluster in candidates {
            let host = HostOffset::new(cluster * self.format.geometry.cluster_size());
            if self.is_l2_table(host)? && self.maps_any(host, &free)? {
                found.push(host);
            }
        }
        Ok(Some(found))
    }

    /// Whether the table at `host` maps a cluster of `free`; in an external data file, whether it maps
    /// anything.
    fn maps_any(&self, host: HostOffset, free: &BTreeSet<u64>) -> Result<bool> {
        let format = self.format;
        let mut content = vec![0; format.geometry.cluster_size() as usize];
        self.draft.read_padded(host, &mut content).map_err(storage)?;
        let is_free = |offset: HostOffset| free.contains(&format.geometry.host_cluster(offset).value());
        Ok((0..format.geometry.l2_entries()).any(|index| {
            let words = format.words_at(&content, L2Index::new(index)).unwrap_or_default();
            match format.decode(words.0, words.1) {
                Ok(L2Entry::Standard(entry)) => match entry.host {
                    Some(host) => format.external_data || is_free(host),
                    None => false,
                },
                Ok(L2Entry::Compressed(stream)) => is_free(stream.host),
                Err(_) => false,
            }
        }))
    }
}
