//! Which L2 table maps which part of the disk.
//!
//! The L1 table tells. What it does not tell (any more) older L1 tables may tell: a table that maps some of
//! the clusters that an older table of a range maps belongs to that range. So does one whose data has a
//! landmark of that range, and one of an image with a data file whose entries tell it. The rest is put beside
//! a table whose data it goes on from, or else where ranges are left over, in the order of the file, and is
//! said to be guessed.

use super::entry::Worth;
use super::job::Job;
use super::marks::Marks;
use super::report::{Evidence, L1Source, Reason};
use super::tables::{Candidate, Found};
use crate::error::Result;
use qcow2_core::HostOffset;
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::MAX_CUT;
use qcow2_format::limit::MAX_L1_ENTRIES;
use qcow2_format::{Geometry, bytes, l1, l2::L2Format};
use std::collections::{BTreeMap, BTreeSet};

/// What one L1 entry comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// No table: unallocated.
    None,
    /// The table there.
    Table(HostOffset, Evidence),
    /// A table of zeroes.
    Empty(HostOffset),
    /// The entry leads to nothing.
    Lost(Reason),
}

impl Slot {
    /// Whether any table may belong here. One that was cut off is known to be none of those in the file.
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Lost(reason) if *reason != Reason::TablePastEnd)
    }

    pub(super) fn table(&self) -> Option<HostOffset> {
        match self {
            Self::Table(table, _) | Self::Empty(table) => Some(*table),
            _ => None,
        }
    }
}

/// All ranges of the disk.
pub(super) struct Placement {
    pub(super) slots: Vec<Slot>,
    pub(super) l1: L1Source,
    pub(super) other_l1: Vec<HostOffset>,
    /// Tables without a place, and the entries that they map.
    pub(super) unplaced: (u64, u64),
}

/// An L1 table: offset and entries.
pub(super) type Place = (HostOffset, u64);

/// Older L1 tables that are looked into, and entries of all of them. Origin: ours.
const MAX_OLDER: usize = 1000;
const MAX_OLDER_ENTRIES: u64 = 1 << 21;
/// Tables of one L1 table whose flags are compared with the refcounts.
const MAX_COMPARED: usize = 256;

/// As many of the older L1 tables as are looked into, each once.
fn limited(older: Vec<Place>) -> Vec<Place> {
    let (mut seen, mut entries) = (BTreeSet::new(), 0u64);
    let mut fits = |place: &Place| {
        entries = entries.saturating_add(place.1);
        entries <= MAX_OLDER_ENTRIES && seen.insert(place.0)
    };
    older.into_iter().filter(|place| fits(place)).take(MAX_OLDER).collect()
}

