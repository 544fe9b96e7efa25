//! Places L2 tables by what they map where: data that goes on over the border of two ranges, and offsets in a
//! data file.

use super::entry::Leads;
use super::job::Job;
use super::place::Slot;
use super::report::Evidence;
use super::tables::Candidate;
use crate::error::Result;
use qcow2_core::HostOffset;
use qcow2_format::bytes;
use qcow2_format::l2::L2Entry;
use qcow2_format::limit::MAX_L1_ENTRIES;
use std::collections::BTreeMap;

/// Clusters of metadata that a writer puts between the data of one range and that of the next, at most: the
/// table of the next, a refcount block, and one to spare.
const MAX_BETWEEN: u64 = 3;
/// A compressed stream ends in the last of its sectors.
const SECTOR: u64 = 512;

/// The tables whose first entry, and the end of whose last entry, are at a place in the file.
#[derive(Default)]
struct Borders {
    /// Tables by the cluster, or by the byte, where their first entry leads to.
    heads: BTreeMap<u64, u64>,
    streams: BTreeMap<u64, u64>,
    /// The table whose data follows that of a table, and the reverse.
    next: BTreeMap<u64, u64>,
    previous: BTreeMap<u64, u64>,
}

impl Job<'_> {
    /// Gives those of `orphans` a slot that map data behind or before that of a table with a known range:
    /// what is written in one go over the border of two ranges is side by side in the file. Disk: two small
    /// reads of each table.
    pub(super) fn by_borders(
        &self,
        slots: &mut Vec<Slot>,
        orphans: &mut BTreeMap<u64, Candidate>,
        grows: bool,
    ) -> Result<()> {
        if orphans.is_empty() || !slots.iter().any(Slot::is_open) {
            return Ok(());
        }
        let geometry = self.known.format.geometry;
        let cluster_of = |slot: &Slot| slot.table().map(|at| geometry.host_cluster(at).value());
        let tables: Vec<u64> = slots.iter().filter_map(cluster_of).chain(orphans.keys().copied()).collect();
        let borders = self.borders(&tables)?;
        let mut at = 0;
        while at < slots.len() {
            let next = cluster_of(&slots[at]).and_then(|table| borders.next.get(&table));
            if let Some(&next) = next.filter(|next| orphans.contains_key(next)) {
                let room = grows && at + 1 < MAX_L1_ENTRIES as usize;
                self.settle(slots, orphans, (at + 1, next), room, Evidence::Border);
            }
            at += 1;
        }
        for at in (1..slots.len()).rev() {
            let previous = cluster_of(&slots[at]).and_then(|table| borders.previous.get(&table));
            if let Some(&previous) = previous.filter(|previous| orphans.contains_key(previous)) {
                self.settle(slots, orphans, (at - 1, previous), false, Evidence::Border);
            }
        }
        Ok(())
    }

    fn borders(&self, tables: &[u64]) -> Result<Borders> {
        let mut found = Borders::default();
        for (number, &table) in tables.iter().enumerate() {
            if number % 256 == 0 {
                self.go_on()?;
            }
            match self.entry(table, 0)? {
                Some(L2Entry::Standard(entry)) if entry.allocated != 0 => {
                    let host = entry.host.map(|host| self.known.format.geometry.host_cluster(host).value());
                    found.heads.extend(host.map(|host| (host, table)));
                }
                Some(L2Entry::Compressed(stream)) => {
                    found.streams.insert(stream.host.value(), table);
                }
                _ => {}
            }
        }
        let last = self.known.format.geometry.l2_entries() - 1;
        for &table in tables {
            let next = match self.entry(table, last)? {
                Some(L2Entry::Standard(entry)) if entry.allocated != 0 => {
                    let host = entry.host.map(|host| self.known.format.geometry.host_cluster(host).value());
                    host.and_then(|host| self.behind(host, &found))
                }
                Some(L2Entry::Compressed(stream)) => {
                    let end = stream.host.value().saturating_add(stream.len);
                    let start = end.saturating_sub(SECTOR - 1).max(stream.host.value() + 1);
                    found.streams.range(start..=end.max(start)).next().map(|(_, &next)| next)
                }
                _ => None,
            };
            if let Some(next) = next.filter(|&next| next != table) {
                found.next.insert(table, next);
                found.previous.insert(next, table);
            }
        }
        Ok(found)
    }

    /// The table whose data begins behind cluster `host`, with nothing but metadata between.
    fn behind(&self, host: u64, found: &Borders) -> Option<u64> {
        let start = host.checked_add(1)?;
        let (&head, &next) = found.heads.range(start..=start.saturating_add(MAX_BETWEEN)).next()?;
        (start..head).all(|between| self.known.metadata.contains(between)).then_some(next)
    }

    /// Entry `index` of the table in cluster `table`, if it leads to something.
    fn entry(&self, table: u64, index: u64) -> Result<Option<L2Entry>> {
        let (geometry, mut words) = (self.known.format.geometry, [0; 16]);
        let at = geometry.bytes_of(table).saturating_add(index * geometry.l2_entry_size());
        self.bytes.read(HostOffset::new(at), &mut words[..geometry.l2_entry_size() as usize])?;
        let word = |at| bytes::read_u64(&words, at).unwrap_or(0);
        Ok(match self.known.judge(word(0), word(8)) {
            Leads::To(entry) => Some(entry),
            Leads::Lost(_) => None,
        })
    }

    /// Gives the tables of an image with a data file the range that their entries tell: a cluster has the
    /// same offset in the data file as on the disk. Only where all entries of a table agree, and no other
    /// table tells the same.
    pub(super) fn by_data_offsets(
        &self,
        slots: &mut Vec<Slot>,
        orphans: &mut BTreeMap<u64, Candidate>,
        grows: bool,
    ) -> Result<()> {
        if !self.known.format.external_data {
            return Ok(());
        }
        let mut told: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for &cluster in orphans.keys() {
            self.go_on()?;
            if let Some(index) = self.told_range(cluster)?.filter(|&index| index < MAX_L1_ENTRIES) {
                told.entry(index).or_default().push(cluster);
            }
        }
        for (index, tables) in told {
            if let [only] = tables[..] {
                self.settle(slots, orphans, (index as usize, only), grows, Evidence::DataOffset);
            }
        }
        Ok(())
    }

    /// The range that all entries of a table agree on.
    fn told_range(&self, cluster: u64) -> Result<Option<u64>> {
        let geometry = self.known.format.geometry;
        let (mut range, mut agree) = (None, true);
        self.known.entries(&self.cluster(cluster)?, |index, raw, bitmap| {
            let Leads::To(L2Entry::Standard(entry)) = self.known.judge(raw, bitmap) else { return };
            let Some(host) = entry.host.filter(|_| entry.allocated != 0) else { return };
            let start = host.value().checked_sub(geometry.bytes_of(index));
            let own = start.filter(|start| start % geometry.l2_coverage() == 0);
            let own = own.map(|start| start / geometry.l2_coverage());
            agree &= own.is_some() && range.is_none_or(|range| Some(range) == own);
            range = range.or(own);
        });
        Ok(range.filter(|_| agree))
    }
}
