//! The snapshot table: read piece by piece, and replaced as a whole.
//!
//! Order on disk: the new table in new clusters; barrier; the header's count and offset in one sector;
//! barrier; only then the old table is freed. Spec: "Snapshots".

use crate::error::{Error, ErrorKind, Result, TableKind};
use crate::image::Image;
use crate::meta::overlap::OverlapChecks;
use crate::meta::pending::Unlinked;
use crate::port::storage::Storage;
use crate::rules::OrderingRule;
use ::alloc::format;
use ::alloc::vec::Vec;
use qcow2_format::HeaderField;
use qcow2_format::snapshot::{MAX_ENTRY_LEN, Snapshot};
use qcow2_format::{FormatError, Geometry, Header, HostOffset, limit};

/// Bytes of the table read at once.
const PIECE: usize = 8 * MAX_ENTRY_LEN;

/// The snapshot table as it is on disk.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) snapshots: Vec<Snapshot>,
    /// Bytes of all entries.
    pub(super) len: u64,
}

/// Reads the snapshot table that `header` points to, in order. Allocates as entries are parsed, not by the
/// header's count. Errors: `Corrupt` for an entry that cannot be parsed or a table above 64 MiB, `Storage`.
pub fn read_snapshots(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    Table::read(storage, header, false).map(|table| table.snapshots)
}

/// The same with zeroes for the part of the table that lies past the end of the file, as QEMU reads it:
/// entries without id and name.
pub fn read_snapshots_padded(storage: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    Table::read(storage, header, true).map(|table| table.snapshots)
}

impl Table {
    /// `padded`: what the file lacks is zeroes.
    pub(super) fn read(storage: &dyn Storage, header: &Header, padded: bool) -> Result<Self> {
        let mut snapshots = Vec::new();
        let (mut piece, mut used, mut passed) = (Vec::new(), 0, 0u64);
        for index in 0..header.nb_snapshots {
            if piece.len() - used < MAX_ENTRY_LEN {
                passed += used as u64;
                let offset = header.snapshots_offset.checked_add(passed);
                let offset = offset.ok_or_else(|| Error::corrupt("snapshot table passes 2^64 - 1"))?;
                piece.resize(PIECE, 0);
                let n = storage.read_at(offset, &mut piece)?;
                // A file may end right after the last entry, without its padding.
                piece[n..].fill(0);
                piece.truncate(if padded { PIECE } else { n.next_multiple_of(8) });
                used = 0;
            }
            let parsed = Snapshot::parse(&piece[used..], header.disk_size()).map_err(|e| {
                Error::corrupt(format!("snapshot {index} is damaged"))
                    .in_table(TableKind::Snapshots)
                    .with_source(e)
            })?;
            used += parsed.len;
            if passed + used as u64 > limit::MAX_SNAPSHOT_TABLE_SIZE {
                let max = limit::MAX_SNAPSHOT_TABLE_SIZE;
                return Err(Error::corrupt(format!("snapshot table has more than {max} bytes"))
                    .in_table(TableKind::Snapshots));
            }
            snapshots.push(parsed.snapshot);
        }
        Ok(Self { snapshots, len: passed + used as u64 })
    }
}

impl Image {
    /// Reserves clusters for a table of `snapshots`. For an empty one: no clusters and offset 0. Disk:
    /// changes refcounts, and reserves space.
    pub(super) fn reserve_snapshot_table(&self, snapshots: &[Snapshot]) -> Result<NewTable> {
        let bad =
            |e: FormatError| Error::new(ErrorKind::InvalidOption, "snapshot cannot be stored").with_source(e);
        let mut bytes = Vec::new();
        for snapshot in snapshots {
            snapshot.encode(&mut bytes).map_err(bad)?;
        }
        let len = bytes.len() as u64;
        if snapshots.len() as u64 > u64::from(limit::MAX_SNAPSHOTS) || len > limit::MAX_SNAPSHOT_TABLE_SIZE {
            let message = format!("{} snapshots in {len} bytes are more than allowed", snapshots.len());
            return Err(Error::new(ErrorKind::NoSpace, message));
        }
        let offset = match self.file.geometry().clusters_for(len) {
            0 => HostOffset::new(0),
            clusters => self.refcounts.allocate_with_space(OverlapChecks::SNAPSHOT_TABLE, clusters)?.offset,
        };
        Ok(NewTable { offset, bytes, count: snapshots.len() as u32 })
    }

    /// Writes `table`; barrier; makes the header point to it; barrier. The first barrier covers the caller's
    /// earlier writes too.
    pub(super) fn switch_snapshot_table(&self, table: &NewTable) -> Result<()> {
        let (count, offset) = (table.count, table.offset);
        debug_assert!(
            count == 0 || self.file.geometry().is_aligned(offset.value()),
            "a snapshot table at {offset}"
        );
        if count > 0 {
            self.tables.write(OverlapChecks::SNAPSHOT_TABLE, offset, &table.bytes)?;
        }
        if self.file.keeps(OrderingRule::SnapshotBeforeHeader) {
            self.file.flush()?;
        }
        self.header.update(&[HeaderField::Snapshots { count, offset }])
    }
}

/// A snapshot table whose clusters are reserved and not written yet.
pub(super) struct NewTable {
    offset: HostOffset,
    bytes: Vec<u8>,
    count: u32,
}

impl NewTable {
    /// Its clusters.
    pub(super) fn run(&self, geometry: &Geometry) -> Unlinked {
        Unlinked::table(geometry, OverlapChecks::SNAPSHOT_TABLE, self.offset, self.bytes.len() as u64)
    }
}
