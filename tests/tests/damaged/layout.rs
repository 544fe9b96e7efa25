//! Finds the tables of an image from its bytes, and changes their entries.

use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::rng::Rng;
use std::collections::BTreeSet;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An entry of an L1 table.
    L1,
    /// An entry of an L2 table.
    L2,
    /// A refcount.
    Count,
    /// An entry of the refcount table.
    Table,
    /// The offset of an L1 table in the snapshot table.
    Snapshot,
    /// The offset of a bitmap's table, or one in it.
    Bitmap,
}

/// One state of the disk: the active one, or a snapshot.
struct State {
    id: Vec<u8>,
    /// Where the snapshot table stores the offset of its L1 table.
    named_at: u64,
    l1: u64,
    entries: Vec<u64>,
}

/// The tables of an image before it is damaged.
pub(crate) struct Layout {
    bytes: PageBytes,
    cluster: u64,
    count_bytes: u64,
    /// The active state, then the snapshots.
    states: Vec<State>,
    table: (u64, Vec<u64>),
    snapshots: (u64, u64),
    /// Where the bitmap directory is; 0 without one.
    directory: u64,
}

fn number(bytes: &PageBytes, at: u64, len: usize) -> u64 {
    let mut word = [0; 8];
    bytes.read(at, &mut word[..len]);
    word[..len].iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn words(bytes: &PageBytes, at: u64, count: u64) -> Vec<u64> {
    let mut table = vec![0; count as usize * 8];
    bytes.read(at, &mut table);
    qcow2_core::format::bytes::words(&table).collect()
}

/// Where the header's extensions say that the bitmap directory is; 0 if they do not.
fn directory(bytes: &PageBytes) -> u64 {
    let mut at = number(bytes, 100, 4);
    for _ in 0..32 {
        match (number(bytes, at, 4), number(bytes, at + 4, 4)) {
            (0, _) => return 0,
            (0x2385_2875, _) => return number(bytes, at + 8 + 16, 8),
            (_, len) => at += 8 + len.next_multiple_of(8),
        }
    }
    0
}

impl Layout {
    /// Reads an image that may be damaged: bytes outside the file count as zeroes.
    pub(crate) fn read(bytes: &PageBytes) -> Self {
        let cluster = 1u64 << number(bytes, 20, 4).min(21);
        let (table_at, table_clusters) = (number(bytes, 48, 8), number(bytes, 56, 4).min(64));
        let l1_at = number(bytes, 40, 8);
        let l1 = words(bytes, l1_at, number(bytes, 36, 4).min(1 << 16));
        let mut states = vec![State { id: Vec::new(), named_at: 40, l1: l1_at, entries: l1 }];
        let (start, mut at) = (number(bytes, 64, 8), number(bytes, 64, 8));
        for _ in 0..number(bytes, 60, 4).min(1000) {
            let (l1, len) = (number(bytes, at, 8), number(bytes, at + 8, 4).min(1 << 16));
            let id_len = number(bytes, at + 12, 2);
            let extra = number(bytes, at + 36, 4).min(1024);
            let mut id = vec![0; id_len as usize];
            bytes.read(at + 40 + extra, &mut id);
            states.push(State { id, named_at: at, l1, entries: words(bytes, l1, len) });
            at = (at + 40 + extra + id_len + number(bytes, at + 14, 2)).next_multiple_of(8);
        }
        let table = words(bytes, table_at, table_clusters * cluster / 8);
        let version2 = number(bytes, 4, 4) < 3;
        let count_bytes = if version2 { 2 } else { (1 << number(bytes, 96, 4).clamp(3, 6)) / 8 };
        let directory = if version2 { 0 } else { directory(bytes) };
        let snapshots = (start, at - start);
        Self {
            bytes: bytes.clone(),
            cluster,
            count_bytes,
            states,
            table: (table_at, table),
            snapshots,
            directory,
        }
    }

    /// Bit position of the sector count in a compressed descriptor.
    pub(crate) fn sector_shift(&self) -> u64 {
        62 - (u64::from(self.cluster.trailing_zeros()) - 8)
    }

    fn l2_entries(&self) -> u64 {
        self.cluster / 8
    }

    fn l2_tables(&self) -> BTreeSet<u64> {
        let entries = self.states.iter().flat_map(|state| &state.entries);
        entries.map(|raw| raw & OFFSET).filter(|&table| table != 0).collect()
    }

    fn clusters(&self, at: u64, len: u64) -> impl Iterator<Item = u64> + use<> {
        at / self.cluster..(at + len).div_ceil(self.cluster)
    }

    /// Id, offset and bytes of the L1 tables of the snapshots.
    pub(crate) fn snapshot_tables(&self) -> impl Iterator<Item = (&[u8], u64, Vec<u8>)> {
        self.states[1..].iter().map(|state| {
            let bytes = state.entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            (&*state.id, state.l1, bytes)
        })
    }

    /// The entries of the refcount table.
    pub(crate) fn refcount_table(&self) -> &[u64] {
        &self.table.1
    }

    /// The clusters of all tables, including the header.
    pub(crate) fn tables(&self) -> BTreeSet<u64> {
        let mut all = BTreeSet::from([0]);
        all.extend(self.clusters(self.table.0, self.table.1.len() as u64 * 8));
        all.extend(self.clusters(self.snapshots.0, self.snapshots.1));
        all.extend(self.table.1.iter().filter(|block| **block != 0).map(|block| block / self.cluster));
        for state in &self.states {
            all.extend(self.clusters(state.l1, state.entries.len() as u64 * 8));
        }
        all.extend(self.l2_tables().iter().map(|table| table / self.cluster));
        all
    }

    /// A random host cluster, most often one of a table.
    pub(crate) fn any_cluster(&self, rng: &mut Rng) -> u64 {
        let tables: Vec<u64> = self.tables().into_iter().collect();
        if rng.one_in(3) { rng.below(self.bytes.len() / self.cluster) } else { rng.pick(&tables) }
    }

    fn counts_per_block(&self) -> u64 {
        self.cluster / self.count_bytes
    }

    /// Host offset of the refcount of `cluster`.
    fn count_at(&self, cluster: u64) -> Option<u64> {
        let block = *self.table.1.get((cluster / self.counts_per_block()) as usize)?;
        (block != 0).then_some(block + cluster % self.counts_per_block() * self.count_bytes)
    }

    /// The refcount of `cluster` in `now`.
    pub(crate) fn count(&self, now: &PageBytes, cluster: u64) -> u64 {
        self.count_at(cluster).map_or(0, |at| number(now, at, self.count_bytes as usize))
    }

    /// The table clusters with a nonzero refcount in `now`, through blocks that the refcount table still
    /// references.
    pub(crate) fn counted_tables(&self, now: &PageBytes) -> BTreeSet<u64> {
        let after = Self::read(now);
        let same = |cluster: u64| {
            let index = (cluster / self.counts_per_block()) as usize;
            after.table.1.get(index) == self.table.1.get(index) && after.count(now, cluster) > 0
        };
        self.tables().into_iter().filter(|&cluster| same(cluster)).collect()
    }

    /// A change of the refcount of `cluster`: offset and bytes to write.
    pub(crate) fn change_count(&self, cluster: u64, count: u64) -> Option<(u64, Vec<u8>)> {
        let bytes = count.to_be_bytes()[8 - self.count_bytes as usize..].to_vec();
        Some((self.count_at(cluster)?, bytes))
    }

    /// A change of a random L2 entry.
    pub(crate) fn change_l2(&self, rng: &mut Rng, raw: u64) -> Option<(u64, Vec<u8>)> {
        let tables: Vec<u64> = self.l2_tables().into_iter().collect();
        let table = if tables.is_empty() { return None } else { rng.pick(&tables) };
        Some((table + rng.below(self.l2_entries()) * 8, raw.to_be_bytes().to_vec()))
    }

    /// A change of a random L1 entry, of the disk or of a snapshot.
    pub(crate) fn change_l1(&self, rng: &mut Rng, raw: u64) -> Option<(u64, Vec<u8>)> {
        let state = &self.states[rng.below(self.states.len() as u64) as usize];
        let index = rng.below(state.entries.len().max(1) as u64);
        Some((state.l1 + index * 8, raw.to_be_bytes().to_vec()))
    }

    /// A change of a snapshot's L1 table offset.
    pub(crate) fn change_snapshot(&self, rng: &mut Rng, place: u64) -> Option<(u64, Vec<u8>)> {
        let snapshots = &self.states[1..];
        let at = snapshots.get(rng.below(snapshots.len().max(1) as u64) as usize)?.named_at;
        Some((at, place.to_be_bytes().to_vec()))
    }

    /// A change of the offset of the first bitmap's table, or of the first offset in it.
    pub(crate) fn change_bitmap(&self, rng: &mut Rng, place: u64) -> Option<(u64, Vec<u8>)> {
        let at = Some(self.directory).filter(|&at| at != 0)?;
        let at = if rng.one_in(2) { at } else { number(&self.bytes, at, 8) };
        Some((at, place.to_be_bytes().to_vec()))
    }

    /// A change of a refcount block's offset.
    pub(crate) fn change_table(&self, rng: &mut Rng, place: u64) -> Option<(u64, Vec<u8>)> {
        let used = self.table.1.iter().filter(|block| **block != 0).count() as u64;
        Some((self.table.0 + rng.below(used + 1) * 8, place.to_be_bytes().to_vec()))
    }

    /// Host clusters that may have one owner too many after the entry at `at` was pointed at `target`, or its
    /// refcount was changed. Tables among them are guarded; data clusters are not.
    pub(crate) fn doubt(&self, kind: Kind, at: u64, target: u64) -> BTreeSet<u64> {
        let mut doubt: BTreeSet<u64> = (target..target + 4).collect();
        let block = |index: u64| index * self.counts_per_block()..(index + 1) * self.counts_per_block();
        match kind {
            Kind::Count | Kind::L2 | Kind::Bitmap => {}
            // A cluster taken for a table references further clusters.
            Kind::L1 | Kind::Snapshot => doubt.extend(self.hosts_below(target * self.cluster)),
            Kind::Table => {
                doubt.extend(block((at - self.table.0) / 8));
                let others = (0u64..)
                    .zip(&self.table.1)
                    .filter(|(_, place)| **place != 0 && **place / self.cluster == target);
                others.for_each(|(index, _)| doubt.extend(block(index)));
            }
        }
        doubt
    }

    /// Host clusters that the words of the cluster at `table` reference, and those that the words in these
    /// reference.
    fn hosts_below(&self, table: u64) -> BTreeSet<u64> {
        let mut hosts = BTreeSet::new();
        let inside = |raw: &u64| *raw != 0 && raw & OFFSET < self.bytes.len();
        let entries: BTreeSet<u64> =
            words(&self.bytes, table, self.l2_entries()).into_iter().filter(inside).collect();
        for raw in entries {
            hosts.extend(self.hosts(raw));
            let below = words(&self.bytes, raw & OFFSET, self.l2_entries()).into_iter();
            hosts.extend(
                below.filter(inside).collect::<BTreeSet<u64>>().into_iter().flat_map(|raw| self.hosts(raw)),
            );
        }
        hosts
    }

    /// Host clusters that an L2 entry references.
    fn hosts(&self, raw: u64) -> impl Iterator<Item = u64> + use<> {
        let (start, len) = if raw >> 62 & 1 == 1 {
            let shift = self.sector_shift();
            let host = raw & ((1 << shift) - 1);
            (host, ((raw & !(3 << 62)) >> shift) * 512 + 512 - host % 512)
        } else {
            (raw & OFFSET, if raw & OFFSET == 0 { 0 } else { self.cluster })
        };
        self.clusters(start, len).take(8)
    }

    /// Index of the snapshot with this id.
    pub(crate) fn state_of(&self, id: &[u8]) -> Option<usize> {
        (1..self.states.len()).find(|&state| self.states[state].id == id)
    }

    /// True if the snapshot table in `now` still has the original L1 table offset.
    pub(crate) fn is_listed(&self, now: &PageBytes, state: usize) -> bool {
        number(now, self.states[state].named_at, 8) == self.states[state].l1
    }

    /// True if in `now` the mapping of a guest cluster differs, or references a doubtful cluster.
    pub(crate) fn is_lost(
        &self,
        now: &PageBytes,
        state: usize,
        guest: u64,
        doubtful: &BTreeSet<u64>,
    ) -> bool {
        let state = &self.states[state];
        let (index, inside) = (guest / self.l2_entries(), guest % self.l2_entries());
        let Some(&l1) = state.entries.get(index as usize) else { return false };
        if number(now, state.l1 + index * 8, 8) != l1 {
            return true;
        }
        if l1 & OFFSET == 0 {
            return false;
        }
        let at = (l1 & OFFSET) + inside * 8;
        let raw = number(&self.bytes, at, 8);
        number(now, at, 8) != raw || self.hosts(raw).any(|host| doubtful.contains(&host))
    }
}
