//! Repairs L1 and L2 entries of the active state and of all snapshots, and the tables of bitmaps.

use super::fix::Fix;
use super::job::{Job, failed, storage};
use super::orphans::Metadata;
use crate::check::{count_references, stored_refcount};
use crate::error::{Error, ErrorKind, Result};
use qcow2_core::walk::{Segment, TablePlace, overlay};
use qcow2_core::{HostOffset, Storage};
use qcow2_format::bitmap::{Bitmap, BitmapTableEntry};
use qcow2_format::l1::{self, L1Entry};
use qcow2_format::l2::{L2Entry, L2Mend};
use qcow2_format::{FormatErrorKind, L2Index, bytes};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Limit for the L2 tables of an image. Origin: the limit of the engine's recount.
const MAX_L2_TABLES: usize = 1 << 24;
/// Limit for the ambiguous entries of a round. Origin: ours; each takes memory.
const MAX_DOUBTS: usize = 1 << 20;
/// Bytes of a bitmap table that is made anew. Origin: ours; bitmaps of 4 TiB in granules of 64 KiB have less.
const MAX_NEW_TABLE: u64 = 1 << 20;
/// Rounds: an L2 table found in one round may have damaged entries that are repaired in the next.
const MAX_ROUNDS: usize = 4;

/// A damaged entry with a candidate for its cluster. The repair is made only if nothing else refers to that
/// cluster.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    at: HostOffset,
    from: (u64, u64),
    to: (u64, u64),
    /// Host offset of the candidate.
    host: HostOffset,
    /// Offset of the L2 table and index in it; `None` for an L1 entry.
    entry: Option<(HostOffset, u64)>,
}

/// An L1 entry that does not point to an L2 table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) at: HostOffset,
    pub(super) raw: u64,
}

/// New words for an entry. They are written only if the cluster they are in is a table and nothing else.
#[derive(Clone, Debug)]
struct Edit {
    at: HostOffset,
    words: (u64, u64),
    fix: Fix,
}

/// For each cluster the number of L1 tables and the number of L2 tables that it is part of.
type Parts = BTreeMap<u64, (u64, u64)>;

/// The results of one round.
#[derive(Default)]
struct Round {
    /// Offsets of L2 tables, with the number of L1 entries that point to each.
    tables: BTreeMap<u64, u64>,
    edits: Vec<Edit>,
    doubts: Vec<Doubt>,
    slots: Vec<Slot>,
    /// Clusters that L1 entries point to and that are no L2 tables. A damaged L1 table may point to the same
    /// one from each of its entries.
    no_tables: BTreeSet<u64>,
}

