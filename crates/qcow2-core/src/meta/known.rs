//! Which host clusters hold metadata when an image is opened.

use super::alloc::Refcounts;
use super::overlap::{ClusterSet, OverlapChecks};
use crate::error::Result;
use crate::port::storage::Storage;
use crate::walk::{Walk, overlay};
use qcow2_format::l1::L1Entry;
use qcow2_format::refcount::decode_table_entry;
use qcow2_format::{Geometry, Header, HostOffset};

/// The most clusters of snapshots' tables that are noted; a hostile image may name far more than it has.
const MAX_NOTED: u64 = 1 << 22;

/// The clusters that header and tables say hold metadata of the kinds in `checks`. Disk: reads the snapshot table, and
/// the snapshots' L1 tables where their L2 tables count. Damage in them is left to a check. Errors: `Storage`.
pub(crate) fn known_metadata(
    storage: &dyn Storage,
    header: &Header,
    (l1, refcounts): (&[u64], &Refcounts),
    checks: OverlapChecks,
) -> Result<ClusterSet> {
    let walk = Walk::new(storage, header)?;
    let geometry = walk.geometry();
    let size = geometry.cluster_size();
    let mut noted = Noted { set: ClusterSet::default(), geometry, checks, left: u64::MAX };
    noted.add(OverlapChecks::MAIN_HEADER, HostOffset::new(0), size);
    noted.add(OverlapChecks::ACTIVE_L1, header.l1_table_offset, u64::from(header.l1_size) * 8);
    let table_len = refcounts.table_clusters * size;
    noted.add(OverlapChecks::REFCOUNT_TABLE, header.refcount_table_offset, table_len);
    for &raw in refcounts.table.iter().filter(|&&raw| raw != 0) {
        if let Ok(Some(block)) = decode_table_entry(raw, geometry) {
            noted.add(OverlapChecks::REFCOUNT_BLOCK, block, size);
        }
    }
    noted.add_l2_tables(OverlapChecks::ACTIVE_L2, l1.iter().copied());
    if let Some(luks) = header.extensions.luks {
        noted.add(OverlapChecks::MAIN_HEADER, luks.offset, luks.len.min(size << 20));
    }
    if let Some(bitmaps) = header.trusted_bitmaps() {
        noted.add(OverlapChecks::BITMAP_DIRECTORY, bitmaps.directory_offset, bitmaps.directory_size);
    }
    noted.left = MAX_NOTED;
    noted.add_snapshots(&walk)?;
    Ok(noted.set)
}

struct Noted<'a> {
    set: ClusterSet,
    geometry: &'a Geometry,
    checks: OverlapChecks,
    /// How many more clusters are noted.
    left: u64,
}

impl Noted<'_> {
    fn add(&mut self, kind: OverlapChecks, offset: HostOffset, len: u64) {
        if len == 0 || !self.checks.contains(kind) {
            return;
        }
        let inside = self.geometry.in_cluster(offset.value());
        let count = self.geometry.clusters_for(len.saturating_add(inside)).min(self.left);
        self.left -= count;
        self.set.insert(self.geometry.host_cluster(offset).value(), count);
    }

    fn add_l2_tables(&mut self, kind: OverlapChecks, l1: impl Iterator<Item = u64>) {
        for raw in l1.filter(|&raw| raw != 0) {
            if let Ok(L1Entry { l2_table: Some(table), .. }) = L1Entry::decode(raw, self.geometry) {
                self.add(kind, table, self.geometry.cluster_size());
            }
        }
    }

    fn add_snapshots(&mut self, walk: &Walk<'_>) -> Result<()> {
        let snapshots = OverlapChecks::SNAPSHOT_TABLE.with(OverlapChecks::INACTIVE_L1);
        if walk.header().nb_snapshots == 0 || !self.checks.any_of(snapshots.with(OverlapChecks::INACTIVE_L2))
        {
            return Ok(());
        }
        let Some(table) = walk.snapshots(&mut |_| {})? else { return Ok(()) };
        self.add(OverlapChecks::SNAPSHOT_TABLE, walk.header().snapshots_offset, table.len);
        let segments = overlay(&table.l1_tables);
        for segment in &segments {
            self.add(OverlapChecks::INACTIVE_L1, segment.offset, segment.len);
        }
        if !self.checks.contains(OverlapChecks::INACTIVE_L2) {
            return Ok(());
        }
        let mut pieces = walk.pieces();
        for segment in segments {
            pieces.start(segment.offset, segment.len);
            while let Some((_, bytes)) = pieces.read_next()? {
                self.add_l2_tables(OverlapChecks::INACTIVE_L2, qcow2_format::bytes::words(bytes));
            }
        }
        Ok(())
    }
}
