//! L1 and L2 entries of the active disk and of all snapshots, and the tables of bitmaps.

use super::fix::Fix;
use super::job::{Job, failed, storage};
use crate::check::{count_references, stored_refcount};
use crate::error::{Error, ErrorKind, Result};
use qcow2_core::walk::{Segment, TablePlace, overlay};
use qcow2_core::{HostOffset, Storage};
use qcow2_format::bitmap::BitmapTableEntry;
use qcow2_format::l1::{self, L1Entry};
use qcow2_format::l2::{L2Entry, L2Mend};
use qcow2_format::{FormatErrorKind, L2Index, bytes};
use std::collections::{BTreeMap, BTreeSet};

/// L2 tables that are looked at. Origin: as many as a recount takes.
const MAX_L2_TABLES: usize = 1 << 24;
/// Entries that are judged by what the rest of the image refers to. Origin: ours; each costs memory.
const MAX_DOUBTS: usize = 1 << 20;
/// How often tables found in one round lead to more of them.
const MAX_ROUNDS: usize = 4;

/// An entry that names a cluster only if nothing else does.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    at: HostOffset,
    from: (u64, u64),
    to: (u64, u64),
    /// Where the cluster is that it would name.
    host: HostOffset,
    /// The L2 table and index that it is, or `None` for an L1 entry.
    entry: Option<(HostOffset, u64)>,
}

/// An L1 entry that does not lead to an L2 table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) at: HostOffset,
    pub(super) raw: u64,
}

/// What one round has found.
#[derive(Default)]
struct Round {
    tables: BTreeSet<u64>,
    doubts: Vec<Doubt>,
    slots: Vec<Slot>,
}

