//! Reads stretches of L2 tables past the cache, of an image that nobody changes any more.

use super::Mapping;
use ::alloc::vec::Vec;
use core::ops::Range;
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::{ClusterEntry, L2Entry, SubclusterState};
use qcow2_format::{GuestOffset, HostOffset};

/// How a run of guest bytes is stored in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Zeroes.
    Zero,
    /// At this host offset.
    Data(HostOffset),
    /// In some other way, or the entry is damaged or cannot be read: only a lookup tells.
    Unknown,
}

/// Takes runs: guest offset, length, and how it is stored.
type Visit<'a> = dyn FnMut(u64, u64, Stored) + 'a;

/// Clusters side by side in guest and host.
struct Joined {
    start: u64,
    len: u64,
    host: HostOffset,
    /// The last entry.
    raw: u64,
}

impl Mapping {
    /// Calls `visit` for all of `range` that this layer allocates, in ascending order, in runs of whole
    /// subclusters that are cut at the ends of `range`. The image takes no changes. `bytes`: for reuse. Disk:
    /// reads the entries of `range`. No damage is reported: that is for whoever needs the cluster.
    pub(crate) fn scan(&self, range: Range<u64>, bytes: &mut Vec<u8>, visit: &mut Visit<'_>) {
        let geometry = &self.format.geometry;
        let mut at = range.start;
        while at < range.end {
            let index = geometry.l1_index(GuestOffset::new(at));
            let end = (index.value() + 1).saturating_mul(geometry.l2_coverage()).min(range.end);
            match L1Entry::decode(self.l1.entry(index), geometry) {
                Ok(L1Entry { l2_table: Some(table), .. }) => self.scan_table(table, at..end, bytes, visit),
                Ok(L1Entry { l2_table: None, .. }) => {}
                Err(_) => visit(at, end - at, Stored::Unknown),
            }
            at = end;
        }
    }

    /// The entries of `range`, all of which are in `table`.
    fn scan_table(&self, table: HostOffset, range: Range<u64>, bytes: &mut Vec<u8>, visit: &mut Visit<'_>) {
        let geometry = &self.format.geometry;
        let (size, entry_size) = (geometry.cluster_size(), geometry.l2_entry_size());
        let start = geometry.align_down(range.start);
        let first = geometry.l2_index(GuestOffset::new(start)).value() * entry_size;
        let len = geometry.clusters_for(range.end - start) * entry_size;
        bytes.resize(len as usize, 0);
        let read = table.checked_add(first).map(|at| self.file.storage().read_padded(at, bytes));
        if !matches!(read, Some(Ok(()))) {
            return visit(range.start, range.end - range.start, Stored::Unknown);
        }
        let mut visit = |offset: u64, len: u64, stored: Stored| {
            let (from, to) = (offset.max(range.start), offset.saturating_add(len).min(range.end));
            let stored = match stored {
                Stored::Data(host) => {
                    Stored::Data(HostOffset::new(host.value().saturating_add(from - offset)))
                }
                other => other,
            };
            if from < to {
                visit(from, to - from, stored);
            }
        };
        let mut joined: Option<Joined> = None;
        let group = GROUP * entry_size as usize;
        for (first, entries) in (0..).step_by(GROUP).zip(bytes.chunks(group)) {
            // Most entries of the layers of a long chain: a quick look at some at a time.
            if entries.iter().fold(0, |any, byte| any | byte) == 0 {
                continue;
            }
            for (number, entry) in (first..).zip(entries.chunks_exact(entry_size as usize)) {
                let (raw, bitmap) = words(entry);
                if raw != 0 || bitmap != 0 {
                    self.scan_entry(start + number * size, (raw, bitmap), &mut joined, &mut visit);
                }
            }
        }
        if let Some(run) = joined {
            visit(run.start, run.len, Stored::Data(run.host));
        }
    }

    /// The entry of the cluster at `offset`. `joined`: the run that it may continue.
    #[inline]
    fn scan_entry(
        &self,
        offset: u64,
        (raw, bitmap): (u64, u64),
        joined: &mut Option<Joined>,
        visit: &mut Visit<'_>,
    ) {
        let size = self.format.geometry.cluster_size();
        if let Some(run) = joined
            && run.start + run.len == offset
            && self.follows(run.raw, raw)
        {
            (run.raw, run.len) = (raw, run.len + size);
            return;
        }
        if let Some(run) = joined.take() {
            visit(run.start, run.len, Stored::Data(run.host));
        }
        match self.format.decode(raw, bitmap) {
            Ok(L2Entry::Standard(ClusterEntry { host: Some(host), .. }))
                if self.format.external_data && host.value() != offset =>
            {
                visit(offset, size, Stored::Unknown);
            }
            Ok(L2Entry::Standard(ClusterEntry { host: Some(host), allocated, .. }))
                if allocated == self.format.all_subclusters() =>
            {
                *joined = Some(Joined { start: offset, len: size, host, raw });
            }
            Ok(L2Entry::Standard(entry)) => self.scan_cluster(offset, &entry, visit),
            Ok(L2Entry::Compressed(_)) | Err(_) => visit(offset, size, Stored::Unknown),
        }
    }

    /// True if `next` maps the cluster after the one that `last` maps, an entry for data: the same flags, and
    /// the next host cluster. Most entries of most tables; saves decoding them. Extended entries have their
    /// subclusters in another word.
    fn follows(&self, last: u64, next: u64) -> bool {
        let geometry = &self.format.geometry;
        !geometry.extended_l2()
            && last.wrapping_add(geometry.cluster_size()) == next
            && (last ^ next) & !HOST_BITS == 0
    }

    /// The subclusters of the cluster at `offset`.
    fn scan_cluster(&self, offset: u64, entry: &ClusterEntry, visit: &mut Visit<'_>) {
        let geometry = &self.format.geometry;
        let size = geometry.subcluster_size();
        let mut index = 0;
        while index < geometry.subclusters() {
            let state = entry.state(index);
            let end = (index..geometry.subclusters()).find(|i| entry.state(*i) != state);
            let end = end.unwrap_or(geometry.subclusters());
            let (inside, len) = (u64::from(index) * size, u64::from(end - index) * size);
            match (state, entry.host) {
                (SubclusterState::Zero, _) => visit(offset + inside, len, Stored::Zero),
                (SubclusterState::Data, Some(host)) => {
                    let host = HostOffset::new(host.value() + inside);
                    visit(offset + inside, len, Stored::Data(host));
                }
                _ => {}
            }
            index = end;
        }
    }
}

/// Entries that are looked at together.
const GROUP: usize = 8;

/// The bits of an entry that are its host offset.
const HOST_BITS: u64 = (1 << 56) - 1;

/// The words of an entry; the second is 0 in one of 8 bytes.
fn words(entry: &[u8]) -> (u64, u64) {
    let mut words = qcow2_format::bytes::words(entry);
    (words.next().unwrap_or(0), words.next().unwrap_or(0))
}