impl Job<'_> {
    /// Places all tables. `l1`: where the header has the L1 table; `older`: those of snapshots; `entries`:
    /// how many ranges the disk has, if that is known. Disk: reads every table, and looks at every cluster
    /// that none of them leads to.
    pub(super) fn place(
        &mut self,
        l1: Option<Place>,
        older: &[Place],
        entries: Option<u64>,
    ) -> Result<Placement> {
        let mut older = limited(older.to_vec());
        let said = l1;
        let l1 = l1.map(|l1| Ok(self.is_l1(l1)?.then_some(l1))).transpose()?.flatten();
        // A table of zeroes is one too, and may be whole.
        let zeroes = said.map(|l1| Ok(self.l1_words(l1)?.is_empty().then_some(l1))).transpose()?.flatten();
        for &(at, count) in l1.iter().chain(&zeroes).chain(&older) {
            let clusters = self.known.clusters(at, count.saturating_mul(8));
            self.known.metadata.insert_each(clusters);
        }
        let mut slots = match l1 {
            Some(l1) => self.adopt(l1)?,
            None => Vec::new(),
        };
        let mut source = l1.map_or(L1Source::None, |(at, _)| L1Source::Named(at));
        self.claim_older(&older)?;
        let candidates = self.candidates()?;
        self.find_counts(&candidates)?;
        let Found { l2, l1: found } = self.classify(candidates)?;
        let found = limited(found);
        let best = if l1.is_some() { None } else { self.best_l1(&found)? };
        if let Some(best) = best {
            slots = self.adopt(best)?;
            source = L1Source::Found(best.0);
        }
        let others: Vec<Place> = found.into_iter().filter(|place| Some(*place) != best).collect();
        self.claim_older(&others)?;
        older.extend(others);
        older = limited(older);
        let is_free =
            |c: &Candidate| !self.mapped.contains(c.cluster) && !self.known.metadata.contains(c.cluster);
        let rest = l2.into_iter().filter(is_free).collect();
        let mut orphans = self.accept(rest)?;
        if source == L1Source::None && orphans.is_empty() && !self.has_leaks()? {
            // Nothing was ever written: the table of zeroes is whole.
            source = zeroes.map_or(source, |(at, _)| L1Source::Named(at));
        }
        let known = entries.unwrap_or(match source {
            L1Source::None => orphans.len() as u64,
            _ => slots.len() as u64,
        });
        let unknown = if source == L1Source::None { Slot::Lost(Reason::NoTable) } else { Slot::None };
        slots.resize(known.min(MAX_L1_ENTRIES) as usize, unknown);
        self.by_older(&mut slots, &mut orphans, &older)?;
        let mut orphans = orphans.into_iter().map(|orphan| (orphan.cluster, orphan)).collect();
        let grows = entries.is_none() && source == L1Source::None;
        if slots.iter().any(|slot| matches!(slot, Slot::Lost(_))) {
            self.by_data_offsets(&mut slots, &mut orphans, grows)?;
            self.by_landmarks(&mut slots, &mut orphans, grows)?;
            self.by_borders(&mut slots, &mut orphans, grows)?;
        }
        by_order(&mut slots, &mut orphans, self.known.format, self.counts.is_some());
        self.by_age(&mut slots, &older)?;
        let mapped = orphans.values().filter_map(|c: &Candidate| c.l2).map(|shape| shape.mapped).sum();
        let unplaced = (orphans.len() as u64, mapped);
        let other_l1 = older.into_iter().map(|(at, _)| at).collect();
        Ok(Placement { slots, l1: source, other_l1, unplaced })
    }

    /// Whether what should be an L1 table is one: most of its entries lead to an L2 table, or past the end of
    /// the file, which may have been cut.
    fn is_l1(&self, l1: Place) -> Result<bool> {
        let (mut good, mut bad) = (0u64, 0u64);
        for raw in self.l1_words(l1)?.into_iter().filter(|&raw| raw != 0) {
            let entry = L1Entry::decode(raw, &self.known.format.geometry);
            let table = entry.ok().and_then(|entry| entry.l2_table).filter(|_| l1::reserved_bits(raw) == 0);
            let is_table = match table {
                None => false,
                Some(table) if table.value() >= self.bytes.len => true,
                Some(table) => {
                    let cluster = self.known.format.geometry.host_cluster(table).value();
                    cluster > 0 && self.worth_at(cluster)? != Worth::Other
                }
            };
            *(if is_table { &mut good } else { &mut bad }) += 1;
        }
        Ok(good > bad)
    }

    /// The words of an L1 table, without zeroes at its end.
    fn l1_words(&self, (at, entries): Place) -> Result<Vec<u64>> {
        let inside = self.bytes.len.saturating_sub(at.value()).div_ceil(8);
        let mut content = vec![0; entries.min(MAX_L1_ENTRIES).min(inside) as usize * 8];
        self.bytes.read(at, &mut content)?;
        let mut words: Vec<u64> = bytes::words(&content).collect();
        let used = words.iter().rposition(|&word| word != 0).map_or(0, |last| last + 1);
        words.truncate(used);
        Ok(words)
    }

    /// What the entries of an L1 table lead to. No table is used twice.
    fn adopt(&mut self, l1: Place) -> Result<Vec<Slot>> {
        let mut used = Marks::default();
        let mut slots = Vec::new();
        for raw in self.l1_words(l1)? {
            let slot = match L1Entry::decode(raw, &self.known.format.geometry) {
                Ok(L1Entry { l2_table: None, .. }) if raw == 0 => Slot::None,
                Ok(L1Entry { l2_table: Some(table), .. }) => {
                    let cluster = self.known.format.geometry.host_cluster(table).value();
                    match used.insert(cluster) {
                        true => self.look_at(table)?,
                        false => Slot::Lost(Reason::TableShared),
                    }
                }
                _ => Slot::Lost(Reason::NoTable),
            };
            slots.push(slot);
        }
        Ok(slots)
    }

    /// What is at `table`, where an L1 entry leads to. Its clusters are taken by it.
    fn look_at(&mut self, table: HostOffset) -> Result<Slot> {
        self.go_on()?;
        if table.value() >= self.bytes.len {
            // So far behind the end no file was cut: the entry itself is damaged.
            let cut = table.value() / MAX_CUT < self.bytes.len;
            return Ok(Slot::Lost(if cut { Reason::TablePastEnd } else { Reason::NoTable }));
        }
        let cluster = self.known.format.geometry.host_cluster(table).value();
        if self.known.metadata.contains(cluster) {
            return Ok(Slot::Lost(Reason::TableDamaged));
        }
        if self.is_hole(cluster) {
            self.known.metadata.insert(cluster);
            self.tables.insert(cluster);
            return Ok(Slot::Empty(table));
        }
        let content = self.cluster(cluster)?;
        let worth = self.known.worth(&content);
        if worth == Worth::Other {
            return Ok(Slot::Lost(Reason::TableDamaged));
        }
        self.known.metadata.insert(cluster);
        self.tables.insert(cluster);
        self.claim(&content);
        Ok(match worth {
            Worth::Empty => Slot::Empty(table),
            _ => Slot::Table(table, Evidence::L1),
        })
    }

    /// Takes the clusters of older L1 tables' trees: none of them is a lost table.
    fn claim_older(&mut self, older: &[Place]) -> Result<()> {
        let mut seen = Marks::default();
        for &place in older {
            for raw in self.l1_words(place)? {
                let Ok(L1Entry { l2_table: Some(table), .. }) =
                    L1Entry::decode(raw, &self.known.format.geometry)
                else {
                    continue;
                };
                let cluster = self.known.format.geometry.host_cluster(table).value();
                if self.known.metadata.contains(cluster)
                    || table.value() >= self.bytes.len
                    || !seen.insert(cluster)
                {
                    continue;
                }
                self.go_on()?;
                let worth = self.worth_at(cluster)?;
                if worth == Worth::Table {
                    let content = self.cluster(cluster)?;
                    self.claim(&content);
                }
                if worth != Worth::Other {
                    self.mapped.insert(cluster);
                    self.tables.insert(cluster);
                }
            }
        }
        Ok(())
    }

    /// The L1 table that is the disk's own, among several: the one with the most tables whose copied flags
    /// go with the refcounts; of equal ones the first, where a new image has it. One that leads to a
    /// snapshot's tables is a snapshot's.
    fn best_l1(&self, found: &[Place]) -> Result<Option<Place>> {
        let mut best: Option<((u64, u64), Place)> = None;
        for &place in found {
            let (mut tables, mut agreeing, mut others) = (0u64, 0u64, 0u64);
            let mut compared = BTreeSet::new();
            for raw in self.l1_words(place)? {
                let entry = L1Entry::decode(raw, &self.known.format.geometry);
                let Ok(L1Entry { l2_table: Some(table), copied }) = entry else { continue };
                let cluster = self.known.format.geometry.host_cluster(table).value();
                tables += 1;
                let stored = self.counts.as_ref().map(|counts| counts.count(cluster)).transpose()?.flatten();
                agreeing += u64::from(stored.map_or(copied, |count| copied == (count == 1) && count > 0));
                if compared.len() < MAX_COMPARED && compared.insert(cluster) {
                    others += u64::from(self.flags_agree(cluster)? == Some(false));
                }
            }
            let score = (agreeing, tables);
            if others * 20 <= compared.len() as u64 && best.is_none_or(|(other, _)| score > other) {
                best = Some((score, place));
            }
        }
        Ok(best.map(|(_, place)| place))
    }

    /// The slots that lost their table, with the one that the older L1 table has there: if that is a table,
    /// and no slot has it yet.
    fn older_tables(&self, slots: &[Slot], older: Place) -> Result<Vec<(usize, HostOffset)>> {
        let mut found = Vec::new();
        for (index, raw) in self.l1_words(older)?.into_iter().enumerate().take(slots.len()) {
            let entry = L1Entry::decode(raw, &self.known.format.geometry);
            let table = entry.ok().and_then(|entry| entry.l2_table);
            let Some(table) = table.filter(|_| matches!(slots[index], Slot::Lost(_))) else { continue };
            let cluster = self.known.format.geometry.host_cluster(table).value();
            if table.value() < self.bytes.len && self.worth_at(cluster)? == Worth::Table {
                found.push((index, table));
            }
        }
        Ok(found)
    }

    /// Fills ranges that lost their table by what older L1 tables prove of it.
    fn by_older(&mut self, slots: &mut [Slot], orphans: &mut Vec<Candidate>, older: &[Place]) -> Result<()> {
        let mut named: BTreeMap<u64, u64> = BTreeMap::new();
        for &place in older {
            for (_, table) in self.older_tables(slots, place)? {
                *named.entry(table.value()).or_default() += 1;
            }
        }
        let samples = if named.is_empty() { BTreeMap::new() } else { self.samples(orphans)? };
        let mut used = used_tables(slots, &self.known.format.geometry);
        let mut placed = BTreeSet::new();
        for &place in older {
            for (index, table) in self.older_tables(slots, place)? {
                let cluster = self.known.format.geometry.host_cluster(table).value();
                let stored = self.counts.as_ref().map(|counts| counts.count(cluster)).transpose()?.flatten();
                let times = named.get(&table.value()).copied().unwrap_or(u64::MAX);
                if stored.is_some_and(|count| count > times) && used.insert(cluster) {
                    self.known.metadata.insert(cluster);
                    slots[index] = Slot::Table(table, Evidence::Shared);
                    continue;
                }
                let overlapping = self.overlapping(&self.cluster(cluster)?, &samples);
                if let Some(orphan) = overlapping.filter(|orphan| placed.insert(*orphan)) {
                    let at = self.known.format.geometry.bytes_of(orphans[orphan].cluster);
                    slots[index] = Slot::Table(HostOffset::new(at), Evidence::Overlap);
                }
            }
        }
        let mut numbers = 0..;
        orphans.retain(|_| !numbers.next().is_some_and(|number| placed.contains(&number)));
        Ok(())
    }

    /// Fills ranges for which nothing else was found by what they were in an older L1 table.
    fn by_age(&mut self, slots: &mut [Slot], older: &[Place]) -> Result<()> {
        let mut used = used_tables(slots, &self.known.format.geometry);
        for &place in older {
            for (index, table) in self.older_tables(slots, place)? {
                let cluster = self.known.format.geometry.host_cluster(table).value();
                if used.insert(cluster) {
                    self.known.metadata.insert(cluster);
                    slots[index] = Slot::Table(table, Evidence::OldTable);
                }
            }
        }
        Ok(())
    }

    /// Entries of the orphans, to find the one that has some of them in common with another table.
    fn samples(&self, orphans: &[Candidate]) -> Result<BTreeMap<(u64, u64), usize>> {
        let each = (MAX_SAMPLES / orphans.len().max(1)).clamp(2, 64);
        let mut samples = BTreeMap::new();
        for (number, orphan) in orphans.iter().enumerate() {
            let content = self.cluster(orphan.cluster)?;
            let step = (orphan.l2.map_or(0, |shape| shape.mapped) as usize / each).max(1);
            let mut count = 0;
            self.known.entries(&content, |index, raw, bitmap| {
                if !self.known.targets(raw, bitmap).is_empty() {
                    if count % step == 0 {
                        samples.insert((index, without_flags(raw)), number);
                    }
                    count += 1;
                }
            });
        }
        Ok(samples)
    }

    /// The orphan with the most entries in common with `table`.
    fn overlapping(&self, table: &[u8], samples: &BTreeMap<(u64, u64), usize>) -> Option<usize> {
        let mut votes: BTreeMap<usize, u64> = BTreeMap::new();
        self.known.entries(table, |index, raw, _| {
            if let Some(&orphan) = samples.get(&(index, without_flags(raw))) {
                *votes.entry(orphan).or_default() += 1;
            }
        });
        votes.into_iter().max_by_key(|(_, count)| *count).map(|(orphan, _)| orphan)
    }
}

