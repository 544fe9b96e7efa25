//! Writes a disk as a stream of bytes.
//!
//! Order of a qcow2 stream: header, refcount table, refcount blocks, L1 table, L2 tables, then the data
//! clusters in guest order. Spec: "Header", "Host cluster management", "Cluster mapping".

use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::source::{Below, Content, Source};
use qcow2_core::GuestDisk;
use qcow2_core::format::l1::L1Entry;
use qcow2_core::format::l2::{ClusterEntry, L2Entry, L2Format};
use qcow2_core::format::limit::{MAX_L1_ENTRIES, MAX_REFCOUNT_TABLE_SIZE};
use qcow2_core::format::refcount::encode_table_entry;
use qcow2_core::format::{Geometry, Header, HostOffset, Version};
use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;
use std::sync::Arc;

/// Properties of the streamed image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamOptions {
    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
}

impl Default for StreamOptions {
    fn default() -> Self {
        Self { cluster_size: 64 << 10 }
    }
}

impl StreamOptions {
    /// With clusters of this many bytes.
    #[must_use]
    pub fn with_cluster_size(self, cluster_size: u64) -> Self {
        Self { cluster_size, ..self }
    }
}

/// Writes the concatenated disks as raw bytes. Returns the number of bytes. Memory: 1 MiB. Errors: `Read`,
/// `Extents`, `Write`, `Stopped`.
pub fn stream_raw(disks: &[Arc<dyn GuestDisk>], out: &mut dyn Write, progress: &dyn Progress) -> Result<u64> {
    let source = Source::new(disks)?;
    progress.set_total(source.size());
    let mut copier = Copier { source: &source, out, progress, buf: vec![0; PIECE as usize], zeroes: false };
    let mut at = 0;
    while at < source.size() {
        let run = source.content_at(at, (source.size() - at).min(PIECE), Below::Nothing)?;
        copier.bytes(run.start, run.len, run.content == Content::Zero)?;
        at = run.end();
    }
    copier.end()?;
    Ok(source.size())
}

