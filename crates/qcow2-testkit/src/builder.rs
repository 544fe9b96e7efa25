//! Builds small images without the engine: valid ones with exactly the given clusters, which tests then
//! patch.
//!
//! The layout is fixed: header, refcount table, refcount blocks, L1 table, L2 tables, one host cluster for
//! each stored guest cluster, then all compressed streams. The arithmetic is independent of the engine's.
//! Only what encoding needs is validated, so that invalid images can be built too.

use crate::pages::PageBytes;
use crate::storage::PageStorage;
use qcow2_core::HostOffset;
use qcow2_format::feature::IncompatibleFeatures;
use qcow2_format::header::{Header, Version};
use std::collections::BTreeMap;

/// Content of one guest cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Stored bytes, at most one cluster; padded with zeroes.
    Data(Vec<u8>),
    /// Zero flag, no host cluster.
    Zero,
    /// Zero flag on an allocated host cluster that holds these bytes, which no reader may see.
    ZeroAllocated(Vec<u8>),
    /// A compressed stream, stored as it is.
    Compressed(Vec<u8>),
    /// A host cluster with these bytes and a subcluster bitmap (extended L2 entries).
    Subclusters {
        /// Bits of the allocated subclusters.
        allocated: u32,
        /// Bits of the zero subclusters.
        zero: u32,
        /// Content of the host cluster.
        data: Vec<u8>,
    },
    /// A raw L2 entry and bitmap, without a host cluster.
    Entry {
        /// First word.
        entry: u64,
        /// Second word, with extended L2 entries.
        bitmap: u64,
    },
}

/// Collects the clusters of an image, then lays it out.
#[derive(Clone, Debug)]
pub struct Builder {
    header: Header,
    clusters: BTreeMap<u64, Cluster>,
}

impl Builder {
    /// A version 3 image of `size` guest bytes with clusters of 2^`cluster_bits` bytes.
    pub fn new(cluster_bits: u32, size: u64) -> Self {
        Self::with_header(Header { size, ..Header::new(Version::V3, cluster_bits) })
    }

    /// An image with these header fields; the builder sets the offsets of the tables.
    pub fn with_header(header: Header) -> Self {
        Self { header, clusters: BTreeMap::new() }
    }

    /// The header, for changes before [`build`](Self::build).
    pub fn header_mut(&mut self) -> &mut Header {
        &mut self.header
    }

    /// Sets the content of guest cluster `index`.
    pub fn cluster(mut self, index: u64, content: Cluster) -> Self {
        self.clusters.insert(index, content);
        self
    }

    /// Lays the image out. Panics if the header cannot be encoded.
    pub fn build(self) -> Built {
        Layout::new(self).build()
    }
}

/// A built image and the offsets of its parts.
#[derive(Clone, Debug)]
pub struct Built {
    /// The image file's bytes.
    pub bytes: Vec<u8>,
    /// The external data file's bytes; empty without one.
    pub data_file: Vec<u8>,
    /// Offset of the refcount table.
    pub refcount_table: u64,
    /// Offset of the first refcount block; the others follow it.
    pub refcount_blocks: u64,
    /// Offset of the L1 table.
    pub l1: u64,
    /// Offset of the L2 table of each L1 index that has one.
    pub l2: BTreeMap<u64, u64>,
    /// Host offset of each stored guest cluster (of the stream, for compressed ones).
    pub hosts: BTreeMap<u64, u64>,
    cluster_size: u64,
    entry_size: u64,
    refcount_bits: u64,
}

impl Built {
    /// Overwrites bytes at `offset`; grows the file if needed.
    pub fn patch(&mut self, offset: u64, bytes: &[u8]) -> &mut Self {
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[start..end].copy_from_slice(bytes);
        self
    }

    /// Overwrites a big-endian 64-bit number.
    pub fn patch_u64(&mut self, offset: u64, value: u64) -> &mut Self {
        self.patch(offset, &value.to_be_bytes())
    }

    /// Overwrites a big-endian 32-bit number.
    pub fn patch_u32(&mut self, offset: u64, value: u32) -> &mut Self {
        self.patch(offset, &value.to_be_bytes())
    }