/// The clusters of the tables that have a slot.
fn used_tables(slots: &[Slot], geometry: &Geometry) -> Marks {
    let mut used = Marks::default();
    used.insert_each(
        slots.iter().filter_map(|slot| slot.table()).map(|at| geometry.host_cluster(at).value()),
    );
    used
}

/// Entries that are remembered to compare tables by.
const MAX_SAMPLES: usize = 1 << 20;

fn without_flags(raw: u64) -> u64 {
    L2Format::with_copied_flag(raw, false)
}

/// Places the tables that are left in the ranges that are left: between two tables whose ranges are known
/// those that are between them in the file, then all others from the beginning. Where there are fewer of them
/// than ranges, they are spread over these: file systems have their tables at equal distances. Ranges that
/// lost their table come first, then those that have none, if refcounts tell that the tables are in use
/// (`counted`).
fn by_order(slots: &mut [Slot], orphans: &mut BTreeMap<u64, Candidate>, format: L2Format, counted: bool) {
    let lost = |slot: &Slot| slot.is_open();
    let either = |slot: &Slot| slot.is_open() || *slot == Slot::None;
    fill(slots, orphans, format, &lost);
    if counted {
        fill(slots, orphans, format, &either);
    }
}

/// The place of the one with this `number` among `count` that are spread evenly over `places`, which are no
/// fewer.
fn spread(number: usize, count: usize, places: usize) -> usize {
    ((number + 1) * (places + 1) + count.div_ceil(2)) / (count + 1) - 1
}