impl Job<'_> {
    /// Repairs every entry that can be repaired without guessing. Entries past the end of the file, and
    /// entries that contradict themselves, stay as they are.
    pub(super) fn mend_mapping(&mut self) -> Result<()> {
        self.mend_active_l1()?;
        let header = self.header.clone();
        let mut tables = vec![];
        self.walk(&header, |walk| {
            tables.push(walk.active_l1());
            tables.extend(walk.snapshots(&mut |_| {}).map_err(failed)?.unwrap_or_default().l1_tables);
            Ok(())
        })?;
        // The check does not follow a table that ends past the end of the file, and the bytes in its range
        // may belong to anything, so it is left alone.
        let len = self.draft.len().map_err(storage)?;
        let limit = len.saturating_add(self.format.geometry.cluster_size());
        let all = tables.len();
        tables.retain(|table| table.offset.value().checked_add(table.len()).is_some_and(|end| end < limit));
        self.tables_missing |= tables.len() < all;
        let mut round = Round::default();
        let metadata = self.metadata(&tables)?;
        let mut parts = Parts::new();
        for segment in overlay(&tables) {
            self.mend_l1(segment, &metadata, &mut round)?;
        }
        for table in tables {
            let first = self.format.geometry.host_cluster(table.offset).value();
            let count = self.format.geometry.clusters_for(table.len());
            (first..first.saturating_add(count)).for_each(|part| parts.entry(part).or_default().0 += 1);
        }
        let refcounts = self.walk(&header, |walk| walk.refcount_table().map_err(failed))?;
        let mut seen = BTreeSet::new();
        for _ in 0..MAX_ROUNDS {
            let new: Vec<u64> = round.tables.keys().filter(|table| !seen.contains(*table)).copied().collect();
            if new.is_empty() && round.doubts.is_empty() && round.slots.is_empty() && round.edits.is_empty() {
                return Ok(());
            }
            for (&table, &uses) in &round.tables {
                let cluster = self.format.geometry.host_cluster(HostOffset::new(table)).value();
                parts.entry(cluster).or_default().1 += uses;
            }
            for &table in &new {
                self.mend_l2(HostOffset::new(table), &refcounts, &mut round)?;
            }
            seen.extend(new);
            let Round { edits, mut doubts, mut slots, .. } = std::mem::take(&mut round);
            self.edit(edits, &parts)?;
            self.keep_in_tables(&mut doubts, &mut slots, &parts)?;
            let found = self.decide(doubts, &mut slots, &metadata)?;
            round.tables.extend(found.into_iter().map(|table| (table, 1)));
            if let Some(table) = self.fill_slots(&slots, &metadata, &seen)? {
                round.tables.insert(table, slots.len() as u64);
            }
        }
        self.tables_missing |= !round.tables.is_empty();
        Ok(())
    }

    /// Sets the entries of `doubts` and `slots` to zero if they are in clusters that are tables and nothing
    /// else; the others stay as they are, and are dropped from both.
    fn keep_in_tables(
        &mut self,
        doubts: &mut Vec<Doubt>,
        slots: &mut Vec<Slot>,
        parts: &Parts,
    ) -> Result<()> {
        if doubts.is_empty() && slots.is_empty() {
            return Ok(());
        }
        let places = doubts.iter().map(|doubt| doubt.at).chain(slots.iter().map(|slot| slot.at));
        // As they are now: an edit of the same word was written, or was not.
        let words = places.map(|at| Ok((at, self.word(at)?))).collect::<Result<Vec<_>>>()?;
        // The clusters are counted without these entries: an entry may refer to the table that it is in.
        words.iter().try_for_each(|&(at, _)| self.set_words(at, &[0]))?;
        let mut tables = self.sole_tables(words.iter().map(|&(at, _)| at), parts)?;
        // Where an entry elsewhere says that there is an L2 table, one of the two is wrong.
        for table in words.iter().filter_map(|&(at, raw)| self.leads_elsewhere(at, raw)) {
            tables.remove(&table);
        }
        // An edit that was not made leaves the entry as it was.
        let now: BTreeMap<HostOffset, u64> = words.iter().copied().collect();
        slots.iter_mut().for_each(|slot| slot.raw = now.get(&slot.at).copied().unwrap_or(slot.raw));
        let sole = |at: HostOffset| tables.contains(&self.format.geometry.host_cluster(at).value());
        for &(at, raw) in words.iter().filter(|(at, _)| !sole(*at)) {
            self.set_words(at, &[raw])?;
            self.tables_missing = true;
        }
        doubts.retain(|doubt| sole(doubt.at));
        slots.retain(|slot| sole(slot.at));
        Ok(())
    }

    /// The cluster that the L1 entry `raw` at `at` leads to, if the entry is not in it itself.
    fn leads_elsewhere(&self, at: HostOffset, raw: u64) -> Option<u64> {
        let geometry = &self.format.geometry;
        let table = L1Entry::decode(raw, geometry).ok()?.l2_table?;
        let cluster = geometry.host_cluster(table).value();
        (geometry.host_cluster(at).value() != cluster).then_some(cluster)
    }

    fn mend_l1(&mut self, segment: Segment, metadata: &Metadata, round: &mut Round) -> Result<()> {
        let format = self.format;
        let geometry = format.geometry;
        let len = self.draft.len().map_err(storage)?;
        if segment.offset.value() < geometry.cluster_size() {
            // The header is no table.
            self.tables_missing = true;
            return Ok(());
        }
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
                            let fix = Fix::L1Entry { at: place, from: raw, to: clean };
                            self.plan_edit(round, Edit { at: place, words: (clean, 0), fix });
                        }
                        let Some(table) = entry.l2_table else { continue };
                        let cluster = geometry.host_cluster(table).value();
                        let other = metadata.contains(cluster) && !metadata.may_be_l2(cluster);
                        let elsewhere = table.value() >= len || other;
                        match elsewhere || !self.leads_to_l2(table, round)? {
                            true => self.slot(round, Slot { at: place, raw: clean }),
                            false => *round.tables.entry(table.value()).or_insert(0) += segment.times,
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

    fn plan_edit(&mut self, round: &mut Round, edit: Edit) {
        match round.edits.len() < MAX_DOUBTS {
            true => round.edits.push(edit),
            false => self.omitted += 1,
        }
    }

    /// Writes `edits`, except those in clusters that something else refers to as well: such a cluster may
    /// hold guest data that looks like a table. `parts`: the tables that each cluster is part of.
    fn edit(&mut self, edits: Vec<Edit>, parts: &Parts) -> Result<()> {
        if edits.is_empty() {
            return Ok(());
        }
        let geometry = self.format.geometry;
        let cluster = |edit: &Edit| geometry.host_cluster(edit.at).value();
        let tables = self.sole_tables(edits.iter().map(|edit| edit.at), parts)?;
        for edit in edits {
            if !tables.contains(&cluster(&edit)) {
                continue;
            }
            match (&edit.fix, geometry.extended_l2()) {
                (Fix::L2Entry { .. }, true) => self.set_words(edit.at, &[edit.words.0, edit.words.1])?,
                _ => self.set_words(edit.at, &[edit.words.0])?,
            }
            self.fixed(edit.fix);
        }
        Ok(())
    }

    /// The clusters of `places` that are part of tables and that nothing else refers to. `parts`: the tables
    /// that each cluster is part of.
    fn sole_tables(&self, places: impl Iterator<Item = HostOffset>, parts: &Parts) -> Result<BTreeSet<u64>> {
        let geometry = self.format.geometry;
        let counts = self.references(places.map(|at| geometry.host_cluster(at).value()))?;
        let sole = counts.into_iter().filter(|(cluster, count)| {
            let (l1, l2) = parts.get(cluster).copied().unwrap_or_default();
            // Referred to as an L1 table and as an L2 table: at least one of the two is wrong.
            (l1 == 0 || l2 == 0) && l1 + l2 == *count
        });
        Ok(sole.map(|(cluster, _)| cluster).collect())
    }

    /// Number of references in the draft to each of `clusters`, without those of the refcount structure.
    fn references(&self, clusters: impl Iterator<Item = u64>) -> Result<BTreeMap<u64, u64>> {
        let mut wanted: BTreeMap<u64, u64> = clusters.map(|cluster| (cluster, 0)).collect();
        let mut bare = self.header.clone();
        bare.refcount_table_clusters = 0;
        // Counters end at the largest refcount of the image: with one bit, two references would look like
        // one.
        bare.refcount_order = bare.refcount_order.max(4);
        self.walk(&bare, |walk| {
            count_references(walk, self.executor, self.progress, &mut |counters| {
                let window = counters.window();
                wanted.range_mut(window).for_each(|(&cluster, count)| *count = counters.count(cluster));
                Ok(())
            })
        })?;
        Ok(wanted)
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

    fn mend_l2(&mut self, table: HostOffset, refcounts: &[u64], round: &mut Round) -> Result<()> {
        let format = self.format;
        let geometry = format.geometry;
        let content = self.table(table)?;
        let len = self.draft.len().map_err(storage)?;
        for index in 0..geometry.l2_entries() {
            let Some((raw, bitmap)) = format.words_at(&content, L2Index::new(index)) else { break };
            if raw == 0 && bitmap == 0 {
                continue;
            }
            let at = HostOffset::new(table.value().saturating_add(index * geometry.l2_entry_size()));
            let (from, entry) = ((raw, bitmap), Some((table, index)));
            match format.mend(raw, bitmap) {
                L2Mend::Same(first, second) => {
                    let words = (first, second);
                    let fix = Fix::L2Entry { table, index, from, to: words };
                    self.plan_edit(round, Edit { at, words, fix });
                }
                L2Mend::IfOwned { words, host } if !format.external_data => {
                    self.doubt(round, Doubt { at, from, to: words, host, entry });
                }
                L2Mend::Sound => {
                    if let Some((words, host)) = format.as_zeroes(raw, bitmap)
                        && host.value() >= len
                        && self.was_never_counted(host, refcounts)?
                    {
                        let fix = Fix::L2Entry { table, index, from, to: words };
                        self.plan_edit(round, Edit { at, words, fix });
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether the refcount structure never had a count for the cluster at `host`. What was cut off the end
    /// of an image had one.
    fn was_never_counted(&self, host: HostOffset, refcounts: &[u64]) -> Result<bool> {
        let cluster = self.format.geometry.host_cluster(host);
        let index = self.format.geometry.refcount_table_index(cluster) as usize;
        if refcounts.get(index).is_none_or(|&raw| raw == 0) {
            return Ok(true);
        }
        self.walk(&self.header, |walk| Ok(stored_refcount(walk, refcounts, cluster.value())? == Some(0)))
    }

    /// Decides about ambiguous entries. An entry gets its candidate (the offset rounded to a cluster) if the
    /// cluster has a refcount above 0 and nothing else refers to it. Returns the L2 tables that are found
    /// this way.
    fn decide(
        &mut self,
        doubts: Vec<Doubt>,
        slots: &mut Vec<Slot>,
        metadata: &Metadata,
    ) -> Result<BTreeSet<u64>> {
        if doubts.is_empty() {
            return Ok(BTreeSet::new());
        }
        let format = self.format;
        let geometry = format.geometry;
        // All references are counted without the ambiguous entries, so that what is left comes from others.
        doubts.iter().try_for_each(|doubt| self.set_words(doubt.at, &[0]))?;
        let wanted = self.references(doubts.iter().map(|doubt| geometry.host_cluster(doubt.host).value()))?;
        let header = self.header.clone();
        let refcounts = self.walk(&header, |walk| walk.refcount_table().map_err(failed))?;
        let clusters = geometry.clusters_for(self.draft.len().map_err(storage)?);
        let (mut taken, mut tables) = (BTreeSet::new(), BTreeSet::new());
        for doubt in doubts {
            let cluster = geometry.host_cluster(doubt.host).value();
            let stored = self.walk(&header, |walk| stored_refcount(walk, &refcounts, cluster))?;
            let alone =
                wanted.get(&cluster) == Some(&0) && !taken.contains(&cluster) && !metadata.contains(cluster);
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

    /// True if at least half of the nonzero entries are valid and point into the file.
    pub(super) fn is_mostly_l2(&self, content: &[u8]) -> Result<bool> {
        let (format, len) = (self.format, self.draft.len().map_err(storage)?);
        let (mut good, mut bad) = (0u64, 0u64);
        for index in 0..format.geometry.l2_entries() {
            let Some((raw, bitmap)) = format.words_at(content, L2Index::new(index)) else { break };
            match format.decode(raw, bitmap) {
                _ if raw == 0 && bitmap == 0 => {}
                Ok(L2Entry::Standard(entry)) if entry.host.is_none_or(|host| host.value() < len) => good += 1,
                Ok(L2Entry::Standard(_)) if format.external_data => good += 1,
                Ok(L2Entry::Compressed(stream)) if stream.host.value() < len => good += 1,
                _ => bad += 1,
            }
        }
        Ok(good >= bad)
    }

    /// [`may_be_l2_table`](Self::may_be_l2_table), looked at once for each table.
    fn leads_to_l2(&self, table: HostOffset, round: &mut Round) -> Result<bool> {
        if round.tables.contains_key(&table.value()) {
            return Ok(true);
        }
        if round.no_tables.contains(&table.value()) {
            return Ok(false);
        }
        let is_table = self.may_be_l2_table(table)?;
        if !is_table && round.no_tables.len() < MAX_DOUBTS {
            round.no_tables.insert(table.value());
        }
        Ok(is_table)
    }

    /// Whether at least half of what is set in the cluster at `host` can be entries of this file.
    fn may_be_l2_table(&self, host: HostOffset) -> Result<bool> {
        self.is_mostly_l2(&self.table(host)?)
    }

    /// True if the cluster at `host` looks like an L2 table: it has nonzero entries, all of them are valid,
    /// and all of them point into the file.
    pub(super) fn is_l2_table(&self, host: HostOffset) -> Result<bool> {
        let format = self.format;
        let content = self.table(host)?;
        let len = self.draft.len().map_err(storage)?;
        let (mut any, mut guest_start) = (false, None);
        for index in 0..format.geometry.l2_entries() {
            let Some((raw, bitmap)) = format.words_at(&content, L2Index::new(index)) else { break };
            if raw == 0 && bitmap == 0 {
                continue;
            }
            any = true;
            let inside = match format.decode(raw, bitmap) {
                Ok(L2Entry::Standard(entry)) if format.external_data => entry.host.is_none_or(|host| {
                    // In an external data file every cluster is at its guest offset.
                    let start = host.value().checked_sub(index * format.geometry.cluster_size());
                    let aligned = start.is_some_and(|start| start % format.geometry.l2_coverage() == 0);
                    aligned && *guest_start.get_or_insert(start) == start
                }),
                Ok(L2Entry::Standard(entry)) => entry.host.is_none_or(|host| host.value() < len),
                Ok(L2Entry::Compressed(stream)) => stream.host.value() < len,
                Err(_) => false,
            };
            if !inside || format.mend(raw, bitmap) != L2Mend::Sound {
                return Ok(false);
            }
        }
        Ok(any)
    }

    /// A bitmap whose table is past the end of the file, or in the place of the directory, gets a new one,
    /// "all ones".
    fn replace_bitmap_tables(&mut self) -> Result<()> {
        let header = self.header.clone();
        let (tables, fault) = self.walk(&header, |walk| walk.bitmaps().map_err(failed))?;
        let geometry = self.format.geometry;
        let len = self.draft.len().map_err(storage)?;
        let Some(extension) = header.trusted_bitmaps() else { return Ok(()) };
        // Each entry was read; a fault is then that of a table, or of what follows the entries.
        let readable = tables.len() as u64 == u64::from(extension.count);
        if !readable || fault.is_some_and(|fault| fault.index >= extension.count) {
            return Ok(());
        }
        let (start, size) = (extension.directory_offset, extension.directory_size);
        let end = start.value().saturating_add(size.max(geometry.cluster_size()));
        let lost = |table: &TablePlace| {
            let at = table.offset.value();
            let is_directory = at < end && start.value() < at.saturating_add(table.len());
            (at >= len || is_directory) && table.len() <= MAX_NEW_TABLE
        };
        if !tables.iter().any(lost) {
            return Ok(());
        }
        let (before, mut changes) = (self.end, Vec::new());
        let mut directory = vec![0; size as usize];
        self.draft.read_padded(start, &mut directory).map_err(storage)?;
        let mut at = 0;
        for table in tables {
            let entry = start.value() + at as u64;
            at += Bitmap::parse(&directory[at..]).map_err(failed)?.1;
            if lost(&table) {
                let first = self.take(geometry.clusters_for(table.len()), 1)?;
                let offset = HostOffset::new(first * geometry.cluster_size());
                let entries = geometry.clusters_for(table.len()) * geometry.cluster_size() / 8;
                let word = |index| if index < table.entries { BitmapTableEntry::Ones.encode() } else { 0 };
                self.set_words(offset, &(0..entries).map(word).collect::<Vec<_>>())?;
                let at = HostOffset::new(entry);
                self.set_words(at, &[offset.value()])?;
                changes.push((at, table.offset, offset, entries));
            }
        }
        // Judged now: before, the lost tables were references to the directory too.
        if self.is_sole(start, size)? {
            for (at, from, to, _) in changes {
                self.fixed(Fix::BitmapTable { at, from, to });
            }
        } else {
            for (at, from, to, entries) in changes {
                self.set_words(at, &[from.value()])?;
                self.set_words(to, &vec![0; entries as usize])?;
            }
            self.end = before;
        }
        Ok(())
    }

    /// True if one thing refers to each cluster of the `len` bytes at `offset`: what is there is then what it
    /// is taken for, and may be written to.
    fn is_sole(&self, offset: HostOffset, len: u64) -> Result<bool> {
        let geometry = self.format.geometry;
        let first = geometry.host_cluster(offset).value();
        let clusters = first..first.saturating_add(geometry.clusters_for(len));
        Ok(self.references(clusters)?.into_values().all(|count| count == 1))
    }

    /// Whether something leads to a new table that it was not made for. Entries that are damaged, or of a
    /// file that was cut, lead past its end, where a guest reads zeroes and would then find a table.
    pub(super) fn is_taken_twice(&self) -> Result<bool> {
        let counts = self.references(self.taken.iter().flat_map(|(run, _)| run.clone()))?;
        let twice =
            |(run, times): &(Range<u64>, u64)| counts.range(run.clone()).any(|(_, count)| count > times);
        Ok(self.taken.iter().any(twice))
    }

    /// Sets invalid entries of bitmap tables to "all ones". Bitmap directories that cannot be read stay as
    /// they are.
    pub(super) fn mend_bitmaps(&mut self) -> Result<()> {
        self.replace_bitmap_tables()?;
        let header = self.header.clone();
        let (tables, fault) = self.walk(&header, |walk| walk.bitmaps().map_err(failed))?;
        self.tables_missing |= fault.is_some();
        let geometry = self.format.geometry;
        let len = self.draft.len().map_err(storage)?;
        let mut unsound = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        // Thousands of bitmaps may have the same table.
        for segment in overlay(&tables) {
            let start = segment.offset.value();
            let end = start.saturating_add(segment.len);
            for start in (start..end).step_by(buffer.len()) {
                let piece = &mut buffer[..(end - start).min(1 << 16) as usize];
                self.draft.read_padded(HostOffset::new(start), piece).map_err(storage)?;
                for (at, entry) in (start..).step_by(8).map(HostOffset::new).zip(bytes::words(piece)) {
                    let sound = match BitmapTableEntry::decode(entry, &geometry) {
                        Ok(BitmapTableEntry::Data(bits)) => bits.value() < len,
                        Ok(_) => true,
                        Err(_) => false,
                    };
                    match sound {
                        true => {}
                        false if unsound.len() < MAX_DOUBTS => unsound.push((at, entry)),
                        false => self.tables_missing = true,
                    }
                }
            }
        }
        if unsound.is_empty() {
            return Ok(());
        }
        // Counted once for all of them: each count visits every table of the image.
        let host_cluster = |at: HostOffset| geometry.host_cluster(at).value();
        let counts = self.references(unsound.iter().map(|&(at, _)| host_cluster(at)))?;
        for (at, entry) in unsound {
            if counts.get(&host_cluster(at)) == Some(&1) {
                self.set_words(at, &[BitmapTableEntry::Ones.encode()])?;
                self.fixed(Fix::BitmapEntry { at, entry });
            } else {
                self.tables_missing = true;
            }
        }
        Ok(())
    }
}