    /// The big-endian 64-bit number at `offset`.
    pub fn read_u64(&self, offset: u64) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.bytes[offset as usize..offset as usize + 8]);
        u64::from_be_bytes(word)
    }

    /// Host offset of the L2 entry of guest cluster `index`. Panics if there is no L2 table for it.
    pub fn l2_entry(&self, index: u64) -> u64 {
        let entries = self.cluster_size / self.entry_size;
        self.l2[&(index / entries)] + index % entries * self.entry_size
    }

    /// Sets the refcount of host cluster `index`, which a refcount block must cover.
    pub fn set_refcount(&mut self, index: u64, count: u64) -> &mut Self {
        let blocks = &mut self.bytes[self.refcount_blocks as usize..];
        pack_refcount(blocks, self.refcount_bits, index, count);
        self
    }

    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.cluster_size
    }

    /// The image in memory.
    pub fn storage(&self) -> PageStorage {
        storage_of(&self.bytes)
    }

    /// The external data file in memory.
    pub fn data_storage(&self) -> PageStorage {
        storage_of(&self.data_file)
    }
}

fn storage_of(bytes: &[u8]) -> PageStorage {
    let mut pages = PageBytes::default();
    pages.write(0, bytes);
    PageStorage::new(pages)
}

/// Writes one refcount into refcount blocks that are contiguous in `blocks`.
fn pack_refcount(blocks: &mut [u8], bits: u64, index: u64, count: u64) {
    let at = (index * bits / 8) as usize;
    if bits < 8 {
        let shift = index * bits % 8;
        let mask = ((1u8 << bits) - 1) << shift;
        blocks[at] = blocks[at] & !mask | (count as u8) << shift & mask;
    } else {
        let len = (bits / 8) as usize;
        blocks[at..at + len].copy_from_slice(&count.to_be_bytes()[8 - len..]);
    }
}

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// The layout under construction; all fields count host clusters.
struct Layout {
    header: Header,
    clusters: BTreeMap<u64, Cluster>,
    cluster_size: u64,
    entry_size: u64,
    refcount_bits: u64,
    external: bool,
    table_clusters: u64,
    block_clusters: u64,
    l1_entries: u64,
    l1_clusters: u64,
}

impl Layout {
    fn new(builder: Builder) -> Self {
        let Builder { header, clusters } = builder;
        let has = |feature| header.features.incompatible.contains(feature);
        let entry_size = if has(IncompatibleFeatures::EXTENDED_L2) { 16 } else { 8 };
        let external = has(IncompatibleFeatures::DATA_FILE);
        let cluster_size = 1u64 << header.cluster_bits;
        let coverage = cluster_size * (cluster_size / entry_size);
        let l1_entries = header.size.div_ceil(coverage).max(1);
        let mut layout = Self {
            entry_size,
            external,
            cluster_size,
            refcount_bits: 1 << header.refcount_order,
            header,
            clusters,
            table_clusters: 1,
            block_clusters: 1,
            l1_entries,
            l1_clusters: (l1_entries * 8).div_ceil(cluster_size),
        };
        layout.size_refcounts();
        layout
    }

    /// Grows the refcount table and blocks until they cover every cluster, their own included.
    fn size_refcounts(&mut self) {
        let streams: u64 = self
            .clusters
            .values()
            .map(|c| if let Cluster::Compressed(s) = c { s.len() as u64 } else { 0 })
            .sum();
        let rest = 1
            + self.l1_clusters
            + self.l2_indexes().len() as u64
            + self.stored().count() as u64
            + streams.div_ceil(self.cluster_size);
        loop {
            let total = rest + self.table_clusters + self.block_clusters;
            let blocks = total.div_ceil(self.cluster_size * 8 / self.refcount_bits);
            let table = (blocks * 8).div_ceil(self.cluster_size);
            if blocks <= self.block_clusters && table <= self.table_clusters {
                return;
            }
            (self.block_clusters, self.table_clusters) = (blocks, table);
        }
    }

    fn entries(&self) -> u64 {
        self.cluster_size / self.entry_size
    }

    fn l2_indexes(&self) -> Vec<u64> {
        let mut indexes: Vec<_> = self.clusters.keys().map(|index| index / self.entries()).collect();
        indexes.dedup();
        indexes
    }

