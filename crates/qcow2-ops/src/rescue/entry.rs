//! What one L2 entry of a damaged image leads to.

use super::job::{Job, Known};
use super::report::Reason;
use qcow2_format::l2::{ClusterEntry, CompressedCluster, L2Entry, L2Format, L2Mend};

/// What is behind an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leads {
    /// Something that can be read, as far as tables tell.
    To(L2Entry),
    /// Nothing that can be read.
    Lost(Reason),
}

/// What a table is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Worth {
    /// An L2 table; single entries of it may be damaged.
    Table,
    /// All of it is zeroes.
    Empty,
    /// Something else.
    Other,
}

/// Decodes the words of an entry; damage that does not change its meaning is passed over.
pub(super) fn decode(format: &L2Format, raw: u64, bitmap: u64) -> Leads {
    let words = match format.mend(raw, bitmap) {
        L2Mend::Sound => (raw, bitmap),
        L2Mend::Same(first, second) => (first, second),
        _ => return Leads::Lost(Reason::EntryDamaged),
    };
    format.decode(words.0, words.1).map_or(Leads::Lost(Reason::EntryDamaged), Leads::To)
}

/// Whether an entry reads bytes of its host cluster.
pub(super) fn reads_host(entry: &ClusterEntry) -> bool {
    entry.host.is_some() && entry.allocated != 0
}

impl Known {
    /// What the entry with these words leads to in this file.
    pub(super) fn judge(&self, raw: u64, bitmap: u64) -> Leads {
        let leads = decode(&self.format, raw, bitmap);
        match leads {
            Leads::To(L2Entry::Standard(entry)) => match entry.host.filter(|_| reads_host(&entry)) {
                Some(host) if host.value() >= self.data_len => Leads::Lost(Reason::PastEnd),
                Some(host) if self.is_metadata(self.format.geometry.host_cluster(host).value()) => {
                    Leads::Lost(Reason::Metadata)
                }
                _ => leads,
            },
            Leads::To(L2Entry::Compressed(stream)) if stream.host.value() >= self.image_len => {
                Leads::Lost(Reason::PastEnd)
            }
            leads => leads,
        }
    }

    fn is_metadata(&self, cluster: u64) -> bool {
        !self.format.external_data && self.metadata.contains(cluster)
    }

    /// Whether `table` is an L2 table, perhaps with damaged entries.
    pub(super) fn worth(&self, table: &[u8]) -> Worth {
        if table.iter().all(|&byte| byte == 0) {
            return Worth::Empty;
        }
        if self.format.shape(table, self.data_len).is_some() {
            return Worth::Table;
        }
        let (mut sound, mut others) = (0u64, 0u64);
        self.entries(table, |_, raw, bitmap| {
            match (self.judge(raw, bitmap), self.format.mend(raw, bitmap)) {
                (Leads::To(_), L2Mend::Sound) => sound += 1,
                _ => others += 1,
            }
        });
        if sound > others.saturating_mul(3) { Worth::Table } else { Worth::Other }
    }

    /// Calls `visit` with index and words of the entries that are set.
    pub(super) fn entries(&self, table: &[u8], mut visit: impl FnMut(u64, u64, u64)) {
        for index in 0..self.format.geometry.l2_entries() {
            let words = self.format.words_at(table, qcow2_format::L2Index::new(index));
            let Some((raw, bitmap)) = words else { break };
            if raw != 0 || bitmap != 0 {
                visit(index, raw, bitmap);
            }
        }
    }

    /// The clusters of the image file that an entry refers to.
    pub(super) fn targets(&self, raw: u64, bitmap: u64) -> std::ops::Range<u64> {
        match decode(&self.format, raw, bitmap) {
            Leads::To(L2Entry::Standard(ClusterEntry { host: Some(host), .. }))
                if !self.format.external_data =>
            {
                let first = self.format.geometry.host_cluster(host).value();
                first..first + 1
            }
            Leads::To(L2Entry::Compressed(CompressedCluster { host, len })) => self.clusters(host, len),
            _ => 0..0,
        }
    }
}

impl Job<'_> {
    /// Marks what `table` maps.
    pub(super) fn claim(&mut self, table: &[u8]) {
        let Self { known, mapped, .. } = self;
        known.entries(table, |_, raw, bitmap| mapped.insert_each(known.targets(raw, bitmap)));
    }
}
