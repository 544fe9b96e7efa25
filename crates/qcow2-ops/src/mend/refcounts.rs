//! Derives new refcounts from the references, writes them to unused clusters, and corrects the copied flags.

use super::fix::Fix;
use super::job::{Job, failed, storage};
use crate::check::counters::Counters;
use crate::check::{count_references, stored_refcount};
use crate::error::{Error, ErrorKind, Result};
use qcow2_core::{HostOffset, Storage};
use qcow2_format::header::HeaderField;
use qcow2_format::l1::{self, L1Entry};
use qcow2_format::l2::{L2Entry, L2Format};
use qcow2_format::refcount::encode_table_entry;
use qcow2_format::{Geometry, L2Index, bytes};
use std::collections::BTreeSet;
use std::ops::Range;

/// Location of the new structure, in clusters: the blocks, followed by the table.
struct Place {
    blocks: u64,
    table: u64,
    first: u64,
}

impl Place {
    fn own(&self) -> Range<u64> {
        self.first..self.first + self.blocks + self.table
    }
}

impl Job<'_> {
    /// Writes a new refcount structure with the references of the draft, and corrects the copied flags of the
    /// active state. Clusters without references become free, unless a table is missing that may refer to
    /// them.
    pub(super) fn mend_refcounts(&mut self) -> Result<()> {
        let format = self.format;
        let geometry = format.geometry;
        let place = self.place(&geometry)?;
        let old = self.header.clone();
        let old_table = self.walk(&old, |walk| walk.refcount_table().map_err(failed))?;
        let old_clusters = self.refcount_clusters(&old_table);
        // Counted without the old structure, which becomes free.
        let mut bare = old.clone();
        bare.refcount_table_clusters = 0;
        let (executor, progress) = (self.executor, self.progress);
        let mut next = 0;
        let mut flags = 0;
        let this = &*self;
        let active = this.active_tables(&format)?;
        this.walk(&bare, |walk| {
            count_references(walk, executor, progress, &mut |counters| {
                let mut count = |cluster: u64| {
                    let counted = counters.count(cluster);
                    let own = u64::from(place.own().contains(&cluster));
                    match counted == 0 && old_clusters.contains(&cluster) {
                        // The old structure becomes free.
                        true => Ok(own),
                        false => this.kept_count(counted, cluster, walk, &old_table).map(|count| count + own),
                    }
                };
                let per_block = geometry.refcount_block_entries();
                while next < place.blocks && next * per_block < counters.window().end {
                    this.write_block(next, &place, &geometry, &mut count)?;
                    next += 1;
                }
                flags += this.copied_flags(&format, &active, counters)?;
                Ok(())
            })
        })?;
        while next < place.blocks {
            let own = |cluster: u64| Ok(u64::from(place.own().contains(&cluster)));
            this.write_block(next, &place, &geometry, &mut { own })?;
            next += 1;
        }
        let at = |cluster: u64| HostOffset::new(cluster * geometry.cluster_size());
        let mut table = vec![0; (place.table * geometry.cluster_size() / 8) as usize];
        for (block, entry) in (0..place.blocks).zip(&mut table) {
            *entry = encode_table_entry(Some(at(place.first + block)));
        }
        let offset = at(place.first + place.blocks);
        this.set_words(offset, &table)?;
        self.set_header(&[HeaderField::RefcountTable { offset, clusters: place.table as u32 }])?;
        self.fixed(Fix::Refcounts { offset: at(place.first), blocks: place.blocks });
        if flags > 0 {
            self.fixed(Fix::CopiedFlags { count: flags });
        }
        Ok(())
    }

    /// Allocates clusters for the blocks, which count themselves and the table as well, and for the table.
    fn place(&mut self, geometry: &Geometry) -> Result<Place> {
        let needed = |clusters: u64| {
            let blocks = clusters.div_ceil(geometry.refcount_block_entries());
            (blocks, geometry.clusters_for(blocks * 8))
        };
        let (mut blocks, mut table) = (1, 1);
        while (blocks, table) != needed(self.end + blocks + table) {
            let wanted = needed(self.end + blocks + table);
            (blocks, table) = (wanted.0.max(blocks), wanted.1.max(table));
        }
        let first = self.take(blocks + table, 0)?;
        Ok(Place { blocks, table, first })
    }

    /// The new refcount of `cluster` with `counted` references. A cluster without references that had a
    /// refcount keeps 1 if an ambiguous entry or a missing table may refer to it.
    fn kept_count(
        &self,
        counted: u64,
        cluster: u64,
        walk: &qcow2_core::walk::Walk<'_>,
        old_table: &[u64],
    ) -> Result<u64> {
        let doubtful = counted == 0 && (self.tables_missing || self.kept.contains(&cluster));
        if !doubtful {
            return Ok(counted);
        }
        let stored = stored_refcount(walk, old_table, cluster)?;
        Ok(u64::from(stored.is_some_and(|stored| stored > 0)))
    }

    fn write_block(
        &self,
        block: u64,
        place: &Place,
        geometry: &Geometry,
        count: &mut dyn FnMut(u64) -> Result<u64>,
    ) -> Result<()> {
        let width = geometry.refcount_width();
        let per_block = geometry.refcount_block_entries();
        let mut words = vec![0u64; (geometry.cluster_size() / 8) as usize];
        for slot in 0..per_block {
            let count = count(block * per_block + slot)?;
            if count > width.max() {
                let text = format!("a cluster has {count} references, its refcount holds {}", width.max());
                return Err(Error::new(ErrorKind::Unsupported, text));
            }
            if count > 0 {
                let word = &mut words[width.word_index(slot)];
                *word = width.insert(*word, slot, count);
            }
        }
        self.set_words(HostOffset::new((place.first + block) * geometry.cluster_size()), &words)
    }

    /// The valid entries of the active L1 table that point into the file: host offset and value of each.
    fn active_tables(&self, format: &L2Format) -> Result<Vec<(HostOffset, u64)>> {
        let (start, entries) = (self.header.l1_table_offset, u64::from(self.header.l1_size));
        let len = self.draft.len().map_err(storage)?;
        let mut content = vec![0; (entries * 8) as usize];
        self.draft.read_padded(start, &mut content).map_err(storage)?;
        let places = (start.value()..).step_by(8).map(HostOffset::new);
        let leads = |raw: u64| {
            let entry = L1Entry::decode(raw, &format.geometry).ok();
            entry.and_then(|entry| entry.l2_table).is_some_and(|table| table.value() < len)
        };
        Ok(places.zip(bytes::words(&content)).filter(|&(_, raw)| leads(raw)).collect())
    }

    /// Corrects the copied flags of the active state, as far as the counts of this window tell. Returns the
    /// number of changed flags.
    fn copied_flags(
        &self,
        format: &L2Format,
        active: &[(HostOffset, u64)],
        counters: &Counters,
    ) -> Result<u64> {
        let geometry = format.geometry;
        let (mut changed, mut seen) = (0, BTreeSet::new());
        for &(at, raw) in active {
            let table = HostOffset::new(l1::without_copied(raw));
            let cluster = geometry.host_cluster(table).value();
            if counters.window().contains(&cluster) {
                let wanted = l1::with_copied(raw, counters.count(cluster) == 1);
                if wanted != raw {
                    self.set_words(at, &[wanted])?;
                    changed += 1;
                }
            }
            if !seen.insert(table) {
                // All entries of a damaged L1 table may point to one table.
                continue;
            }
            let content = self.table(table)?;
            if !self.is_mostly_l2(&content)? {
                // The L1 entry points to guest data, not to a table: writing flags there would change it.
                continue;
            }
            for index in 0..geometry.l2_entries() {
                let Some((raw, bitmap)) = format.words_at(&content, L2Index::new(index)) else { break };
                let Some(host) = standard_host(format, raw, bitmap) else { continue };
                let cluster = geometry.host_cluster(host).value();
                let copied = match format.external_data {
                    true => true,
                    false if counters.window().contains(&cluster) => counters.count(cluster) == 1,
                    false => continue,
                };
                let wanted = L2Format::with_copied_flag(raw, copied);
                if wanted != raw {
                    let at = table.value().saturating_add(index * geometry.l2_entry_size());
                    self.set_words(HostOffset::new(at), &[wanted])?;
                    changed += 1;
                }
            }
        }
        Ok(changed)
    }
}

/// The host cluster of a valid entry that is not compressed.
fn standard_host(format: &L2Format, raw: u64, bitmap: u64) -> Option<HostOffset> {
    match format.decode(raw, bitmap) {
        Ok(L2Entry::Standard(entry)) => entry.host,
        _ => None,
    }
}
