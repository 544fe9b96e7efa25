//! Builds the map of host clusters that hold metadata, when an image is opened.

use super::guard::MetadataMap;
use super::overlap::OverlapChecks;
use super::run::ClusterRun;
use crate::error::Result;
use crate::port::storage::Storage;
use crate::walk::{SnapshotFault, Walk, overlay};
use qcow2_format::bitmap::BitmapTableEntry;
use qcow2_format::l1::L1Entry;
use qcow2_format::refcount::decode_table_entry;
use qcow2_format::{Geometry, Header, HostOffset};

/// Limit on the clusters of bitmaps and snapshots' tables in the map; a hostile image may refer to far more
/// clusters than it has.
const MAX_NOTED: u64 = 1 << 22;

/// Bytes of snapshots' L1 tables up to which they are read even if the caller has not chosen
/// [`INACTIVE_L2`](OverlapChecks::INACTIVE_L2): a few dozen snapshots of 1 TiB, so that opening stays fast.
pub(crate) const MAX_L1_UNASKED: u64 = 4 << 20;

/// The clusters that hold metadata, according to the header and to the raw entries of the L1 table and the
/// refcount table. Disk: reads the snapshot table, the tables of bitmaps, and the snapshots' L1 tables if
/// they are short or `checks` has [`INACTIVE_L2`](OverlapChecks::INACTIVE_L2). Ignores damaged entries:
/// finding them is the task of a check. Errors: `Storage`.
pub(crate) fn known_metadata(
    storage: &dyn Storage,
    header: &Header,
    (l1, refcount_table): (&[u64], &[u64]),
    checks: OverlapChecks,
) -> Result<MetadataMap> {
    let walk = Walk::new(storage, header)?;
    let geometry = walk.geometry();
    let size = geometry.cluster_size();
    let mut noted = Noted { map: MetadataMap::default(), geometry, left: u64::MAX };
    noted.add(OverlapChecks::MAIN_HEADER, HostOffset::new(0), size);
    noted.add(OverlapChecks::ACTIVE_L1, header.l1_table_offset, u64::from(header.l1_size) * 8);
    let table_len = u64::from(header.refcount_table_clusters) * size;
    noted.add(OverlapChecks::REFCOUNT_TABLE, header.refcount_table_offset, table_len);
    for &raw in refcount_table.iter().filter(|&&raw| raw != 0) {
        if let Ok(Some(block)) = decode_table_entry(raw, geometry) {
            // A block that two entries point to is wrong for at least one of them. Entered as a second kind
            // too, it is never written.
            noted.add_once(OverlapChecks::REFCOUNT_BLOCK, OverlapChecks::REFCOUNT_TABLE, block);
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
    noted.add_bitmaps(&walk)?;
    noted.add_snapshots(&walk, checks.contains(OverlapChecks::INACTIVE_L2))?;
    debug_assert!(
        noted.map.holds(OverlapChecks::MAIN_HEADER, 0),
        "the header's cluster is not in the metadata map"
    );
    Ok(noted.map)
}

struct Noted<'a> {
    map: MetadataMap,
    geometry: &'a Geometry,
    /// How many more clusters may be added.
    left: u64,
}

impl Noted<'_> {
    fn add(&mut self, kind: OverlapChecks, offset: HostOffset, len: u64) {
        if len == 0 {
            return;
        }
        let run = ClusterRun::touched(self.geometry, offset, len).cut(self.left);
        self.left -= run.count();
        self.map.insert(kind, run);
    }

    /// Adds a table of one cluster as `kind`; if the cluster is in the map as `kind` already, also as
    /// `twice`.
    fn add_once(&mut self, kind: OverlapChecks, twice: OverlapChecks, table: HostOffset) {
        if self.map.holds(kind, self.geometry.host_cluster(table).value()) {
            self.add(twice, table, self.geometry.cluster_size());
        }
        self.add(kind, table, self.geometry.cluster_size());
    }

    fn add_l2_tables(&mut self, kind: OverlapChecks, l1: impl Iterator<Item = u64>) {
        for raw in l1.filter(|&raw| raw != 0) {
            if let Ok(L1Entry { l2_table: Some(table), .. }) = L1Entry::decode(raw, self.geometry) {
                // A table that two entries of the active L1 table point to is treated like one that is shared
                // with a snapshot: a change of one range must not change the other, and unlinking one must
                // not free the table.
                let twice = if kind == OverlapChecks::ACTIVE_L2 { OverlapChecks::INACTIVE_L2 } else { kind };
                self.add_once(kind, twice, table);
            }
        }
    }

    fn add_bitmaps(&mut self, walk: &Walk<'_>) -> Result<()> {
        let mut pieces = walk.pieces();
        for segment in overlay(&walk.bitmaps()?.0) {
            self.add(OverlapChecks::BITMAP_DIRECTORY, segment.offset, segment.len);
            pieces.start(segment.offset, segment.len);
            while let Some((_, bytes)) = pieces.read_next()? {
                for raw in qcow2_format::bytes::words(bytes).filter(|&raw| raw != 0) {
                    if let Ok(BitmapTableEntry::Data(bits)) = BitmapTableEntry::decode(raw, self.geometry) {
                        self.add(OverlapChecks::BITMAP_DIRECTORY, bits, self.geometry.cluster_size());
                    }
                }
            }
        }
        Ok(())
    }

    fn add_snapshots(&mut self, walk: &Walk<'_>, with_l2_tables: bool) -> Result<()> {
        if walk.header().nb_snapshots == 0 {
            return Ok(());
        }
        let mut unknown = false;
        let mut fault = |fault: SnapshotFault| {
            unknown |= matches!(fault, SnapshotFault::L1Misaligned { .. } | SnapshotFault::L1TooLarge { .. });
        };
        let table = walk.snapshots(&mut fault)?;
        self.map.lacks_snapshots = unknown;
        let Some(table) = table else { return Ok(()) };
        self.add(OverlapChecks::SNAPSHOT_TABLE, walk.header().snapshots_offset, table.len);
        let segments = overlay(&table.l1_tables);
        for segment in &segments {
            self.add(OverlapChecks::INACTIVE_L1, segment.offset, segment.len);
        }
        let l1_bytes = segments.iter().fold(0u64, |sum, segment| sum.saturating_add(segment.len));
        if !with_l2_tables && l1_bytes > MAX_L1_UNASKED {
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
