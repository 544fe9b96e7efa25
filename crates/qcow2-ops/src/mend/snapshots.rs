//! Repairs the snapshot table and keeps every entry that can be read.

use super::fix::Fix;
use super::job::{Job, failed, storage};
use crate::error::Result;
use qcow2_core::walk::SnapshotFault;
use qcow2_core::{HostOffset, Storage};
use qcow2_format::header::HeaderField;
use qcow2_format::limit;
use qcow2_format::snapshot::Snapshot;
use std::collections::BTreeSet;

/// Bytes that are read first; the rest only if the table is longer.
const FIRST_READ: u64 = 1 << 20;

impl Job<'_> {
    /// Rewrites the table if an entry has too much or too little extra data, and drops empty entries. If the
    /// table is not where the header points, searches for it in the unreferenced clusters. Entries whose L1
    /// tables cannot be found stay as they are.
    pub(super) fn mend_snapshots(&mut self) -> Result<()> {
        let header = self.header.clone();
        let mut faults = Vec::new();
        self.walk(&header, |walk| walk.snapshots(&mut |fault| faults.push(fault)).map_err(failed))?;
        if header.nb_snapshots == 0 {
            // The header may give an invalid offset for a table without entries.
            return if faults.is_empty() { Ok(()) } else { self.write_snapshots(&[], 0) };
        }
        let lost = |fault: &SnapshotFault| {
            matches!(fault, SnapshotFault::L1Misaligned { .. } | SnapshotFault::L1TooLarge { .. })
        };
        let count = header.nb_snapshots.min(limit::MAX_SNAPSHOTS);
        let entries = match header.snapshots_offset.value() < self.format.geometry.cluster_size() {
            // The header is no table, whatever its bytes look like.
            true => None,
            false => self.entries(header.snapshots_offset, count)?,
        };
        let whole = entries.as_ref().is_some_and(|entries| entries.len() == count as usize);
        if !whole && let Some(offset) = self.find_table(count)? {
            self.set_header(&[HeaderField::Snapshots { count, offset }])?;
            self.fixed(Fix::SnapshotTable { kept: count, dropped: 0, offset });
            return Ok(());
        }
        // An unreadable table counts as empty.
        let mut entries = entries.unwrap_or_default();
        let cut = entries.iter_mut().filter_map(cut_name).count() > 0;
        let found = self.find_l1_tables(&mut entries)? || cut;
        let sound = whole && count == header.nb_snapshots && faults.iter().all(lost) && !found;
        match sound {
            true => Ok(()),
            false => self.write_snapshots(&entries, header.nb_snapshots),
        }
    }

    /// Searches for the L1 tables of snapshots whose entries are misaligned, past the end of the file or too
    /// large. If exactly one entry is damaged and exactly one unreferenced cluster looks like an L1 table,
    /// the entry gets it. If no cluster looks like one, the damaged entries are dropped: only the names of
    /// the snapshots are left. Otherwise the entries stay. Returns true if an entry was changed or dropped.
    fn find_l1_tables(&mut self, entries: &mut Vec<Snapshot>) -> Result<bool> {
        let geometry = self.format.geometry;
        let end = self.draft.len().map_err(storage)?.saturating_add(geometry.cluster_size());
        let lost = |snapshot: &Snapshot| {
            let start = snapshot.l1_table_offset.value();
            let past = start.checked_add(u64::from(snapshot.l1_size) * 8).is_none_or(|last| last >= end);
            !geometry.is_aligned(start) || past || u64::from(snapshot.l1_size) > limit::MAX_L1_ENTRIES
        };
        if !entries.iter().any(lost) {
            return Ok(false);
        }
        // The table of the snapshots begins with an offset, as an L1 table does.
        let mut encoded = Vec::new();
        entries.iter().try_for_each(|snapshot| snapshot.encode(&mut encoded)).map_err(failed)?;
        let own = self.header.snapshots_offset.value();
        let own = own..own.saturating_add(encoded.len() as u64);
        let mut tables = self.lost_l1_tables()?;
        let others: BTreeSet<_> = entries
            .iter()
            .filter(|snapshot| !lost(snapshot))
            .map(|snapshot| snapshot.l1_table_offset)
            .collect();
        tables.iter_mut().for_each(|tables| {
            tables.retain(|table| !others.contains(table) && !own.contains(&table.value()));
        });
        let named = |snapshot: &Snapshot| snapshot.id.iter().chain(&snapshot.name).any(|&byte| byte != 0);
        let all = entries.len();
        entries.retain(|snapshot| named(snapshot) || !lost(snapshot));
        if !entries.iter().any(lost) {
            return Ok(all > entries.len());
        }
        match tables.as_deref() {
            Some([]) => entries.retain(|snapshot| !lost(snapshot)),
            Some(&[table]) if entries.iter().filter(|snapshot| lost(snapshot)).count() == 1 => {
                for snapshot in entries.iter_mut().filter(|snapshot| lost(snapshot)) {
                    snapshot.l1_table_offset = table;
                    let covers = u64::from(snapshot.l1_size) * 8 < geometry.cluster_size();
                    if !covers {
                        snapshot.l1_size = self.header.l1_size;
                    }
                }
            }
            _ => {
                self.tables_missing = true;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Offsets of unreferenced clusters that look like L1 tables; `None` if there are too many clusters to
    /// examine.
    fn lost_l1_tables(&mut self) -> Result<Option<Vec<HostOffset>>> {
        let saved = (self.header.nb_snapshots, self.header.snapshots_offset);
        // Hide the snapshots while counting: their entries are invalid, or point to the tables that are
        // searched for.
        self.set_header(&[HeaderField::Snapshots { count: 0, offset: HostOffset::default() }])?;
        let unreferenced = self.unreferenced()?;
        let own = self.refcount_clusters_now()?;
        self.set_header(&[HeaderField::Snapshots { count: saved.0, offset: saved.1 }])?;
        let Some((candidates, _)) = unreferenced else { return Ok(None) };
        let mut found = Vec::new();
        for cluster in candidates.into_iter().filter(|cluster| !own.contains(cluster)) {
            let offset = HostOffset::new(cluster * self.format.geometry.cluster_size());
            let words = (self.format.geometry.cluster_size() / 8).min(self.header.l1_size.max(1).into());
            let (tables, others) = self.l2_tables_of(offset, words as u32)?;
            if tables > 0 && others == 0 {
                found.push(offset);
            }
        }
        Ok(Some(found))
    }

    /// The offset of the only unreferenced cluster that starts with a table of `count` valid entries.
    fn find_table(&mut self, count: u32) -> Result<Option<HostOffset>> {
        let saved = (self.header.nb_snapshots, self.header.snapshots_offset);
        // Nothing can be counted while the header points to an unreadable table.
        self.set_header(&[HeaderField::Snapshots { count: 0, offset: HostOffset::default() }])?;
        let candidates = self.unreferenced()?.map(|(candidates, _)| candidates).unwrap_or_default();
        let mut found = Vec::new();
        for cluster in candidates {
            let offset = HostOffset::new(cluster * self.format.geometry.cluster_size());
            let entries = self.entries(offset, count)?;
            let whole = entries.filter(|entries| entries.len() == count as usize);
            if whole.is_some_and(|entries| entries.iter().all(|entry| self.is_plausible(entry))) {
                found.push(offset);
            }
        }
        self.set_header(&[HeaderField::Snapshots { count: saved.0, offset: saved.1 }])?;
        Ok(match found[..] {
            [only] => Some(only),
            _ => None,
        })
    }

    /// True if an entry looks like a snapshot: its id is a number, and its L1 table is inside the file.
    fn is_plausible(&self, snapshot: &Snapshot) -> bool {
        let geometry = self.format.geometry;
        let (start, len) = (snapshot.l1_table_offset.value(), u64::from(snapshot.l1_size) * 8);
        let id = !snapshot.id.is_empty() && snapshot.id.iter().all(u8::is_ascii_digit);
        let inside = start.checked_add(len).is_some_and(|end| end <= self.end * geometry.cluster_size());
        id && start > 0 && geometry.is_aligned(start) && len > 0 && inside
    }

    /// The `count` entries of the table at `start`, without empty ones; `None` if one cannot be read.
    fn entries(&self, start: HostOffset, count: u32) -> Result<Option<Vec<Snapshot>>> {
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
            snapshot.encode(&mut bytes).map_err(failed)?;
        }
        let geometry = self.format.geometry;
        let old = geometry.host_cluster(self.header.snapshots_offset).value();
        self.replaced = old..old.saturating_add(geometry.clusters_for(bytes.len() as u64).max(1));
        let kept = u32::try_from(snapshots.len()).unwrap_or(u32::MAX);
        let offset = match bytes.len() as u64 {
            0 => HostOffset::default(),
            len => {
                let first = self.take(geometry.clusters_for(len), 1)?;
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

/// Cuts id and name at their first zero byte, which neither has: a length is damaged, and what follows is
/// another entry or none. `None` where there is nothing to cut.
fn cut_name(snapshot: &mut Snapshot) -> Option<()> {
    let cut = |text: &mut Vec<u8>| {
        let end = text.iter().position(|&byte| byte == 0).filter(|&end| end > 0);
        end.map(|end| text.truncate(end))
    };
    let (id, name) = (cut(&mut snapshot.id), cut(&mut snapshot.name));
    id.or(name)
}

/// True for an entry without id and name, which nobody can select, and for an L1 table at offset 0, which is
/// the header. Bytes after the end of a table read as such entries.
fn is_empty(snapshot: &Snapshot) -> bool {
    let unnamed = snapshot.id.is_empty() && snapshot.name.is_empty();
    unnamed || (snapshot.l1_size > 0 && snapshot.l1_table_offset == HostOffset::default())
}