impl Job<'_> {
    /// Mends every entry that can be mended without a guess. Entries that are past the end of the file, and
    /// those that contradict themselves, stay as they are.
    pub(super) fn mend_mapping(&mut self) -> Result<()> {
        let header = self.header.clone();
        let mut tables = vec![];
        self.walk(&header, |walk| {
            tables.push(walk.active_l1());
            tables.extend(walk.snapshots(&mut |_| {}).map_err(failed)?.unwrap_or_default().l1_tables);
            Ok(())
        })?;
        let mut round = Round::default();
        let metadata = self.metadata(&tables)?;
        for segment in overlay(&tables) {
            self.mend_l1(segment, &metadata, &mut round)?;
        }
        let mut seen = BTreeSet::new();
        for _ in 0..MAX_ROUNDS {
            let new: Vec<u64> = round.tables.difference(&seen).copied().collect();
            if new.is_empty() && round.doubts.is_empty() && round.slots.is_empty() {
                return Ok(());
            }
            for &table in &new {
                self.mend_l2(HostOffset::new(table), &mut round)?;
            }
            seen.extend(new);
            let Round { doubts, mut slots, .. } = std::mem::take(&mut round);
            round.tables = self.decide(doubts, &mut slots)?;
            round.tables.extend(self.fill_slots(&slots, &metadata)?);
        }
        self.tables_missing |= !round.tables.is_empty();
        Ok(())
    }

    fn mend_l1(&mut self, segment: Segment, metadata: &BTreeSet<u64>, round: &mut Round) -> Result<()> {
        let format = self.format;
        let geometry = format.geometry;
        let len = self.draft.len().map_err(storage)?;
        self.tables_missing |= segment.offset.value() >= len;
        let end = segment.offset.value().saturating_add(segment.len).min(len);
        let mut at = segment.offset.value();
        let mut buffer = vec![0; 1 << 16];
        while at < end {
            let piece = (end - at).min(buffer.len() as u64) as usize;
            let whole = piece.next_multiple_of(8);
            self.draft.read_padded(HostOffset::new(at), &mut buffer[..whole]).map_err(storage)?;
            let words: Vec<u64> = bytes::words(&buffer[..whole]).collect();
            for (place, raw) in (at..).step_by(8).map(HostOffset::new).zip(words) {
                if raw == 0 {
                    continue;
                }
                let rounded = l1::rounded(raw, &geometry);
                match L1Entry::decode(raw, &geometry) {
                    Ok(entry) => {
                        let clean = L1Entry::encode(&entry);
                        if clean != raw {
                            self.set_words(place, &[clean])?;
                            self.fixed(Fix::L1Entry { at: place, from: raw, to: clean });
                        }
                        let Some(table) = entry.l2_table else { continue };
                        let cluster = geometry.host_cluster(table).value();
                        match table.value() >= len || metadata.contains(&cluster) {
                            true => self.slot(round, Slot { at: place, raw: clean }),
                            false => drop(round.tables.insert(table.value())),
                        }
                    }
                    Err(e) => {
                        debug_assert!(matches!(e.kind(), FormatErrorKind::Misaligned(_)));
                        let host = HostOffset::new(l1::without_copied(rounded));
                        let doubt = Doubt { at: place, from: (raw, 0), to: (rounded, 0), host, entry: None };
                        self.doubt(round, doubt);
                    }
                }
            }
            if round.tables.len() > MAX_L2_TABLES {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "image has too many l2 tables to be repaired",
                ));
            }
            at += piece as u64;
        }
        Ok(())
    }

    fn slot(&mut self, round: &mut Round, slot: Slot) {
        match round.slots.len() < MAX_DOUBTS {
            true => round.slots.push(slot),
            false => self.tables_missing = true,
        }
    }

    fn doubt(&mut self, round: &mut Round, doubt: Doubt) {
        match round.doubts.len() < MAX_DOUBTS {
            true => round.doubts.push(doubt),
            false => self.tables_missing = true,
        }
    }

    fn mend_l2(&mut self, table: HostOffset, round: &mut Round) -> Result<()> {
        let format = self.format;
        let geometry = format.geometry;
        let mut content = vec![0; geometry.cluster_size() as usize];
        self.draft.read_padded(table, &mut content).map_err(storage)?;
        for index in 0..geometry.l2_entries() {
            let Some((raw, bitmap)) = format.words_at(&content, L2Index::new(index)) else { break };
            if raw == 0 && bitmap == 0 {
                continue;
            }
            let at = HostOffset::new(table.value().saturating_add(index * geometry.l2_entry_size()));
            let write = |job: &Self, (first, second): (u64, u64)| match geometry.extended_l2() {
                true => job.set_words(at, &[first, second]),
                false => job.set_words(at, &[first]),
            };
            let (from, entry) = ((raw, bitmap), Some((table, index)));
            match format.mend(raw, bitmap) {
                L2Mend::Same(first, second) => {
                    write(self, (first, second))?;
                    self.fixed(Fix::L2Entry { table, index, from, to: (first, second) });
                }
                L2Mend::IfOwned { words, host } if !format.external_data => {
                    self.doubt(round, Doubt { at, from, to: words, host, entry });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Decides what doubtful entries mean: the cluster that their rounded offset names, where that is counted
    /// as used and nothing else refers to it. Returns the L2 tables that are found so.
    fn decide(&mut self, doubts: Vec<Doubt>, slots: &mut Vec<Slot>) -> Result<BTreeSet<u64>> {
        if doubts.is_empty() {
            return Ok(BTreeSet::new());
        }
        let format = self.format;
        let geometry = format.geometry;
        // Counted without them: what is counted then refers to their clusters for other reasons.
        doubts.iter().try_for_each(|doubt| self.set_words(doubt.at, &[0]))?;
        let mut wanted: BTreeMap<u64, u64> =
            doubts.iter().map(|doubt| (geometry.host_cluster(doubt.host).value(), 0)).collect();
        let header = self.header.clone();
        let (executor, progress) = (self.executor, self.progress);
        self.walk(&header, |walk| {
            count_references(walk, executor, progress, &mut |counters| {
                let window = counters.window();
                wanted.range_mut(window).for_each(|(&cluster, count)| *count = counters.count(cluster));
                Ok(())
            })
        })?;
        let refcounts = self.walk(&header, |walk| walk.refcount_table().map_err(failed))?;
        let clusters = geometry.clusters_for(self.draft.len().map_err(storage)?);
        let (mut taken, mut tables) = (BTreeSet::new(), BTreeSet::new());
        for doubt in doubts {
            let cluster = geometry.host_cluster(doubt.host).value();
            let stored = self.walk(&header, |walk| stored_refcount(walk, &refcounts, cluster))?;
            let alone = wanted.get(&cluster) == Some(&0) && !taken.contains(&cluster);
            let used = cluster < clusters && stored.is_some_and(|count| count > 0);
            let sound = alone && used && (doubt.entry.is_some() || self.is_l2_table(doubt.host)?);
            let words = if sound { doubt.to } else { doubt.from };
            self.set_words(doubt.at, &[words.0])?;
            match (sound, doubt.entry) {
                (true, Some((table, index))) => {
                    self.fixed(Fix::L2Entry { table, index, from: doubt.from, to: doubt.to });
                }
                (true, None) => {
                    self.fixed(Fix::L1Entry { at: doubt.at, from: doubt.from.0, to: doubt.to.0 });
                    tables.insert(doubt.host.value());
                }
                (false, Some(_)) => self.kept.extend([cluster, cluster + 1]),
                (false, None) => slots.push(Slot { at: doubt.at, raw: doubt.from.0 }),
            }
            if sound {
                taken.insert(cluster);
            }
        }
        Ok(tables)
    }

    /// Whether the cluster at `host` looks like an L2 table: it has entries, all of them sound, and all of
    /// them name clusters of this file.
    pub(super) fn is_l2_table(&self, host: HostOffset) -> Result<bool> {
        let format = self.format;
        let mut content = vec![0; format.geometry.cluster_size() as usize];
        self.draft.read_padded(host, &mut content).map_err(storage)?;
        let len = self.draft.len().map_err(storage)?;
        let mut any = false;
        for index in 0..format.geometry.l2_entries() {
            let Some((raw, bitmap)) = format.words_at(&content, L2Index::new(index)) else { break };
            if raw == 0 && bitmap == 0 {
                continue;
            }
            any = true;
            let inside = match format.decode(raw, bitmap) {
                Ok(L2Entry::Standard(entry)) => {
                    format.external_data || entry.host.is_none_or(|host| host.value() < len)
                }
                Ok(L2Entry::Compressed(stream)) => stream.host.value() < len,
                Err(_) => false,
            };
            if !inside || format.mend(raw, bitmap) != L2Mend::Sound {
                return Ok(false);
            }
        }
        Ok(any)
    }

    /// Entries of bitmap tables that mean nothing become "all ones". Directories that cannot be read stay.
    pub(super) fn mend_bitmaps(&mut self) -> Result<()> {
        let header = self.header.clone();
        let (tables, fault) = self.walk(&header, |walk| walk.bitmaps().map_err(failed))?;
        self.tables_missing |= fault.is_some();
        let geometry = self.format.geometry;
        for TablePlace { offset, entries } in tables {
            for index in 0..entries {
                let at = HostOffset::new(offset.value().saturating_add(index * 8));
                let entry = self.word(at)?;
                if BitmapTableEntry::decode(entry, &geometry).is_err() {
                    self.set_words(at, &[BitmapTableEntry::Ones.encode()])?;
                    self.fixed(Fix::BitmapEntry { at, entry });
                }
            }
        }
        Ok(())
    }
}