/// Writes the concatenated disks as a qcow2 image without a backing file. Clusters that the block status
/// shows as zero are left out. All others are written uncompressed, even if they turn out to be zero: the
/// tables have already been written. Returns the size of the image in bytes. Memory: a bit per used cluster
/// and its neighbours, at most 2^32 bits, a byte per L2 table, and 1 MiB.
///
/// Errors: `InvalidOption` for a cluster size or disk size that the format does not allow; `Extents`, `Read`,
/// `Write`, `Stopped`.
pub fn stream_qcow2(
    disks: &[Arc<dyn GuestDisk>],
    options: &StreamOptions,
    out: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<u64> {
    let source = Source::new(disks)?;
    let mut header = header_for(options, source.size())?;
    let format = header.l2_format().map_err(invalid)?;
    check_l1_size(&format.geometry, source.size())?;
    let used = Used::find(&source, &format.geometry, progress)?;
    let layout = Layout::plan(&format.geometry, &used, source.size())?;
    progress.set_total(used.count * options.cluster_size);
    header.refcount_table_offset = layout.at(layout.table_start());
    header.refcount_table_clusters = layout.table as u32;
    header.l1_table_offset = layout.at(layout.l1_start());
    header.l1_size = layout.l1_entries as u32;
    let mut put = Put { out, bytes: Vec::with_capacity(PIECE as usize) };
    put.bytes(&header.encode_cluster().map_err(invalid)?)?;
    layout.write_refcounts(&mut put)?;
    layout.write_mapping(&mut put, &format, &used)?;
    put.flush()?;
    let buf = vec![0; PIECE.max(options.cluster_size) as usize];
    let mut copier = Copier { source: &source, out: put.out, progress, buf, zeroes: false };
    for cluster in used.iter() {
        let start = cluster * options.cluster_size;
        copier.cluster(start, options.cluster_size)?;
    }
    copier.end()?;
    Ok(layout.end() * options.cluster_size)
}

fn header_for(options: &StreamOptions, size: u64) -> Result<Header> {
    if !options.cluster_size.is_power_of_two() {
        let message = format!("cluster size is {}, allowed are powers of two", options.cluster_size);
        return Err(Error::new(ErrorKind::InvalidOption, message));
    }
    let mut header = Header::new(Version::V3, options.cluster_size.trailing_zeros());
    header.size = size;
    if options.cluster_size > 4096 {
        header.extensions.feature_names = Some(qcow2_core::format::feature::FeatureName::standard());
    }
    header.geometry().map_err(invalid)?;
    Ok(header)
}

/// Refuses a disk that is too large before its block status is read.
fn check_l1_size(geometry: &Geometry, size: u64) -> Result<()> {
    match geometry.l1_entries_for(size) > MAX_L1_ENTRIES {
        true => Err(too_large(size, "l1 table")),
        false => Ok(()),
    }
}

fn too_large(size: u64, what: &str) -> Error {
    let message = format!("a disk of {size} bytes needs a larger {what} than allowed; use larger clusters");
    Error::new(ErrorKind::InvalidOption, message)
}

fn invalid(error: qcow2_core::format::FormatError) -> Error {
    Error::new(ErrorKind::InvalidOption, "invalid image parameters").with_source(error)
}

/// The guest clusters to write: a bitmap in blocks, of which only those with a bit set exist.
struct Used {
    blocks: BTreeMap<u64, Box<[u64; BLOCK_WORDS]>>,
    count: u64,
}

/// Words per block: small compared with the data of a single cluster in it.
const BLOCK_WORDS: usize = 64;
const BLOCK_BITS: u64 = BLOCK_WORDS as u64 * 64;
/// The most blocks, about half a GiB of memory. Origin: ours; enough for a disk of 256 TiB with 64 KiB
/// clusters.
const MAX_BLOCKS: usize = 1 << 20;

impl Used {
    fn find(source: &Source, geometry: &Geometry, progress: &dyn Progress) -> Result<Self> {
        let mut used = Self { blocks: BTreeMap::new(), count: 0 };
        let (size, mut at) = (geometry.cluster_size(), 0);
        while at < source.size() {
            if progress.should_stop() {
                return Err(Error::new(ErrorKind::Stopped, format!("stopped at byte {at}")));
            }
            let run = source.content_at(at, source.size() - at, Below::Nothing)?;
            if run.content != Content::Zero {
                used.set(run.start / size..run.end().div_ceil(size))?;
            }
            at = run.end();
        }
        Ok(used)
    }

    fn set(&mut self, clusters: Range<u64>) -> Result<()> {
        for index in clusters.start / BLOCK_BITS..clusters.end.div_ceil(BLOCK_BITS) {
            if self.blocks.len() == MAX_BLOCKS && !self.blocks.contains_key(&index) {
                let message = format!(
                    "a disk with more than {} used clusters cannot be streamed; use larger clusters",
                    self.count
                );
                return Err(Error::new(ErrorKind::InvalidOption, message));
            }
            let block = self.blocks.entry(index).or_insert_with(|| Box::new([0; BLOCK_WORDS]));
            let base = index * BLOCK_BITS;
            for (start, word) in (base..).step_by(64).zip(&mut block[..]) {
                let low = clusters.start.clamp(start, start + 64) - start;
                let high = clusters.end.clamp(start, start + 64) - start;
                let mask = below(high) & !below(low);
                self.count += u64::from((mask & !*word).count_ones());
                *word |= mask;
            }
        }
        Ok(())
    }

    fn has(&self, cluster: u64) -> bool {
        let block = self.blocks.get(&(cluster / BLOCK_BITS));
        block.is_some_and(|words| words[(cluster % BLOCK_BITS / 64) as usize] >> (cluster % 64) & 1 == 1)
    }

    fn iter(&self) -> impl Iterator<Item = u64> {
        self.in_blocks(0..u64::MAX)
    }

    /// The used clusters in a range of blocks.
    fn in_blocks(&self, blocks: Range<u64>) -> impl Iterator<Item = u64> {
        let bits = |word: u64| (0..64u64).filter(move |bit| word >> bit & 1 == 1);
        self.blocks.range(blocks).flat_map(move |(&index, words)| {
            let words = (0u64..).zip(words.iter().copied());
            words.flat_map(move |(i, word)| bits(word).map(move |bit| index * BLOCK_BITS + i * 64 + bit))
        })
    }

    /// True if any of the `count` clusters from `first` is used.
    fn any(&self, first: u64, count: u64) -> bool {
        let end = first + count;
        let mut near = self.in_blocks(first / BLOCK_BITS..end.div_ceil(BLOCK_BITS));
        near.find(|&cluster| cluster >= first).is_some_and(|cluster| cluster < end)
    }
}

/// A word with the lowest `count` bits set.
fn below(count: u64) -> u64 {
    if count < 64 { (1 << count) - 1 } else { u64::MAX }
}

/// The layout of the image: sizes of its parts, in clusters.
struct Layout {
    geometry: Geometry,
    table: u64,
    blocks: u64,
    l1: u64,
    l1_entries: u64,
    /// True for each L1 entry that has an L2 table.
    has_l2: Vec<bool>,
    l2: u64,
    data: u64,
}

impl Layout {
    fn plan(geometry: &Geometry, used: &Used, size: u64) -> Result<Self> {
        let l1_entries = geometry.l1_entries_for(size);
        let per_table = geometry.l2_entries();
        let has_l2: Vec<bool> = (0..l1_entries).map(|index| used.any(index * per_table, per_table)).collect();
        let mut layout = Self {
            geometry: *geometry,
            table: 1,
            blocks: 1,
            l1: geometry.clusters_for(l1_entries * 8),
            l1_entries,
            l2: has_l2.iter().filter(|has| **has).count() as u64,
            has_l2,
            data: used.count,
        };
        // Blocks and table count their own clusters too, so grow them until they suffice.
        loop {
            let blocks = layout.end().div_ceil(geometry.refcount_block_entries()).max(layout.blocks);
            let table = geometry.clusters_for(blocks * 8).max(layout.table);
            if (blocks, table) == (layout.blocks, layout.table) {
                break;
            }
            (layout.blocks, layout.table) = (blocks, table);
        }
        if layout.table * geometry.cluster_size() > MAX_REFCOUNT_TABLE_SIZE.max(geometry.cluster_size()) {
            return Err(too_large(size, "refcount table"));
        }
        Ok(layout)
    }

    fn at(&self, cluster: u64) -> HostOffset {
        HostOffset::new(cluster * self.geometry.cluster_size())
    }

    fn table_start(&self) -> u64 {
        1
    }

    fn l1_start(&self) -> u64 {
        1 + self.table + self.blocks
    }

    fn l2_start(&self) -> u64 {
        self.l1_start() + self.l1
    }

    fn data_start(&self) -> u64 {
        self.l2_start() + self.l2
    }

    fn end(&self) -> u64 {
        self.data_start() + self.data
    }

    /// Writes the refcount table and the blocks. Every cluster has refcount 1; refcounts are 16 bits wide.
    fn write_refcounts(&self, put: &mut Put<'_>) -> Result<()> {
        let size = self.geometry.cluster_size();
        for i in 0..self.table * size / 8 {
            let block = (i < self.blocks).then(|| self.at(self.table_start() + self.table + i));
            put.bytes(&encode_table_entry(block).to_be_bytes())?;
        }
        for cluster in 0..self.blocks * size / 2 {
            put.bytes(&u16::from(cluster < self.end()).to_be_bytes())?;
        }
        Ok(())
    }

    /// Writes the L1 table and the L2 tables that map any cluster.
    fn write_mapping(&self, put: &mut Put<'_>, format: &L2Format, used: &Used) -> Result<()> {
        let (size, per_table) = (self.geometry.cluster_size(), self.geometry.l2_entries());
        let mut next = self.l2_start();
        for index in 0..self.l1 * size / 8 {
            let has_table = self.has_l2.get(index as usize) == Some(&true);
            let entry = L1Entry { l2_table: has_table.then(|| self.at(next)), copied: has_table };
            put.bytes(&entry.encode().to_be_bytes())?;
            next += u64::from(has_table);
        }
        let mut data = self.data_start();
        for index in (0..self.l1_entries).filter(|index| self.has_l2[*index as usize]) {
            for cluster in index * per_table..(index + 1) * per_table {
                let mut raw = 0;
                if used.has(cluster) {
                    let host = Some(self.at(data));
                    let entry = L2Entry::Standard(ClusterEntry { host, copied: true, allocated: 1, zero: 0 });
                    let encoded = format.encode(&entry).ok_or_else(|| {
                        Error::new(ErrorKind::InvalidOption, "the image exceeds the largest host offset")
                    })?;
                    raw = encoded.0;
                    data += 1;
                }
                put.bytes(&raw.to_be_bytes())?;
            }
        }
        Ok(())
    }
}

/// Buffers small writes.
struct Put<'a> {
    out: &'a mut dyn Write,
    bytes: Vec<u8>,
}

