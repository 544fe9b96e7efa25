//! The tables of an image, straight from its bytes, and whether work on the image left them whole: on damaged
//! images too, nothing may write over a table or take its refcount away (invariant I5).
//!
//! Guest data that is written during the work consists of [`MARK`], so a table that data was written over
//! shows it.

use crate::pages::PageBytes;
use qcow2_format::snapshot::{MAX_ENTRY_LEN, Snapshot};
use std::collections::BTreeMap;

/// Eight bytes of guest data, which no table contains: every bit that an entry reserves is set in one of the
/// two halves.
pub const MARK: [u8; 8] = *b"\x2d\x5a\x96\xc3\x2d\x5a\x96\xff";

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// No image under test has more of anything.
const MOST: u64 = 4096;
const INCOMPATIBLE_STATES: u64 = 3;
const CORRUPT: u64 = 2;

/// What a cluster is, so far as the image says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The header.
    Header,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The active L1 table.
    L1,
    /// An L2 table of the active disk.
    L2,
    /// The snapshot table.
    Snapshots,
    /// The L1 table of a snapshot.
    SnapshotL1,
    /// An L2 table of a snapshot.
    SnapshotL2,
}

/// An image file and the clusters that hold its tables.
pub struct Tables {
    bytes: PageBytes,
    cluster: u64,
    /// Clusters of tables, and how many bytes of each the table takes.
    found: BTreeMap<(u64, Role), u64>,
}

impl Tables {
    /// Finds the tables in `bytes`, an image file that may be damaged.
    pub fn find(bytes: PageBytes) -> Self {
        let mut tables = Self { cluster: 512, bytes, found: BTreeMap::new() };
        tables.cluster = 1 << tables.u32(20).clamp(9, 21);
        tables.add(Role::Header, 0, tables.cluster);
        let (table, len) = (tables.u64(48), u64::from(tables.u32(56)).min(MOST) * tables.cluster);
        tables.add(Role::RefcountTable, table, len);
        tables.add_each(Role::RefcountBlock, table, len / 8, u64::MAX << 9);
        let (l1, entries) = (tables.u64(40), u64::from(tables.u32(36)));
        tables.add_mapping((Role::L1, Role::L2), l1, entries);
        tables.add_snapshots();
        tables
    }

    /// A snapshot table that cannot be read to its end is none: nothing uses any of it.
    fn add_snapshots(&mut self) {
        let (start, mut at, mut l1_tables) = (self.u64(64), self.u64(64), Vec::new());
        let mut entry = Vec::new();
        if !start.is_multiple_of(self.cluster) {
            return;
        }
        for _ in 0..u64::from(self.u32(60)).min(MOST) {
            // A file may end without the padding of the last entry.
            let left = self.bytes.len().saturating_sub(at).next_multiple_of(8);
            entry.resize(left.min(MAX_ENTRY_LEN as u64) as usize, 0);
            self.bytes.read(at, &mut entry);
            let Ok(parsed) = Snapshot::parse(&entry, 0) else { return };
            l1_tables.push((parsed.snapshot.l1_table_offset.value(), u64::from(parsed.snapshot.l1_size)));
            at += parsed.len as u64;
        }
        self.add(Role::Snapshots, start, at - start);
        for (l1, entries) in l1_tables {
            self.add_mapping((Role::SnapshotL1, Role::SnapshotL2), l1, entries);
        }
    }

    fn add_mapping(&mut self, (l1_role, l2_role): (Role, Role), l1: u64, entries: u64) {
        let entries = entries.min(MOST);
        if l1.is_multiple_of(self.cluster) {
            self.add(l1_role, l1, entries * 8);
            self.add_each(l2_role, l1, entries, OFFSET);
        }
    }

    fn add_each(&mut self, role: Role, table: u64, entries: u64, mask: u64) {
        for index in 0..entries {
            let place = self.u64(table.saturating_add(index * 8)) & mask;
            if place != 0 {
                self.add(role, place, self.cluster);
            }
        }
    }

    /// A misaligned table is none: nothing uses it.
    fn add(&mut self, role: Role, at: u64, len: u64) {
        let (first, end) = (at / self.cluster, at.saturating_add(len).div_ceil(self.cluster));
        let inside = (self.bytes.len()).div_ceil(self.cluster);
        if !at.is_multiple_of(self.cluster) {
            return;
        }
        for cluster in first..end.min(inside) {
            let used = at.saturating_add(len).saturating_sub(cluster * self.cluster).min(self.cluster);
            let known = self.found.entry((cluster, role)).or_default();
            *known = used.max(*known);
        }
    }

    fn u64(&self, at: u64) -> u64 {
        let mut word = [0; 8];
        if at < self.bytes.len() {
            self.bytes.read(at, &mut word);
        }
        u64::from_be_bytes(word)
    }

    fn u32(&self, at: u64) -> u32 {
        (self.u64(at) >> 32) as u32
    }

