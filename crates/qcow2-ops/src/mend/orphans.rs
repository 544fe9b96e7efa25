//! Repairs L1 entries that point to no L2 table, with L2 tables that no L1 entry points to.

use super::fix::Fix;
use super::job::{Job, failed, storage};
use super::mapping::Slot;
use crate::check::{count_references, stored_refcount};
use crate::error::Result;
use qcow2_core::walk::{Owner, Reference, TablePlace};
use qcow2_core::{HostOffset, Storage};
use qcow2_format::header::HeaderField;
use qcow2_format::l1::{self, L1Entry};
use qcow2_format::l2::L2Entry;
use qcow2_format::refcount::decode_table_entry;
use qcow2_format::{L2Index, bytes};
use std::collections::{BTreeMap, BTreeSet};

/// Clusters past the end of the file whose refcounts are looked at.
const PAST_END: u64 = 64;
/// Limit for the clusters that are examined as possible L2 tables. Origin: ours; each is read.
const MAX_CANDIDATES: usize = 1 << 14;

/// Clusters that hold metadata other than L2 tables.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    /// The header, the active L1 table, and a refcount structure that counts itself, but for blocks that may
    /// be L2 tables.
    certain: BTreeSet<u64>,
    /// Clusters that other tables point to. These tables may be damaged.
    claimed: BTreeSet<u64>,
    /// Clusters of a refcount structure that contradicts itself: the header may name the wrong one.
    doubtful: BTreeSet<u64>,
}

impl Metadata {
    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.certain.contains(&cluster) || self.claimed.contains(&cluster) || self.doubtful.contains(&cluster)
    }

    /// True if the cluster may as well be what an L1 entry says.
    pub(super) fn may_be_l2(&self, cluster: u64) -> bool {
        self.doubtful.contains(&cluster)
            && !self.certain.contains(&cluster)
            && !self.claimed.contains(&cluster)
    }
}

