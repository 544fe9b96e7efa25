//! Finds clusters that can be tables and that nothing leads to.

use super::counts::{self, Counts};
use super::entry::Worth;
use super::job::{Bytes, Job};
use super::marks::Marks;
use crate::error::Result;
use qcow2_format::l2::{L2Format, L2Shape};
use qcow2_format::{Geometry, GeometryFields, Header, HostOffset, bytes, l1};
use std::collections::BTreeSet;

/// Clusters that are remembered as perhaps a table. Origin: ours; 64 MiB of memory, tables of 32 TiB in
/// clusters of 64 KiB.
pub(super) const MAX_CANDIDATES: usize = 1 << 20;

/// The part of a large cluster that is read first: most of those that are no table show it there.
const HEAD: u64 = 4096;
/// Clusters below that are read many at a time.
const LARGE: u64 = 64 << 10;
const PIECE: u64 = 1 << 20;

/// A cluster that can be a table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) cluster: u64,
    /// What it is like as an L2 table, if it can be one.
    pub(super) l2: Option<L2Shape>,
    /// Whether it can be an L1 or refcount table: words of 8 bytes that lead to clusters, and nothing else.
    pub(super) pointers: bool,
}

/// L2 tables that can be the active disk's, and the L1 tables.
#[derive(Default)]
pub(super) struct Found {
    /// In the order of the file.
    pub(super) l2: Vec<Candidate>,
    /// Offsets and entries of runs that look like L1 tables.
    pub(super) l1: Vec<(HostOffset, u64)>,
}

