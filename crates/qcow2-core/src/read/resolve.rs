//! From a guest range to runs: pure functions of L2 entries.
//!
//! Invariant I8 starts here: every guest byte is in exactly one run.

use qcow2_format::l2::{ClusterEntry, CompressedCluster, L2Entry, L2Format, SubclusterState};
use qcow2_format::{FormatError, GuestOffset, HostOffset};

/// How a run of guest bytes is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Not in this layer.
    Unallocated,
    /// Zeroes. `host`: the host offset allocated for them, if any.
    Zero { host: Option<HostOffset> },
    /// Data at `host`. `copied`: the copied flag is set, so that it may be written in place.
    Data { host: HostOffset, copied: bool },
    /// Part of a compressed cluster; the run ends with the cluster at the latest.
    Compressed(CompressedCluster),
}

/// A run of guest bytes that are stored alike and, with a host offset, contiguously.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) len: u64,
    pub(crate) place: Place,
}

/// The longest run at `offset`, at most `max_len` bytes. `entry(i)` is the `i`-th L2 entry counted from the
/// one that maps `offset`; `i` is below `entries`.
pub(crate) fn resolve_run(
    format: &L2Format,
    offset: GuestOffset,
    max_len: u64,
    entries: u64,
    mut entry: impl FnMut(u64) -> Result<L2Entry, FormatError>,
) -> Result<Run, FormatError> {
    debug_assert!(entries > 0, "a lookup without entries");
    let geometry = &format.geometry;
    let cluster_size = geometry.cluster_size();
    let inside = geometry.in_cluster(offset.value());
    let cluster = match entry(0)? {
        L2Entry::Compressed(stream) => {
            return Ok(Run { len: max_len.min(cluster_size - inside), place: Place::Compressed(stream) });
        }
        L2Entry::Standard(cluster) => cluster,
    };
    let first = geometry.subcluster_index(offset);
    let place = place_at(&cluster, first, inside);
    let mut len = same_state_end(format, &cluster, first) - inside;
    let mut next = 1;
    while len < max_len && geometry.is_aligned(inside + len) && next < entries {
        let Ok(L2Entry::Standard(cluster)) = entry(next) else { break };
        if !continues(place, place_at(&cluster, 0, 0), len) {
            break;
        }
        len += same_state_end(format, &cluster, 0);
        next += 1;
    }
    Ok(Run { len: len.min(max_len), place })
}

fn place_at(cluster: &ClusterEntry, subcluster: u32, inside: u64) -> Place {
    let host = cluster.host.map(|h| HostOffset::new(h.value() + inside));
    match (cluster.state(subcluster), host) {
        (SubclusterState::Zero, host) => Place::Zero { host },
        (SubclusterState::Data, Some(host)) => Place::Data { host, copied: cluster.copied },
        (SubclusterState::Data | SubclusterState::Unallocated, _) => Place::Unallocated,
    }
}

/// Where the state of subcluster `first` ends: offset in the cluster of the next subcluster with another
/// state.
fn same_state_end(format: &L2Format, cluster: &ClusterEntry, first: u32) -> u64 {
    let (count, state) = (format.geometry.subclusters(), cluster.state(first));
    let end = (first + 1..count).find(|&i| cluster.state(i) != state).unwrap_or(count);
    debug_assert!(end > first, "an empty run of subclusters");
    u64::from(end) * format.geometry.subcluster_size()
}

fn continues(run: Place, next: Place, len: u64) -> bool {
    let follows = |a: HostOffset, b: HostOffset| a.checked_add(len) == Some(b);
    match (run, next) {
        (Place::Unallocated, Place::Unallocated) => true,
        (Place::Zero { host: None }, Place::Zero { host: None }) => true,
        (Place::Zero { host: Some(a) }, Place::Zero { host: Some(b) }) => follows(a, b),
        (Place::Data { host: a, copied: c }, Place::Data { host: b, copied: d }) => c == d && follows(a, b),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2_format::{Geometry, GeometryFields};

    fn format(cluster_bits: u32, extended_l2: bool) -> L2Format {
        let geometry =
            Geometry::new(GeometryFields { cluster_bits, refcount_order: 4, extended_l2 }).unwrap();
        L2Format { geometry, zero_flag: true, external_data: false }
    }

    fn check(format: &L2Format, offset: u64, max_len: u64, words: &[(u64, u64)], wanted: Run) {
        let entry = |i: u64| {
            let (raw, bitmap) = words[i as usize];
            format.decode(raw, bitmap)
        };
        let run = resolve_run(format, GuestOffset::new(offset), max_len, words.len() as u64, entry);
        assert_eq!(run, Ok(wanted));
    }

    fn data(host: u64, copied: bool) -> Place {
        Place::Data { host: HostOffset::new(host), copied }
    }

    const COPIED: u64 = 1 << 63;

    #[test]
    fn adjacent_host_clusters_are_one_run() {
        let format = format(16, false);
        let words = [(COPIED | 0x50000, 0), (COPIED | 0x60000, 0), (COPIED | 0x90000, 0)];
        check(&format, 0x10, 1 << 20, &words, Run { len: 0x1fff0, place: data(0x50010, true) });
        check(&format, 0x10, 0x20, &words, Run { len: 0x20, place: data(0x50010, true) });
    }

    #[test]
    fn a_run_ends_where_the_copied_flag_changes() {
        let words = [(COPIED | 0x50000, 0), (0x60000, 0)];
        check(&format(16, false), 0, 1 << 20, &words, Run { len: 0x10000, place: data(0x50000, true) });
    }

    #[test]
    fn zero_and_unallocated_are_different_runs() {
        let format = format(16, false);
        check(
            &format,
            0,
            1 << 20,
            &[(1, 0), (1, 0), (0, 0)],
            Run { len: 0x20000, place: Place::Zero { host: None } },
        );
        check(&format, 0, 1 << 20, &[(0, 0), (1, 0)], Run { len: 0x10000, place: Place::Unallocated });
    }

    #[test]
    fn subclusters_split_a_cluster() {
        let format = format(16, true);
        let words = [(COPIED | 0x50000, 0b0110 | 1 << 35), (COPIED | 0x60000, u64::from(u32::MAX))];
        check(&format, 0, 1 << 20, &words, Run { len: 2048, place: Place::Unallocated });
        check(&format, 2048, 1 << 20, &words, Run { len: 4096, place: data(0x50800, true) });
        check(
            &format,
            6144,
            1 << 20,
            &words,
            Run { len: 2048, place: Place::Zero { host: Some(HostOffset::new(0x51800)) } },
        );
    }

    #[test]
    fn a_compressed_run_ends_with_its_cluster() {
        let words = [(1 << 62 | 0x5004f, 0), (1 << 62 | 0x60000, 0)];
        let place = Place::Compressed(CompressedCluster { host: HostOffset::new(0x5004f), len: 512 - 0x4f });
        check(&format(16, false), 0x100, 1 << 20, &words, Run { len: 0xff00, place });
    }

    #[test]
    fn a_damaged_entry_is_an_error_only_at_the_start_of_a_run() {
        let format = format(16, false);
        let entry = |i| format.decode(if i == 0 { COPIED | 0x50000 } else { 0x1234 << 9 | 0x200 }, 0);
        let run = resolve_run(&format, GuestOffset::new(0), 1 << 20, 2, entry).unwrap();
        assert_eq!(run.len, 0x10000);
        assert!(resolve_run(&format, GuestOffset::new(0), 1, 1, |_| format.decode(0x200, 0)).is_err());
    }
}