impl Job<'_> {
    /// The clusters of all metadata except L2 tables, according to the header and the tables. `l1_tables`:
    /// the active L1 table, then those of snapshots.
    pub(super) fn metadata(&self, l1_tables: &[TablePlace]) -> Result<Metadata> {
        let geometry = self.format.geometry;
        let header = self.header.clone();
        let clusters = geometry.clusters_for(self.draft.len().map_err(storage)?);
        let run = |start: HostOffset, len: u64| {
            let first = geometry.host_cluster(start).value();
            let end = geometry.clusters_for(start.value().saturating_add(len)).min(clusters);
            first..end.max(first)
        };
        let mut found = Metadata::default();
        self.walk(&header, |walk| {
            for Reference { owner, offset, len, .. } in walk.header_references() {
                match owner {
                    Owner::Header | Owner::ActiveL1 => found.certain.extend(run(offset, len)),
                    // With its blocks, below.
                    Owner::RefcountTable => {}
                    _ => found.claimed.extend(run(offset, len)),
                }
            }
            for table in l1_tables.iter().skip(1).copied().chain(walk.bitmaps().map_err(failed)?.0) {
                found.claimed.extend(run(table.offset, table.len()));
            }
            if let Some(table) = walk.snapshots(&mut |_| {}).map_err(failed)? {
                found.claimed.extend(run(walk.header().snapshots_offset, table.len));
            }
            let refcounts = walk.refcount_table().map_err(failed)?;
            let own = self.refcount_clusters(&refcounts);
            // A refcount structure that counts the header and itself once, and nothing past the end, can be
            // trusted, if all of its table are entries: guest data counts everything.
            let counts = |cluster, wanted| {
                stored_refcount(walk, &refcounts, cluster).map(|count| count.unwrap_or(0) == wanted)
            };
            let mut trusted = refcounts.iter().all(|&raw| decode_table_entry(raw, &geometry).is_ok());
            for cluster in [0].into_iter().chain(own.iter().copied()) {
                trusted = trusted && counts(cluster, 1)?;
            }
            for cluster in clusters..clusters.saturating_add(PAST_END) {
                trusted = trusted && counts(cluster, 0)?;
            }
            let tables = run(header.refcount_table_offset, refcounts.len() as u64 * 8);
            for cluster in own {
                // What reads as an L2 table may be one, and the entry that makes a block of it damaged.
                let host = HostOffset::new(cluster * geometry.cluster_size());
                let certain = trusted && (tables.contains(&cluster) || !self.is_l2_table(host)?);
                match (certain, trusted) {
                    (true, _) => found.certain.insert(cluster),
                    (false, true) => found.claimed.insert(cluster),
                    (false, false) => found.doubtful.insert(cluster),
                };
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// The clusters of a refcount structure, as far as they are in the file. `refcounts`: the entries of its
    /// table.
    pub(super) fn refcount_clusters(&self, refcounts: &[u64]) -> BTreeSet<u64> {
        let geometry = self.format.geometry;
        let first = geometry.host_cluster(self.header.refcount_table_offset).value();
        let table = first..first.saturating_add(geometry.clusters_for(refcounts.len() as u64 * 8));
        let blocks = refcounts.iter().filter_map(|&raw| decode_table_entry(raw, &geometry).ok().flatten());
        let blocks = blocks.map(|block| geometry.host_cluster(block).value());
        table.chain(blocks).filter(|&cluster| cluster < self.end).collect()
    }

    /// The same for the table that the header points to.
    pub(super) fn refcount_clusters_now(&self) -> Result<BTreeSet<u64>> {
        let refcounts = self.walk(&self.header, |walk| walk.refcount_table().map_err(failed))?;
        Ok(self.refcount_clusters(&refcounts))
    }

    /// Searches for the active L1 table if the header points to something else, that is, if none of the
    /// entries there points to an L2 table. Repairs the header if exactly one unreferenced cluster starts a
    /// table whose nonzero entries all point to L2 tables.
    pub(super) fn mend_active_l1(&mut self) -> Result<()> {
        let entries = self.header.l1_size;
        if entries == 0 || self.may_be_l1_table(self.header.l1_table_offset, entries)? {
            return Ok(());
        }
        let own = self.refcount_clusters_now()?;
        let Some((mut candidates, _)) = self.unreferenced()? else { return Ok(()) };
        candidates.retain(|cluster| !own.contains(cluster) && !self.replaced.contains(cluster));
        let mut found = Vec::new();
        for cluster in candidates {
            let offset = HostOffset::new(cluster * self.format.geometry.cluster_size());
            let (tables, others) = self.l2_tables_of(offset, entries)?;
            if tables > 0 && others == 0 {
                found.push(offset);
            }
        }
        if let [offset] = found[..] {
            self.set_header(&[HeaderField::L1 { entries, offset }])?;
            self.fixed(Fix::ActiveL1 { offset });
        }
        Ok(())
    }

    /// Whether one of the `entries` words at `offset` leads to what is an L2 table or may be a damaged one.
    /// Bytes that are all zero may be anything.
    fn may_be_l1_table(&self, offset: HostOffset, entries: u32) -> Result<bool> {
        let mut content = vec![0; entries as usize * 8];
        self.draft.read_padded(offset, &mut content).map_err(storage)?;
        let len = self.draft.len().map_err(storage)?;
        let mut seen = BTreeSet::new();
        for raw in bytes::words(&content).filter(|&raw| raw != 0) {
            let host = HostOffset::new(l1::without_copied(l1::rounded(raw, &self.format.geometry)));
            if host.value() == 0 || host.value() >= len || !seen.insert(host) {
                continue;
            }
            let table = self.table(host)?;
            if table.iter().any(|&byte| byte != 0) && self.is_mostly_l2(&table)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Interprets the `entries` words at `offset` as L1 entries. Returns the number of those that point to
    /// something that looks like an L2 table, and the number of other nonzero ones.
    pub(super) fn l2_tables_of(&self, offset: HostOffset, entries: u32) -> Result<(u64, u64)> {
        let mut content = vec![0; entries as usize * 8];
        self.draft.read_padded(offset, &mut content).map_err(storage)?;
        let len = self.draft.len().map_err(storage)?;
        let (mut tables, mut others) = (0, 0);
        let mut seen = BTreeMap::new();
        for raw in bytes::words(&content).filter(|&raw| raw != 0) {
            let table = HostOffset::new(l1::without_copied(l1::rounded(raw, &self.format.geometry)));
            let inside = table.value() > 0 && table.value() < len;
            let known = seen.get(&table).copied();
            let is_table = match known {
                Some(is_table) => is_table,
                None => inside && self.is_l2_table(table)?,
            };
            seen.insert(table, is_table);
            match is_table {
                true => tables += 1,
                false => others += 1,
            }
        }
        Ok((tables, others))
    }

    /// Points `slots` to the L2 table that they lost, if exactly one table is a candidate: it has a refcount
    /// above 0, nothing refers to it, and it maps clusters that nothing else maps. All slots must have the
    /// same word, which means that they pointed to the same table. `tables`: offsets of the L2 tables that
    /// are known. Returns the table.
    pub(super) fn fill_slots(
        &mut self,
        slots: &[Slot],
        metadata: &Metadata,
        tables: &BTreeSet<u64>,
    ) -> Result<Option<u64>> {
        if slots.is_empty() {
            return Ok(None);
        }
        slots.iter().try_for_each(|slot| self.set_words(slot.at, &[0]))?;
        let said = L1Entry::decode(slots[0].raw, &self.format.geometry).ok().and_then(|entry| entry.l2_table);
        let orphans = self.orphans(said, metadata, tables)?;
        let one_word =
            slots.iter().all(|slot| l1::without_copied(slot.raw) == l1::without_copied(slots[0].raw));
        let table = match (orphans.as_deref(), one_word) {
            (Some([only]), true) => *only,
            _ => {
                // Unreferenced clusters are kept if any of them may be the lost table; if none looks like
                // one, nothing is lost.
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

    /// The L2 tables that a slot may have pointed to: unreferenced clusters that look like one. `None` if
    /// there are too many clusters to examine. `said`: the table that the slot points to now. `tables`: the
    /// L2 tables that are known; what leads to one of them is an L1 table, perhaps of a snapshot that lost
    /// it.
    fn orphans(
        &mut self,
        said: Option<HostOffset>,
        metadata: &Metadata,
        tables: &BTreeSet<u64>,
    ) -> Result<Option<Vec<HostOffset>>> {
        let Some((candidates, free)) = self.unreferenced()? else { return Ok(None) };
        let cluster = |table: HostOffset| self.format.geometry.host_cluster(table).value();
        // The slot may be right, and the metadata that claims its cluster wrong.
        if let Some(said) = said.filter(|&said| !metadata.certain.contains(&cluster(said)))
            && self.is_l2_table(said)?
            && self.maps_any(said, &free)?
            && !self.leads_to_any(said, tables)?
        {
            return Ok(Some(vec![said]));
        }
        // What leads to the damaged table is an L1 table too.
        let own: BTreeSet<u64> = said.iter().map(|said| said.value()).collect();
        let (mut known, mut unknown) = (Vec::new(), Vec::new());
        for cluster in candidates {
            let host = HostOffset::new(cluster * self.format.geometry.cluster_size());
            if self.is_l2_table(host)? && self.maps_any(host, &free)? {
                if self.leads_to_any(host, tables)? || self.leads_to_any(host, &own)? {
                    self.tables_missing = true;
                    continue;
                }
                if metadata.contains(cluster) { &mut known } else { &mut unknown }.push(host);
            }
        }
        // A cluster that other metadata claims counts only if the slot itself points to it: one of the two is
        // wrong.
        Ok(Some(match said.filter(|said| known.contains(said)) {
            _ if !unknown.is_empty() => unknown,
            Some(said) => vec![said],
            None => Vec::new(),
        }))
    }

    /// The clusters with a refcount above 0 and without references, and those with a refcount above the
    /// number of their references: what lost tables map, snapshots' too. `None` if there are too many to
    /// examine. References from the refcount structure don't count: its entries may be the damaged ones.
    pub(super) fn unreferenced(&self) -> Result<Option<(Vec<u64>, BTreeSet<u64>)>> {
        let mut bare = self.header.clone();
        bare.refcount_table_clusters = 0;
        let table = self.walk(&self.header, |walk| walk.refcount_table().map_err(failed))?;
        let clusters = self.format.geometry.clusters_for(self.draft.len().map_err(storage)?);
        let (mut free, mut short, mut many) = (Vec::new(), BTreeSet::new(), false);
        self.walk(&bare, |walk| {
            count_references(walk, self.executor, self.progress, &mut |counters| {
                for cluster in counters.window().filter(|&cluster| cluster > 0 && cluster < clusters) {
                    many |= free.len() >= MAX_CANDIDATES;
                    if many {
                        return Ok(());
                    }
                    let (count, stored) = (counters.count(cluster), stored_refcount(walk, &table, cluster)?);
                    if stored.is_none_or(|stored| stored <= count) {
                        continue;
                    }
                    if count == 0 {
                        free.push(cluster);
                    }
                    if count == 0 || short.len() < 2 * MAX_CANDIDATES {
                        short.insert(cluster);
                    }
                }
                Ok(())
            })
        })?;
        Ok((!many).then_some((free, short)))
    }

    /// Whether an entry of the table at `host` leads to one of `tables`.
    fn leads_to_any(&self, host: HostOffset, tables: &BTreeSet<u64>) -> Result<bool> {
        let format = self.format;
        if format.external_data {
            return Ok(false);
        }
        let mut content = vec![0; format.geometry.cluster_size() as usize];
        self.draft.read_padded(host, &mut content).map_err(storage)?;
        let words = |index| format.words_at(&content, L2Index::new(index)).unwrap_or_default();
        let mut hosts = (0..format.geometry.l2_entries()).map(words).filter_map(|(raw, bitmap)| match format
            .decode(raw, bitmap)
        {
            Ok(L2Entry::Standard(entry)) => entry.host,
            _ => None,
        });
        Ok(hosts.any(|host| tables.contains(&host.value())))
    }

    /// True if the table at `host` maps a cluster in `free`; with an external data file, if it maps anything.
    fn maps_any(&self, host: HostOffset, free: &BTreeSet<u64>) -> Result<bool> {
        let format = self.format;
        let content = self.table(host)?;
        if content.is_empty() {
            return Ok(false);
        }
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