impl Job<'_> {
    /// Every cluster of the file that can be a table and that no known table leads to, in order. Disk: reads
    /// the beginning of each cluster that is not known, skipping holes.
    pub(super) fn candidates(&self) -> Result<Vec<Candidate>> {
        let geometry = self.known.format.geometry;
        let size = geometry.cluster_size();
        let pointers = pointer_format(&geometry);
        let mut found = Vec::new();
        let mut next = 1;
        let mut window = Window { start: 0, content: Vec::new(), bytes: self.bytes };
        self.bytes.data_runs(|run| {
            for cluster in (run.start / size).max(next)..run.end.div_ceil(size) {
                if cluster % 256 == 0 {
                    self.go_on()?;
                }
                next = cluster + 1;
                if self.mapped.contains(cluster) || self.known.metadata.contains(cluster) {
                    continue;
                }
                let Some(content) = window.table(
                    cluster * size,
                    size,
                    &[self.known.format, pointers],
                    self.known.data_len,
                )?
                else {
                    continue;
                };
                let l2 =
                    self.known.format.shape(content, self.known.data_len).filter(|shape| shape.inside > 0);
                let shape = pointers.shape(content, self.bytes.len);
                let pointers = shape.is_some_and(|s| s.inside > 0 && s.compressed == 0 && s.zero == 0);
                if l2.is_some() || pointers {
                    found.push(Candidate { cluster, l2, pointers });
                }
            }
            Ok(found.len() < MAX_CANDIDATES)
        })?;
        Ok(found)
    }

    /// Looks for the refcount table among the candidates, if it is not known.
    pub(super) fn find_counts(&mut self, candidates: &[Candidate]) -> Result<()> {
        let geometry = self.known.format.geometry;
        let flags = |c: &&Candidate| c.pointers && c.l2.is_none_or(|shape| shape.copied == 0);
        for candidate in candidates.iter().filter(flags).take(MAX_TRIED) {
            if self.counts.is_some() {
                break;
            }
            let at = HostOffset::new(geometry.bytes_of(candidate.cluster));
            if let Some(header) = counts::certified(self.bytes, geometry.cluster_bits(), at)? {
                self.use_counts(&header)?;
            }
        }
        Ok(())
    }

    /// Takes the refcounts of the structure that `header` leads to, if it is one.
    pub(super) fn use_counts(&mut self, header: &Header) -> Result<()> {
        let geometry = self.known.format.geometry.with_refcount_order(header.refcount_order);
        let geometry = geometry.map_err(super::job::failed)?;
        self.counts = Counts::read(self.bytes, header, geometry)?;
        if let Some(counts) = &self.counts {
            self.known.metadata.insert_each(counts.own_clusters());
        }
        Ok(())
    }

    /// Tells L1 tables from L2 tables: the former lead to the latter. What other tables map is neither.
    pub(super) fn classify(&mut self, candidates: Vec<Candidate>) -> Result<Found> {
        let mut tables = Marks::default();
        tables.insert_each(candidates.iter().filter(|c| c.l2.is_some()).map(|c| c.cluster));
        let (mut l1, mut l2) = (Vec::new(), Vec::new());
        for candidate in candidates {
            let content = if candidate.pointers { self.cluster(candidate.cluster)? } else { Vec::new() };
            let (mut all, mut leading) = (0u64, 0u64);
            for raw in bytes::words(&content).filter(|&raw| raw != 0) {
                let host = HostOffset::new(l1::without_copied(l1::rounded(raw, &self.known.format.geometry)));
                let to = self.known.format.geometry.host_cluster(host).value();
                // What is past the end of a file that was cut may have been a table.
                all += u64::from(host.value() < self.bytes.len);
                leading += u64::from(tables.contains(to) || self.tables.contains(to));
            }
            match leading > 0 && leading * 2 >= all {
                true => l1.push(candidate.cluster),
                false => l2.extend(candidate.l2.map(|_| candidate)),
            }
        }
        let guests = self.guests(&l2)?;
        l1.retain(|&cluster| !guests.contains(cluster));
        self.known.metadata.insert_each(l1.iter().copied());
        Ok(Found { l1: self.l1_runs(&l1)?, l2 })
    }

    /// What candidates map that look like the disk's own tables and that no other candidate maps: guest data,
    /// an image inside the disk for example.
    fn guests(&self, candidates: &[Candidate]) -> Result<Marks> {
        let mut all = Marks::default();
        for candidate in candidates {
            self.go_on()?;
            let content = self.cluster(candidate.cluster)?;
            self.known.entries(&content, |_, raw, bitmap| all.insert_each(self.known.targets(raw, bitmap)));
        }
        let mut guests = Marks::default();
        for candidate in candidates.iter().filter(|candidate| !all.contains(candidate.cluster)) {
            if self.rank(candidate, false)? >= Rank::Copied {
                let content = self.cluster(candidate.cluster)?;
                self.known
                    .entries(&content, |_, raw, bitmap| guests.insert_each(self.known.targets(raw, bitmap)));
            }
        }
        Ok(guests)
    }

    /// Joins the clusters of L1 tables that are longer than one: those that are side by side, or have nothing
    /// but zeroes between them in clusters that are in use, and that do not lead to the same tables.
    fn l1_runs(&self, clusters: &[u64]) -> Result<Vec<(HostOffset, u64)>> {
        let geometry = self.known.format.geometry;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut tables = BTreeSet::new();
        for &cluster in clusters {
            let words: Vec<u64> = bytes::words(&self.cluster(cluster)?).filter(|&raw| raw != 0).collect();
            let words: BTreeSet<u64> = words.into_iter().map(l1::without_copied).collect();
            let follows = match runs.last() {
                Some(&(_, end)) => tables.is_disjoint(&words) && self.is_gap(end, cluster)?,
                None => false,
            };
            match runs.last_mut().filter(|_| follows) {
                Some((_, end)) => *end = cluster + 1,
                None => {
                    runs.push((cluster, cluster + 1));
                    tables.clear();
                }
            }
            if tables.len() < MAX_COMPARED {
                tables.extend(words);
            }
        }
        let place = |(start, end): (u64, u64)| {
            let entries = geometry.bytes_of(end - start) / 8;
            (HostOffset::new(geometry.bytes_of(start)), entries)
        };
        Ok(runs.into_iter().map(place).collect())
    }

    /// Whether the clusters from `start` to before `end` can be a part of an L1 table without entries.
    fn is_gap(&self, start: u64, end: u64) -> Result<bool> {
        let most = if self.counts.is_some() { MAX_GAP } else { 1 };
        for cluster in start..end {
            let stored = self.counts.as_ref().map(|counts| counts.count(cluster)).transpose()?.flatten();
            let zero = self.known.worth(&self.cluster(cluster)?) == Worth::Empty;
            if end - start > most || !zero || stored == Some(0) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The candidates that are L2 tables of one state of the disk, in the order of the file. No two of them
    /// map the same cluster: what overlaps is a snapshot's, an old or a nested table, and the more likely one
    /// is taken.
    pub(super) fn accept(&mut self, candidates: Vec<Candidate>) -> Result<Vec<Candidate>> {
        let mut targets = Marks::default();
        for candidate in &candidates {
            self.go_on()?;
            let content = self.cluster(candidate.cluster)?;
            self.known
                .entries(&content, |_, raw, bitmap| targets.insert_each(self.known.targets(raw, bitmap)));
        }
        let mut ranked = Vec::new();
        for candidate in candidates {
            let rank = self.rank(&candidate, targets.contains(candidate.cluster))?;
            ranked.push((rank, candidate));
        }
        ranked.sort_by_key(|(rank, candidate)| std::cmp::Reverse((*rank, candidate.cluster)));
        let mut accepted = Vec::new();
        for (rank, candidate) in ranked {
            self.go_on()?;
            let content = self.cluster(candidate.cluster)?;
            let (mut all, mut old) = (0u64, 0u64);
            self.known.entries(&content, |_, raw, bitmap| {
                let mut targets = self.known.targets(raw, bitmap);
                all += u64::from(!targets.is_empty());
                old += u64::from(
                    raw >> 62 & 1 == 0
                        && targets.any(|t| self.mapped.contains(t) || self.known.metadata.contains(t)),
                );
            });
            if rank <= Rank::Snapshot || self.mapped.contains(candidate.cluster) || old * 2 > all {
                continue;
            }
            self.claim(&content);
            self.known.metadata.insert(candidate.cluster);
            accepted.push(candidate);
        }
        accepted.sort_by_key(|candidate| candidate.cluster);
        Ok(accepted)
    }

    /// How likely it is that a candidate is in use by the disk itself.
    fn rank(&self, candidate: &Candidate, is_mapped: bool) -> Result<Rank> {
        let stored =
            self.counts.as_ref().map(|counts| counts.count(candidate.cluster)).transpose()?.flatten();
        if stored == Some(0) {
            return Ok(Rank::Old);
        }
        if is_mapped {
            return Ok(Rank::Mapped);
        }
        let agrees = self.flags_agree(candidate.cluster)?;
        let copied = candidate.l2.is_some_and(|shape| shape.copied > 0);
        Ok(match (agrees, copied) {
            (Some(false), _) => Rank::Snapshot,
            (Some(true), _) => Rank::Active,
            (None, true) => Rank::Copied,
            (None, false) => Rank::Plain,
        })
    }

    /// Whether the copied flags of a table go with the refcounts, as in tables of the disk itself: a
    /// snapshot's has clusters that are only its own, without the flag. `None` if there are no refcounts.
    pub(super) fn flags_agree(&self, table: u64) -> Result<Option<bool>> {
        let Some(counts) = &self.counts else { return Ok(None) };
        let content = self.cluster(table)?;
        let mut samples = Vec::new();
        self.known.entries(&content, |_, raw, bitmap| {
            let targets = self.known.targets(raw, bitmap);
            if raw >> 62 & 1 == 0 && !targets.is_empty() {
                samples.push((targets.start, L2Format::has_copied_flag(raw)));
            }
        });
        let step = (samples.len() / MAX_SAMPLES).max(1);
        let (mut good, mut bad) = (0, 0);
        for (cluster, copied) in samples.into_iter().step_by(step) {
            match counts.count(cluster)? {
                Some(count) if copied == (count == 1) => good += 1,
                Some(_) => bad += 1,
                None => {}
            }
        }
        Ok((good + bad > 0).then_some(good >= bad))
    }
}

/// Clusters that are tried as the refcount table.
const MAX_TRIED: usize = 1000;
/// Entries of a table whose refcounts are looked at.
const MAX_SAMPLES: usize = 64;
/// L1 entries that the next cluster of the table must not have again.
const MAX_COMPARED: usize = 1 << 16;
/// Clusters of zeroes inside an L1 table.
const MAX_GAP: u64 = 1 << 12;

/// From the least to the most likely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// Its refcount is 0: free, and only not overwritten yet.
    Old,
    /// The copied flags are not the disk's.
    Snapshot,
    /// Another candidate has it as guest data.
    Mapped,
    Plain,
    Copied,
    /// Flags and refcounts agree.
    Active,
}