fn fill(
    slots: &mut [Slot],
    orphans: &mut BTreeMap<u64, Candidate>,
    format: L2Format,
    needy: &dyn Fn(&Slot) -> bool,
) {
    let size = format.geometry.cluster_size();
    let (mut before, mut at) = (0, 0);
    while at < slots.len() && !orphans.is_empty() {
        if let Some(table) = slots[at].table() {
            (before, at) = (table.value() / size, at + 1);
            continue;
        }
        let end = (at..slots.len()).find(|&next| slots[next].table().is_some());
        let after = end.and_then(|end| slots[end].table()).map_or(u64::MAX, |after| after.value() / size);
        let bounded = at > 0 && end.is_some();
        let end = end.unwrap_or(slots.len());
        let free: Vec<usize> = (at..end).filter(|&index| needy(&slots[index])).collect();
        let between = before.min(after)..after;
        let tables: Vec<u64> = orphans.range(between).map(|(&cluster, _)| cluster).take(free.len()).collect();
        for (number, &cluster) in tables.iter().enumerate() {
            let place = if bounded { spread(number, tables.len(), free.len()) } else { number };
            orphans.remove(&cluster);
            slots[free[place]] = Slot::Table(HostOffset::new(cluster * size), Evidence::Order);
        }
        at = end;
    }
    for slot in slots.iter_mut().filter(|slot| needy(slot)) {
        let Some((cluster, _)) = orphans.pop_first() else { return };
        *slot = Slot::Table(HostOffset::new(cluster * size), Evidence::Order);
    }
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn fewer_than_places_are_spread_in_order() {
        let places = |count, places| (0..count).map(|n| spread(n, count, places)).collect::<Vec<_>>();
        assert_eq!(places(1, 3), [1]);
        assert_eq!(places(1, 7), [3]);
        assert_eq!(places(3, 15), [3, 7, 11]);
        for (count, all) in (1..20).flat_map(|count| (count..40).map(move |all| (count, all))) {
            let found = places(count, all);
            assert!(found.windows(2).all(|pair| pair[0] < pair[1]) && *found.last().unwrap() < all);
            assert!(count < all || found == (0..count).collect::<Vec<_>>(), "{count} of {all}: {found:?}");
        }
    }
}
