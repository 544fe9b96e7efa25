//! The refcounts that an image stores, as evidence: which clusters were in use, and which tables are old.

use super::job::Bytes;
use crate::error::Result;
use qcow2_core::HostOffset;
use qcow2_format::l2::MAX_CUT;
use qcow2_format::refcount::decode_table_entry;
use qcow2_format::{Geometry, Header, Version, bytes, limit};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Stored refcounts, if the structure that holds them is one.
pub(super) struct Counts<'a> {
    bytes: Bytes<'a>,
    geometry: Geometry,
    table_at: HostOffset,
    table: Vec<u64>,
    /// The block that was read last: its index in the table, and its words.
    block: RefCell<(u64, Vec<u64>)>,
}

impl<'a> Counts<'a> {
    /// The structure that `header` leads to. `None` unless it counts the header, its own table and its first
    /// block: then it is one. Disk: reads the table. Errors: the storage's.
    pub(super) fn read(bytes: Bytes<'a>, header: &Header, geometry: Geometry) -> Result<Option<Self>> {
        let table_at = header.refcount_table_offset;
        let len = geometry.bytes_of(header.refcount_table_clusters.into());
        let usable =
            table_at.value() > 0 && table_at.value() < bytes.len && geometry.is_aligned(table_at.value());
        if len == 0 || len > limit::MAX_REFCOUNT_TABLE_SIZE || !usable {
            return Ok(None);
        }
        let mut content = vec![0; len as usize];
        bytes.read(table_at, &mut content)?;
        let table = qcow2_format::bytes::words(&content).collect();
        let counts = Self { bytes, geometry, table_at, table, block: RefCell::new((u64::MAX, Vec::new())) };
        let first = counts.table.first().and_then(|&raw| decode_table_entry(raw, &geometry).ok().flatten());
        let Some(first) = first else { return Ok(None) };
        for cluster in [0, geometry.host_cluster(table_at).value(), geometry.host_cluster(first).value()] {
            if counts.count(cluster)?.is_none_or(|count| count == 0) {
                return Ok(None);
            }
        }
        Ok(Some(counts))
    }

    /// The refcount of `cluster`. `None` if its block is not there, or has no count at all, which a block
    /// that was overwritten looks like. Disk: may read a block.
    pub(super) fn count(&self, cluster: u64) -> Result<Option<u64>> {
        let (geometry, host) = (self.geometry, qcow2_format::HostCluster::new(cluster));
        let index = geometry.refcount_table_index(host);
        if self.block.borrow().0 != index {
            let words = self.read_block(index)?;
            self.block.replace((index, words));
        }
        let block = self.block.borrow();
        let width = geometry.refcount_width();
        let slot = geometry.refcount_block_slot(host);
        Ok(block.1.get(width.word_index(slot)).map(|&word| width.extract(word, slot)))
    }

    fn read_block(&self, index: u64) -> Result<Vec<u64>> {
        let raw = usize::try_from(index).ok().and_then(|index| self.table.get(index)).copied().unwrap_or(0);
        let Ok(Some(place)) = decode_table_entry(raw, &self.geometry) else { return Ok(Vec::new()) };
        if place.value() >= self.bytes.len {
            return Ok(Vec::new());
        }
        let mut content = vec![0; self.geometry.cluster_size() as usize];
        self.bytes.read(place, &mut content)?;
        let words: Vec<u64> = bytes::words(&content).collect();
        Ok(if words.iter().all(|&word| word == 0) { Vec::new() } else { words })
    }

    /// The clusters of the structure itself, in no order.
    pub(super) fn own_clusters(&self) -> impl Iterator<Item = u64> + '_ {
        let first = self.geometry.host_cluster(self.table_at).value();
        let table = first..first + self.geometry.clusters_for(self.table.len() as u64 * 8);
        let blocks =
            self.table.iter().filter_map(|&raw| decode_table_entry(raw, &self.geometry).ok().flatten());
        table.chain(blocks.map(|block| self.geometry.host_cluster(block).value()))
    }
}

/// The refcounts of the refcount table at `table`, in an image with clusters of 2^`bits` bytes and no header,
/// as a header leads to them. `None` unless the structure counts all that it has itself, once.
pub(super) fn certified(bytes: Bytes<'_>, bits: u32, table: HostOffset) -> Result<Option<Header>> {
    let mut header = Header::new(Version::V3, bits);
    let Ok(geometry) = header.geometry() else { return Ok(None) };
    header.refcount_table_offset = table;
    header.refcount_table_clusters = table_clusters(bytes, &geometry, table)?;
    // 16 bits are what nearly all images have.
    for order in [4, 3, 5, 6, 2, 1, 0] {
        header.refcount_order = order;
        let Ok(geometry) = header.geometry() else { continue };
        let Some(counts) = Counts::read(bytes, &header, geometry)? else { continue };
        let mut sound = counts.count(0)? == Some(1);
        for cluster in counts.own_clusters().take(MAX_PROVED) {
            // A block behind the end of a cut file cannot be counted by a block that is there.
            sound &= counts.count(cluster)?.is_none_or(|count| count == 1);
        }
        if sound {
            return Ok(Some(header));
        }
    }
    Ok(None)
}

/// Clusters of a refcount structure that must have a refcount of one.
const MAX_PROVED: usize = 1000;

/// How many clusters from `table` on can be a refcount table: they have entries, and nothing else.
fn table_clusters(bytes: Bytes<'_>, geometry: &Geometry, table: HostOffset) -> Result<u32> {
    let first = geometry.host_cluster(table).value();
    let most = limit::MAX_REFCOUNT_TABLE_SIZE / geometry.cluster_size();
    let mut blocks = BTreeSet::new();
    let mut content = vec![0; geometry.cluster_size() as usize];
    for count in 0..most {
        let cluster = first + count;
        if blocks.contains(&cluster) {
            return Ok(count as u32);
        }
        bytes.read(HostOffset::new(geometry.bytes_of(cluster)), &mut content)?;
        let before = blocks.len();
        for raw in bytes::words(&content).filter(|&raw| raw != 0) {
            match decode_table_entry(raw, geometry) {
                // A file that was cut has the places of blocks that it lacks.
                Ok(Some(block)) if block.value() / MAX_CUT < bytes.len => {
                    blocks.insert(geometry.host_cluster(block).value());
                }
                _ => return Ok(count as u32),
            }
        }
        if blocks.len() == before {
            return Ok(count as u32);
        }
    }
    Ok(most as u32)
}
