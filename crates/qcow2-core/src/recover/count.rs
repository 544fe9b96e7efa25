//! Counts the references to every host cluster, from the tables alone.

use crate::error::{Error, Result};
use crate::meta::Meta;
use crate::open::read_words;
use ::alloc::boxed::Box;
use ::alloc::collections::BTreeMap;
use ::alloc::format;
use ::alloc::vec;
use ::alloc::vec::Vec;
use qcow2_format::bitmap::{Bitmap, BitmapTableEntry};
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::L2Entry;
use qcow2_format::limit::{MAX_L1_ENTRIES, MAX_SNAPSHOT_TABLE_SIZE};
use qcow2_format::snapshot::Snapshot;
use qcow2_format::{FormatError, HostOffset};

const CHUNK_BITS: u32 = 9;
const CHUNK: usize = 1 << CHUNK_BITS;
/// The most chunks that are kept: counts for 2^27 clusters, 1 GiB.
const MAX_CHUNKS: usize = 1 << 18;

/// A count per host cluster; clusters that nobody refers to take no room.
#[derive(Debug)]
pub(crate) struct ReferenceCounts {
    chunks: BTreeMap<u64, Box<[u64; CHUNK]>>,
    /// The first cluster that nothing may refer to.
    end: u64,
}

impl ReferenceCounts {
    /// No references yet, to a file of `clusters` clusters. One more may be referred to: the file need not end with a
    /// whole cluster.
    pub(crate) fn new(clusters: u64) -> Self {
        Self { chunks: BTreeMap::new(), end: clusters.saturating_add(1) }
    }

    /// How many references `cluster` has.
    pub(crate) fn of(&self, cluster: u64) -> u64 {
        self.chunks.get(&(cluster >> CHUNK_BITS)).map_or(0, |c| c[cluster as usize % CHUNK])
    }

    /// Every cluster that somebody refers to, with its count, in order.
    pub(crate) fn used(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.chunks.iter().flat_map(|(chunk, counts)| {
            let base = chunk << CHUNK_BITS;
            counts.iter().enumerate().filter(|&(_, &n)| n > 0).map(move |(i, &n)| (base + i as u64, n))
        })
    }

    /// Counts a reference to each of `count` clusters. Errors: `Corrupt` where they pass the end of the file: counting
    /// them would take a refcount structure as large as the tables please.
    pub(crate) fn add(&mut self, first: u64, count: u64) -> Result<()> {
        let end = first.saturating_add(count);
        if end > self.end {
            return Err(Error::corrupt(format!(
                "clusters {first} to {end} are in use and past the end of the file"
            )));
        }
        for cluster in first..end {
            let chunk = cluster >> CHUNK_BITS;
            if !self.chunks.contains_key(&chunk) && self.chunks.len() == MAX_CHUNKS {
                return Err(Error::corrupt("image uses too many clusters to recount its refcounts"));
            }
            let counts = self.chunks.entry(chunk).or_insert_with(|| Box::new([0; CHUNK]));
            counts[cluster as usize % CHUNK] += 1;
        }
        Ok(())
    }
}

fn damaged(what: &'static str) -> impl Fn(FormatError) -> Error {
    move |e| Error::corrupt(format!("{what} is damaged: refcounts cannot be recounted")).with_source(e)
}

impl Meta {
    /// The references that header, tables and snapshots hold, but for the refcount structures themselves. Disk: reads
    /// every table. Errors: `Corrupt` where a table is damaged, so that nothing may be concluded from it.
    pub(crate) fn count_references(&self) -> Result<ReferenceCounts> {
        let header = self.header();
        let mut counts = ReferenceCounts::new(self.geometry.clusters_for(self.storage.len()?));
        counts.add(0, 1)?;
        self.count_tree(&mut counts, header.l1_table_offset, u64::from(header.l1_size))?;
        if let Some(luks) = header.extensions.luks {
            self.count_bytes(&mut counts, luks.offset, luks.len)?;
        }
        self.count_snapshots(&mut counts)?;
        if let Some(bitmaps) = header.trusted_bitmaps() {
            let mut directory = vec![0; bitmaps.directory_size as usize];
            self.storage.read_padded(bitmaps.directory_offset, &mut directory)?;
            self.count_bytes(&mut counts, bitmaps.directory_offset, bitmaps.directory_size)?;
            for bitmap in
                Bitmap::parse_directory(&directory, bitmaps.count).map_err(damaged("bitmap directory"))?
            {
                self.count_bitmap(&mut counts, &bitmap)?;
            }
        }
        Ok(counts)
    }