    /// Guest clusters that have a host cluster of their own in the image file.
    fn stored(&self) -> impl Iterator<Item = u64> + '_ {
        let external = self.external;
        let stored =
            |c: &Cluster| !matches!(c, Cluster::Zero | Cluster::Compressed(_) | Cluster::Entry { .. });
        self.clusters.iter().filter(move |(_, c)| stored(c) && !external).map(|(index, _)| *index)
    }

    fn build(mut self) -> Built {
        let table = 1;
        let blocks = table + self.table_clusters;
        let l1 = blocks + self.block_clusters;
        let l2 = l1 + self.l1_clusters;
        let l2_indexes = self.l2_indexes();
        let data = l2 + l2_indexes.len() as u64;
        let packed = data + self.stored().count() as u64;
        let at = |cluster: u64| cluster * self.cluster_size;
        let mut built = Built {
            bytes: vec![0; at(packed) as usize],
            data_file: Vec::new(),
            refcount_table: at(table),
            refcount_blocks: at(blocks),
            l1: at(l1),
            l2: l2_indexes.iter().zip(l2..).map(|(index, cluster)| (*index, at(cluster))).collect(),
            hosts: self.stored().zip(data..).map(|(index, cluster)| (index, at(cluster))).collect(),
            cluster_size: self.cluster_size,
            entry_size: self.entry_size,
            refcount_bits: self.refcount_bits,
        };
        for (index, offset) in built.l2.clone() {
            built.patch_u64(built.l1 + index * 8, offset | COPIED);
        }
        self.write_clusters(&mut built);
        self.write_refcounts(&mut built, packed);
        self.write_header(&mut built);
        built
    }

    fn write_clusters(&self, built: &mut Built) {
        for (index, content) in &self.clusters {
            let host = if self.external {
                index * self.cluster_size
            } else {
                built.hosts.get(index).copied().unwrap_or(0)
            };
            let standard = host | COPIED;
            let (entry, bitmap, data): (u64, u64, &[u8]) = match content {
                Cluster::Data(data) if self.entry_size == 16 => (standard, 0xffff_ffff, data),
                Cluster::Data(data) => (standard, 0, data),
                Cluster::Zero if self.entry_size == 16 => (0, 0xffff_ffff << 32, &[]),
                Cluster::Zero => (1, 0, &[]),
                Cluster::ZeroAllocated(data) if self.entry_size == 16 => (standard, 0xffff_ffff << 32, data),
                Cluster::ZeroAllocated(data) => (standard | 1, 0, data),
                Cluster::Subclusters { allocated, zero, data } => {
                    (standard, u64::from(*allocated) | u64::from(*zero) << 32, data)
                }
                Cluster::Compressed(stream) => (self.append_stream(built, *index, stream), 0, &[]),
                Cluster::Entry { entry, bitmap } => (*entry, *bitmap, &[]),
            };
            let place = built.l2_entry(*index);
            built.patch_u64(place, entry);
            if self.entry_size == 16 {
                built.patch_u64(place + 8, bitmap);
            }
            if !matches!(content, Cluster::Zero | Cluster::Compressed(_) | Cluster::Entry { .. }) {
                self.store(built, host, data);
            }
        }
    }

    fn store(&self, built: &mut Built, host: u64, data: &[u8]) {
        assert!(data.len() as u64 <= self.cluster_size, "more than a cluster");
        if self.external {
            let end = (host + self.cluster_size) as usize;
            built.data_file.resize(built.data_file.len().max(end), 0);
            built.data_file[host as usize..host as usize + data.len()].copy_from_slice(data);
        } else {
            built.patch(host, data);
        }
    }

    /// Appends a stream to the file and returns its compressed-cluster descriptor.
    fn append_stream(&self, built: &mut Built, index: u64, stream: &[u8]) -> u64 {
        let host = built.bytes.len() as u64;
        built.bytes.extend_from_slice(stream);
        built.hosts.insert(index, host);
        let sectors = (host + stream.len() as u64 - 1) / 512 - host / 512;
        let shift = 62 - (self.header.cluster_bits - 8);
        COMPRESSED | sectors << shift | host
    }

    /// Refcounts: one for every cluster before the streams; for those after, one per stream that touches it.
    fn write_refcounts(&self, built: &mut Built, packed: u64) {
        for block in 0..self.block_clusters {
            let offset = built.refcount_blocks + block * self.cluster_size;
            built.patch_u64(built.refcount_table + block * 8, offset);
        }
        for cluster in 0..packed {
            built.set_refcount(cluster, 1);
        }
        let mut counts = BTreeMap::new();
        for (index, content) in &self.clusters {
            if let Cluster::Compressed(stream) = content {
                let first = built.hosts[index];
                for cluster in
                    first / self.cluster_size..=(first + stream.len() as u64 - 1) / self.cluster_size
                {
                    *counts.entry(cluster).or_insert(0) += 1;
                }
            }
        }
        for (cluster, count) in counts {
            built.set_refcount(cluster, count);
        }
    }

    fn write_header(&mut self, built: &mut Built) {
        self.header.l1_size = self.l1_entries as u32;
        self.header.l1_table_offset = HostOffset::new(built.l1);
        self.header.refcount_table_offset = HostOffset::new(built.refcount_table);
        self.header.refcount_table_clusters = self.table_clusters as u32;
        let header = self.header.encode().unwrap_or_else(|e| panic!("header: {e}"));
        built.patch(0, &header);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::Qemu;
    use crate::pattern;
    use std::fs;

    /// Builds an image with every kind of cluster and lets qemu-img check it.
    fn check(name: &str, header: Header, extra: &[(u64, Cluster)]) {
        let Some(qemu) = Qemu::find() else { return };
        let size = 1u64 << header.cluster_bits;
        let data = |seed| pattern::bytes(seed, 0, size as usize);
        let mut builder = Builder::with_header(Header { size: size * 100 + 512, ..header })
            .cluster(0, Cluster::Data(data(1)))
            .cluster(99, Cluster::Data(data(2)));
        for (index, content) in extra {
            builder = builder.cluster(*index, content.clone());
        }
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.qcow2"), builder.build().bytes).unwrap();
        let seen = qemu.img.run_in(folder.path(), &["check", "a.qcow2"]);
        assert_eq!(seen.code, Some(0), "{name}: {seen}");
        qemu.img.run_in(folder.path(), &["convert", "-O", "raw", "a.qcow2", "a.raw"]).success();
        let raw = fs::read(folder.path().join("a.raw")).unwrap();
        assert_eq!(raw.len() as u64, size * 100 + 512);
        assert!(
            raw[..size as usize] == data(1) && raw[99 * size as usize..][..size as usize] == data(2),
            "{name}"
        );
        assert!(
            raw[size as usize..99 * size as usize].iter().all(|&b| b == 0),
            "{name}: unset clusters read as zeroes"
        );
    }

    #[test]
    fn built_images_pass_qemu_img_check() {
        let stale = vec![7; 100];
        let zeroes = [(3, Cluster::Zero), (50, Cluster::ZeroAllocated(stale.clone()))];
        // Raw deflate: one final stored block with one cluster of 512 zeroes.
        let stored = [&[1u8, 0, 2, 0xff, 0xfd][..], &[0; 512]].concat();
        for bits in [9, 12, 16, 18] {
            check("version 3", Header::new(Version::V3, bits), &zeroes);
            check("version 2", Header::new(Version::V2, bits), &[]);
        }
        for refcount_order in 0..=6 {
            let header = Header { refcount_order, ..Header::new(Version::V3, 9) };
            check("refcount width", header, &zeroes);
        }
        let streams = [(4, Cluster::Compressed(stored.clone())), (5, Cluster::Compressed(stored))];
        check("compressed", Header::new(Version::V3, 9), &streams);
        let mut header = Header::new(Version::V3, 14);
        header.features.incompatible = IncompatibleFeatures::EXTENDED_L2;
        let some = Cluster::Subclusters { allocated: 0, zero: 0xf0, data: stale };
        check("subclusters", header, &[zeroes[0].clone(), zeroes[1].clone(), (60, some)]);
    }

    #[test]
    fn packed_refcounts_read_back_through_the_format_crate() {
        for order in 0..=6 {
            let width = qcow2_format::refcount::RefcountWidth::from_order(order).unwrap();
            let mut block = vec![0; 512];
            pack_refcount(&mut block, 1 << order, 5, 1);
            for (slot, count) in [(4, 0), (5, 1), (6, 0)] {
                let at = width.word_index(slot) * 8;
                let word = u64::from_be_bytes(block[at..at + 8].try_into().unwrap());
                assert_eq!(width.extract(word, slot), count, "order {order}, slot {slot}");
            }
        }
    }
}