/// How words of 8 bytes are read that lead to clusters.
pub(super) fn pointer_format(geometry: &Geometry) -> L2Format {
    let fields = GeometryFields {
        cluster_bits: geometry.cluster_bits(),
        refcount_order: geometry.refcount_width().order(),
        extended_l2: false,
    };
    let geometry = Geometry::new(fields).unwrap_or(*geometry);
    L2Format { geometry, zero_flag: true, external_data: false }
}

/// A part of the file in memory.
struct Window<'a> {
    start: u64,
    content: Vec<u8>,
    bytes: Bytes<'a>,
}

impl Window<'_> {
    /// The cluster at `at`, if it can be a table by any of `formats` and is not all zeroes.
    fn table(&mut self, at: u64, size: u64, formats: &[L2Format], data_len: u64) -> Result<Option<&[u8]>> {
        let possible =
            |content: &[u8]| formats.iter().any(|format| format.shape(content, data_len).is_some());
        if size >= LARGE {
            self.start = at;
            self.content.resize(size as usize, 0);
            let (head, rest) = self.content.split_at_mut(HEAD as usize);
            self.bytes.read(HostOffset::new(at), head)?;
            if !possible(head) {
                return Ok(None);
            }
            self.bytes.read(HostOffset::new(at + HEAD), rest)?;
        } else if at < self.start || at + size > self.start + self.content.len() as u64 {
            self.start = at;
            self.content.resize(PIECE as usize, 0);
            self.bytes.read(HostOffset::new(at), &mut self.content)?;
        }
        let start = (at - self.start) as usize;
        let content = &self.content[start..start + size as usize];
        Ok((!crate::zeroes::is_zero(content)).then_some(content))
    }
}