    fn count_bytes(&self, counts: &mut ReferenceCounts, start: HostOffset, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let first = self.geometry.host_cluster(start).value();
        let last = start.value().checked_add(len - 1).ok_or_else(|| Error::corrupt("a table passes 2^64"))?;
        counts.add(first, self.geometry.host_cluster(HostOffset::new(last)).value() - first + 1)
    }

    fn count_tree(&self, counts: &mut ReferenceCounts, l1: HostOffset, entries: u64) -> Result<()> {
        self.count_bytes(counts, l1, entries * 8)?;
        let size = self.geometry.cluster_size();
        for raw in read_words(&*self.storage, l1, entries.min(MAX_L1_ENTRIES))? {
            let entry = L1Entry::decode(raw, &self.geometry).map_err(damaged("l1 table"))?;
            let Some(table) = entry.l2_table else { continue };
            self.count_bytes(counts, table, size)?;
            self.count_l2(counts, table)?;
        }
        Ok(())
    }

    fn count_l2(&self, counts: &mut ReferenceCounts, table: HostOffset) -> Result<()> {
        let size = self.geometry.cluster_size();
        let words = read_words(&*self.storage, table, size / 8)?;
        for entry in words.chunks_exact((self.geometry.l2_entry_size() / 8) as usize) {
            let bitmap = entry.get(1).copied().unwrap_or(0);
            match self.l2_format.decode(entry[0], bitmap).map_err(damaged("l2 table"))? {
                L2Entry::Compressed(stream) => self.count_bytes(counts, stream.host, stream.len)?,
                L2Entry::Standard(cluster) => {
                    if let (Some(host), false) = (cluster.host, self.has_data_file()) {
                        self.count_bytes(counts, host, size)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn count_snapshots(&self, counts: &mut ReferenceCounts) -> Result<()> {
        let header = self.header();
        let mut at = header.snapshots_offset;
        let mut bytes = vec![0; qcow2_format::snapshot::MAX_ENTRY_LEN];
        let mut len = 0;
        for _ in 0..header.nb_snapshots {
            self.storage.read_padded(at, &mut bytes)?;
            let parsed = Snapshot::parse(&bytes, header.size).map_err(damaged("snapshot table"))?;
            self.count_tree(counts, parsed.snapshot.l1_table_offset, u64::from(parsed.snapshot.l1_size))?;
            len += parsed.len as u64;
            at = at
                .checked_add(parsed.len as u64)
                .ok_or_else(|| Error::corrupt("snapshot table passes 2^64"))?;
            if len > MAX_SNAPSHOT_TABLE_SIZE {
                return Err(Error::corrupt(format!(
                    "snapshot table is longer than {MAX_SNAPSHOT_TABLE_SIZE} bytes"
                )));
            }
        }
        self.count_bytes(counts, header.snapshots_offset, len)
    }

    fn count_bitmap(&self, counts: &mut ReferenceCounts, bitmap: &Bitmap) -> Result<()> {
        let entries = u64::from(bitmap.table_entries);
        if entries * 8 > self.storage.len()?.max(self.geometry.cluster_size()) {
            return Err(Error::corrupt(format!(
                "bitmap table of {entries} entries is longer than the image file"
            )));
        }
        self.count_bytes(counts, bitmap.table_offset, entries * 8)?;
        let words: Vec<u64> = read_words(&*self.storage, bitmap.table_offset, entries)?;
        for raw in words {
            let entry = BitmapTableEntry::decode(raw, &self.geometry).map_err(damaged("bitmap table"))?;
            if let BitmapTableEntry::Data(host) = entry {
                self.count_bytes(counts, host, self.geometry.cluster_size())?;
            }
        }
        Ok(())
    }
}