impl Put<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() as u64 >= PIECE { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        self.out.write_all(&self.bytes).map_err(broken)?;
        self.bytes.clear();
        Ok(())
    }
}

/// Copies from the source to the stream.
struct Copier<'a> {
    source: &'a Source,
    out: &'a mut dyn Write,
    progress: &'a dyn Progress,
    buf: Vec<u8>,
    /// True if the buffer holds only zeroes.
    zeroes: bool,
}

impl Copier<'_> {
    /// Copies bytes of the source; the range must be inside it.
    fn bytes(&mut self, start: u64, len: u64, zero: bool) -> Result<()> {
        if self.progress.should_stop() {
            return Err(Error::new(ErrorKind::Stopped, format!("stopped at byte {start}")));
        }
        let buf = &mut self.buf[..len as usize];
        if !zero {
            self.source.read_at(start, buf).map_err(|e| {
                Error::new(ErrorKind::Read, format!("error while reading at byte {start}")).with_source(e)
            })?;
        } else if !self.zeroes {
            buf.fill(0);
        }
        // The buffer is known to be zero only if all of it was cleared.
        self.zeroes = zero && (self.zeroes || len as usize == self.buf.len());
        self.out.write_all(&self.buf[..len as usize]).map_err(broken)?;
        self.progress.advance(len);
        Ok(())
    }

    /// Copies a whole cluster; past the end of the source it is zero.
    fn cluster(&mut self, start: u64, size: u64) -> Result<()> {
        let inside = size.min(self.source.size() - start);
        self.bytes(start, inside, false)?;
        if inside < size {
            self.out.write_all(&vec![0; (size - inside) as usize]).map_err(broken)?;
        }
        Ok(())
    }

    fn end(self) -> Result<()> {
        self.out.flush().map_err(broken)
    }
}

fn broken(error: std::io::Error) -> Error {
    Error::new(ErrorKind::Write, "error while writing the stream").with_source(error)
}

/// Bytes moved at once.
const PIECE: u64 = 1 << 20;