    fn version3(&self) -> bool {
        self.u32(4) >= 3
    }

    /// True if the header marks the image as corrupt.
    pub fn is_marked(&self) -> bool {
        self.version3() && self.u64(72) & CORRUPT != 0
    }

    /// The refcount of a host cluster.
    fn count(&self, cluster: u64) -> u64 {
        let order = if self.version3() { self.u32(96).min(6) } else { 4 };
        let bits = 1u64 << order;
        let per_block = self.cluster * 8 / bits;
        let entry = self.u64(48) + cluster / per_block * 8;
        let block = self.u64(entry) & (u64::MAX << 9);
        let index = cluster % per_block;
        if block == 0 || !block.is_multiple_of(self.cluster) {
            return 0;
        }
        match bits {
            1..8 => {
                let byte = self.u64(block + index * bits / 8) >> 56;
                byte >> (index * bits % 8) & ((1 << bits) - 1)
            }
            _ => self.u64(block + index * bits / 8) >> (64 - bits),
        }
    }

    /// What no work on an image changes: version, cluster size, encryption, refcount width, the features that
    /// are no states.
    fn constants(&self) -> (u64, u32, u32, u64, u32) {
        let v3 = self.version3();
        let features = if v3 { self.u64(72) & !INCOMPATIBLE_STATES } else { 0 };
        let order = if v3 { self.u32(96) } else { 4 };
        (self.u64(0), self.u32(20), self.u32(32), features, order)
    }

    /// True if a mark is in the table. What follows a table in its cluster may be anything.
    fn shows_mark(&self, found: (u64, Role)) -> bool {
        let mut bytes = vec![0; self.found.get(&found).map_or(0, |&used| used as usize)];
        let (cluster, _) = found;
        self.bytes.read(cluster * self.cluster, &mut bytes);
        bytes.as_chunks::<8>().0.contains(&MARK)
    }

    /// Compares with the image after work on it: its header is as it was, and every table that is still one
    /// was not written over by guest data and has not lost its refcount. Or the image is marked.
    pub fn judge(&self, after: &Self) -> Result<(), String> {
        if after.is_marked() {
            return Ok(());
        }
        if self.constants() != after.constants() {
            return Err(format!("header: {:x?} became {:x?}", self.constants(), after.constants()));
        }
        for &found in self.found.keys().filter(|found| after.found.contains_key(found)) {
            let (cluster, role) = found;
            if after.shows_mark(found) && !self.shows_mark(found) {
                return Err(format!("host cluster {cluster}, {role:?}, was written over by guest data"));
            }
            if self.count(cluster) > 0 && after.count(cluster) == 0 {
                return Err(format!("host cluster {cluster}, {role:?}, has lost its refcount"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builder::{Builder, Cluster};
    use qcow2_format::header::{Header, Version};

    fn image() -> crate::builder::Built {
        let mut header = Header::new(Version::V3, 9);
        header.size = 512 * 200;
        Builder::with_header(header)
            .cluster(1, Cluster::Data(vec![1; 512]))
            .cluster(99, Cluster::Data(MARK.repeat(64)))
            .build()
    }

    fn tables(image: &crate::builder::Built) -> Tables {
        Tables::find(PageBytes::from_bytes(&image.bytes))
    }

    fn check(name: &str, change: impl Fn(&mut crate::builder::Built), expected: Option<&str>) {
        let (before, mut after) = (image(), image());
        change(&mut after);
        let found = tables(&before).judge(&tables(&after)).err();
        match (&found, expected) {
            (None, None) => {}
            (Some(found), Some(expected)) => assert!(found.contains(expected), "{name}: {found}"),
            _ => panic!("{name}: {found:?}"),
        }
    }

    #[test]
    fn tables_written_over_and_freed_are_reported() {
        check("nothing", |_| (), None);
        check("data", |image| _ = image.patch(image.hosts[&1], &MARK), None);
        check("l2", |image| _ = image.patch(image.l2[&0] + 64, &MARK), Some("L2, was written over"));
        check("l1", |image| _ = image.patch(image.l1, &MARK), Some("L1, was written over"));
        check("block", |image| _ = image.patch(image.refcount_blocks + 400, &MARK), Some("RefcountBlock"));
        check("behind l1", |image| _ = image.patch(image.l1 + 496, &MARK), None);
        check("freed", |image| _ = image.set_refcount(image.l1 / 512, 0), Some("L1, has lost"));
        check("header", |image| _ = image.patch_u32(20, 10), Some("header"));
        let marked = |image: &mut crate::builder::Built| {
            image.patch(image.l1, &MARK).patch_u64(72, 2);
        };
        check("marked", marked, None);
        let moved = |image: &mut crate::builder::Built| {
            let l1 = image.l1;
            image.patch(image.l2[&0] + 64, &MARK).patch_u64(l1, 0);
        };
        check("no table any more", moved, None);
    }
}
