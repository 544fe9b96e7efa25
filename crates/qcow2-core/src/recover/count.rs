//! Counts the references to every host cluster, from the tables alone, without using the refcounts.

use crate::error::{Error, Result, TableKind};
use crate::meta::file::{ImageFile, read_words};
use crate::meta::overlap::OverlapChecks;
use crate::meta::run::ClusterRun;
use crate::meta::tables::Tables;
use crate::walk::{Owner, Reference, Segment, SnapshotFault, TablePlace, Walk, overlay};
use ::alloc::boxed::Box;
use ::alloc::collections::BTreeMap;
use ::alloc::format;
use ::alloc::vec::Vec;
use qcow2_format::bitmap::BitmapTableEntry;
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::L2Entry;
use qcow2_format::{FormatError, Header, HostOffset};

const CHUNK_BITS: u32 = 9;
const CHUNK: usize = 1 << CHUNK_BITS;
/// Limit on chunks: counts for 2^27 clusters, 1 GiB of memory.
const MAX_CHUNKS: usize = 1 << 18;
/// Limit on L2 tables.
const MAX_L2_TABLES: usize = 1 << 24;

/// The number of references per host cluster. Sparse: chunks without references take no memory.
#[derive(Debug)]
pub(crate) struct ReferenceCounts {
    chunks: BTreeMap<u64, Box<[u64; CHUNK]>>,
    /// The first cluster that must not have a reference.
    end: u64,
}

impl ReferenceCounts {
    /// No references yet. References up to cluster `clusters`, one past the end of the file, are valid: a
    /// reserved cluster at the end may not be written yet.
    pub(crate) fn new(clusters: u64) -> Self {
        Self { chunks: BTreeMap::new(), end: clusters.saturating_add(1) }
    }

    /// How many references `cluster` has.
    pub(crate) fn of(&self, cluster: u64) -> u64 {
        self.chunks.get(&(cluster >> CHUNK_BITS)).map_or(0, |c| c[cluster as usize % CHUNK])
    }

    /// All clusters with references and their counts, in ascending order.
    pub(crate) fn used(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.chunks.iter().flat_map(|(chunk, counts)| {
            let base = chunk << CHUNK_BITS;
            counts.iter().enumerate().filter(|&(_, &n)| n > 0).map(move |(i, &n)| (base + i as u64, n))
        })
    }

    /// Adds `times` references to each cluster of `run`. Errors: `Corrupt` past the end of the file: hostile
    /// tables could otherwise demand a refcount structure of any size.
    pub(crate) fn add(&mut self, run: ClusterRun, times: u64) -> Result<()> {
        if run.end() > self.end {
            return Err(Error::corrupt(format!(
                "clusters {} to {} are in use and past the end of the file",
                run.first(),
                run.end()
            )));
        }
        for cluster in run.clusters() {
            let chunk = cluster >> CHUNK_BITS;
            if !self.chunks.contains_key(&chunk) && self.chunks.len() == MAX_CHUNKS {
                return Err(Error::corrupt("image uses too many clusters to recount its refcounts"));
            }
            debug_assert!(self.chunks.len() <= MAX_CHUNKS, "reference counts exceed their memory limit");
            let counts = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; CHUNK]));
            let count = &mut counts[cluster as usize % CHUNK];
            *count = count.saturating_add(times);
        }
        Ok(())
    }
}

fn damaged(what: &'static str) -> impl Fn(FormatError) -> Error {
    move |e| Error::corrupt(format!("{what} is damaged: refcounts cannot be recounted")).with_source(e)
}

/// Counts the references in the tables on disk. The caller has flushed the open image.
pub(crate) struct Recount<'a> {
    tables: &'a Tables,
    header: Header,
}

impl<'a> Recount<'a> {
    /// `header`: as it is on disk.
    pub(crate) fn new(tables: &'a Tables, header: Header) -> Self {
        Self { tables, header }
    }

