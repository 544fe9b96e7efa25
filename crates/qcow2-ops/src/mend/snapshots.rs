//! The snapshot table: every entry that can be read stays.

use super::fix::Fix;
use super::job::{Job, failed, storage};
use crate::error::Result;
use qcow2_core::walk::SnapshotFault;
use qcow2_core::{HostOffset, Storage};
use qcow2_format::header::HeaderField;
use qcow2_format::limit;
use qcow2_format::snapshot::Snapshot;

/// Bytes of the table that are read at first.
const FIRST_READ: u64 = 1 << 20;

impl Job<'_> {
    /// Writes the table anew where an entry has too much or too little extra data, and without entries that
    /// name nothing. Entries whose L1 tables cannot be found stay as they are.
    pub(super) fn mend_snapshots(&mut self) -> Result<()> {
        let mut faults = Vec::new();
        let header = self.header.clone();
        let read =
            self.walk(&header, |walk| walk.snapshots(&mut |fault| faults.push(fault)).map_err(failed))?;
        if faults.is_empty() && !self.has_empty_entry(&header)? {
            return Ok(());
        }
        if faults.iter().any(|fault| matches!(fault, SnapshotFault::Misplaced { .. })) {
            self.tables_missing = true;
            return Ok(());
        }
        let lost = |fault: &SnapshotFault| {
            matches!(fault, SnapshotFault::L1Misaligned { .. } | SnapshotFault::L1TooLarge { .. })
        };
        self.tables_missing |= faults.iter().any(lost);
        let count = header.nb_snapshots.min(limit::MAX_SNAPSHOTS);
        let Some(snapshots) = self.entries(count)? else {
            self.tables_missing = true;
            return Ok(());
        };
        if read.is_some() && faults.iter().all(lost) && snapshots.len() == count as usize {
            return Ok(());
        }
        self.write_snapshots(&snapshots, header.nb_snapshots)
    }

    /// Whether an entry of a table that can be read names nothing: such a table ends before the header says.
    fn has_empty_entry(&self, header: &qcow2_format::Header) -> Result<bool> {
        let entries = match header.nb_snapshots {
            0 => return Ok(false),
            count => self.entries(count)?,
        };
        Ok(entries.is_some_and(|entries| entries.len() < header.nb_snapshots as usize))
    }

    /// The entries of the table but for empty ones; `None` where one cannot be read.
    fn entries(&self, count: u32) -> Result<Option<Vec<Snapshot>>> {
        let start = self.header.snapshots_offset;
        let mut len = FIRST_READ;
        'read: loop {
            let mut bytes = vec![0; len as usize];
            self.draft.read_padded(start, &mut bytes).map_err(storage)?;
            let (mut at, mut found) = (0, Vec::new());
            for _ in 0..count {
                match Snapshot::parse_for_repair(&bytes[at..], self.header.disk_size()) {
                    Ok(parsed) => {
                        at += parsed.len;
                        found.extend(Some(parsed.snapshot).filter(|snapshot| !is_empty(snapshot)));
                    }
                    Err(_) if len < limit::MAX_SNAPSHOT_TABLE_SIZE => {
                        len = (len * 8).min(limit::MAX_SNAPSHOT_TABLE_SIZE);
                        continue 'read;
                    }
                    Err(_) => return Ok(None),
                }
            }
            return Ok(Some(found));
        }
    }

    fn write_snapshots(&mut self, snapshots: &[Snapshot], counted: u32) -> Result<()> {
        let mut bytes = Vec::new();
        for snapshot in snapshots {
            snapshot.encode(&mut bytes).map_err(|e| failed(e))?;
        }
        let geometry = self.format.geometry;
        let kept = u32::try_from(snapshots.len()).unwrap_or(u32::MAX);
        let offset = match bytes.len() as u64 {
            0 => HostOffset::default(),
            len => {
                let first = self.take(geometry.clusters_for(len))?;
                let offset = HostOffset::new(first * geometry.cluster_size());
                bytes.resize(len.next_multiple_of(geometry.cluster_size()) as usize, 0);
                self.draft.write_at(offset, &bytes).map_err(storage)?;
                offset
            }
        };
        self.set_header(&[HeaderField::Snapshots { count: kept, offset }])?;
        self.fixed(Fix::SnapshotTable { kept, dropped: counted.saturating_sub(kept), offset });
        Ok(())
    }
}

/// An entry of zeroes: what a table that is shorter than the header says is followed by.
fn is_empty(snapshot: &Snapshot) -> bool {
    snapshot.id.is_empty()
        && snapshot.name.is_empty()
        && snapshot.l1_size == 0
        && snapshot.l1_table_offset == HostOffset::default()
}