    fn file(&self) -> &'a ImageFile {
        self.tables.file()
    }

    fn walk(&self) -> Result<Walk<'_>> {
        Walk::new(self.file().storage(), &self.header)
    }

    /// All references in header, tables, snapshots and bitmaps, except those to the refcount structure
    /// itself. Disk: reads every table once, however many references it has. Errors: `Corrupt` for a damaged
    /// table: its references are unknown, so no count would be reliable.
    pub(crate) fn references(&self) -> Result<ReferenceCounts> {
        let header = &self.header;
        let walk = self.walk()?;
        let mut counts = ReferenceCounts::new(self.file().geometry().clusters_for(walk.file_len()));
        let own = [Owner::RefcountTable, Owner::ActiveL1];
        for Reference { offset, len, .. } in walk.header_references().filter(|r| !own.contains(&r.owner)) {
            self.count_bytes(&mut counts, offset, len, 1)?;
        }
        let l2_tables = self.count_l1_tables(&mut counts, &walk)?;
        for (table, times) in l2_tables {
            self.count_l2(&mut counts, HostOffset::new(table), times)?;
        }
        if header.trusted_bitmaps().is_some() {
            let (tables, fault) = walk.bitmaps()?;
            if let Some(fault) = fault {
                return Err(damaged("bitmap directory")(fault.error));
            }
            self.count_bitmaps(&mut counts, &walk, &tables)?;
        }
        Ok(counts)
    }

    /// Every L2 table of the active disk and of the snapshots, by host offset, with its number of references.
    /// Errors: as [`references`](Self::references).
    pub(crate) fn named_l2_tables(&self) -> Result<BTreeMap<u64, u64>> {
        let walk = self.walk()?;
        let mut counts = ReferenceCounts::new(self.file().geometry().clusters_for(walk.file_len()));
        self.count_l1_tables(&mut counts, &walk)
    }

    /// Counts the snapshot table and all L1 tables. Returns the L2 tables with their numbers of references.
    fn count_l1_tables(&self, counts: &mut ReferenceCounts, walk: &Walk<'_>) -> Result<BTreeMap<u64, u64>> {
        let header = walk.header();
        let mut l1_tables = ::alloc::vec![walk.active_l1()];
        if header.nb_snapshots > 0 {
            let mut lost = false;
            // Entries without the version 3 fields still have offset and length of the L1 table.
            let table =
                walk.snapshots(&mut |fault| lost |= !matches!(fault, SnapshotFault::Incomplete { .. }))?;
            let (Some(table), false) = (table, lost) else {
                return Err(Error::corrupt("snapshot table is damaged: refcounts cannot be recounted"));
            };
            self.count_bytes(counts, header.snapshots_offset, table.len, 1)?;
            l1_tables.extend(table.l1_tables);
        }
        self.count_l1(counts, walk, &l1_tables)
    }

    /// The references of the bitmaps, their directory included; none if their autoclear bit is not set.
    /// Errors: as [`references`](Self::references).
    pub(crate) fn trusted_bitmaps(&self) -> Result<ReferenceCounts> {
        let header = &self.header;
        let walk = self.walk()?;
        let mut counts = ReferenceCounts::new(self.file().geometry().clusters_for(walk.file_len()));
        let Some(directory) = header.trusted_bitmaps() else { return Ok(counts) };
        self.count_bytes(&mut counts, directory.directory_offset, directory.directory_size, 1)?;
        let (tables, fault) = walk.bitmaps()?;
        if let Some(fault) = fault {
            return Err(damaged("bitmap directory")(fault.error));
        }
        self.count_bitmaps(&mut counts, &walk, &tables)?;
        Ok(counts)
    }

    fn count_bytes(
        &self,
        counts: &mut ReferenceCounts,
        start: HostOffset,
        len: u64,
        times: u64,
    ) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let run = ClusterRun::of_bytes(self.file().geometry(), start, len);
        counts.add(run.ok_or_else(|| Error::corrupt("a table passes 2^64"))?, times)
    }

    /// Adds one reference for each table to the clusters that it occupies. Returns the tables as segments
    /// that do not overlap.
    fn count_places(&self, counts: &mut ReferenceCounts, tables: &[TablePlace]) -> Result<Vec<Segment>> {
        let per_cluster = self.file().geometry().cluster_size() / 8;
        let whole: Vec<TablePlace> = tables
            .iter()
            .map(|table| TablePlace { entries: table.entries.next_multiple_of(per_cluster), ..*table })
            .collect();
        for segment in overlay(&whole) {
            self.count_bytes(counts, segment.offset, segment.len, segment.times)?;
        }
        Ok(overlay(tables))
    }

    /// Counts L1 tables. Returns every L2 table with the number of L1 entries that point to it.
    fn count_l1(
        &self,
        counts: &mut ReferenceCounts,
        walk: &Walk<'_>,
        tables: &[TablePlace],
    ) -> Result<BTreeMap<u64, u64>> {
        let mut l2_tables = BTreeMap::new();
        let mut pieces = walk.pieces();
        for segment in self.count_places(counts, tables)? {
            pieces.start(segment.offset, segment.len);
            while let Some((_, bytes)) = pieces.read_next()? {
                for raw in qcow2_format::bytes::words(bytes).filter(|&raw| raw != 0) {
                    let entry = L1Entry::decode(raw, self.file().geometry()).map_err(damaged("l1 table"))?;
                    let Some(table) = entry.l2_table else { continue };
                    let times = l2_tables.entry(table.value()).or_insert(0u64);
                    *times = times.saturating_add(segment.times);
                }
                if l2_tables.len() > MAX_L2_TABLES {
                    return Err(Error::corrupt("image has too many l2 tables to recount its refcounts"));
                }
            }
        }
        Ok(l2_tables)
    }

    fn count_l2(&self, counts: &mut ReferenceCounts, table: HostOffset, times: u64) -> Result<()> {
        let size = self.file().geometry().cluster_size();
        let cluster = ClusterRun::one(self.file().geometry().host_cluster(table).value());
        if let Some(hit) = self.tables.guard().hit_by(OverlapChecks::L2, cluster) {
            // Its words are not L2 entries; counting them as references would corrupt the refcounts.
            let message = format!("an l1 entry points to {table}, which holds {}", hit.kinds.text());
            return Err(Error::corrupt(message).in_table(TableKind::L2).at_host(table));
        }
        self.count_bytes(counts, table, size, times)?;
        let extent = self.file().storage().extent_at(table, size)?;
        if !extent.data && extent.len >= size {
            return Ok(());
        }
        let words = read_words(self.file().storage(), table, size / 8)?;
        for entry in words.chunks_exact((self.file().geometry().l2_entry_size() / 8) as usize) {
            let bitmap = entry.get(1).copied().unwrap_or(0);
            match self.file().l2_format().decode(entry[0], bitmap).map_err(damaged("l2 table"))? {
                L2Entry::Compressed(stream) => self.count_bytes(counts, stream.host, stream.len, times)?,
                L2Entry::Standard(cluster) => {
                    if let (Some(host), false) = (cluster.host, self.file().has_data_file()) {
                        self.count_bytes(counts, host, size, times)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn count_bitmaps(
        &self,
        counts: &mut ReferenceCounts,
        walk: &Walk<'_>,
        tables: &[TablePlace],
    ) -> Result<()> {
        let mut pieces = walk.pieces();
        for segment in self.count_places(counts, tables)? {
            pieces.start(segment.offset, segment.len);
            while let Some((_, bytes)) = pieces.read_next()? {
                for raw in qcow2_format::bytes::words(bytes) {
                    let entry = BitmapTableEntry::decode(raw, self.file().geometry())
                        .map_err(damaged("bitmap table"))?;
                    if let BitmapTableEntry::Data(host) = entry {
                        self.count_bytes(counts, host, self.file().geometry().cluster_size(), segment.times)?;
                    }
                }
            }
        }
        Ok(())
    }
}
