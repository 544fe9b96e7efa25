//! Guest range to extents: pure decisions on table entries.
//!
//! Invariant I8 begins here: every guest byte is in exactly one run, and a run says where it lives.

use qcow2_format::l2::{ClusterEntry, CompressedCluster, L2Entry, L2Format, SubclusterState};
use qcow2_format::{FormatError, GuestOffset, HostOffset};

/// Where a run of guest bytes lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Not in this layer.
    Unallocated,
    /// Zeroes; `host` is the place kept for them, if any.
    Zero { host: Option<HostOffset> },
    /// At `host`; `copied`: this image alone refers to it, so that it may be written in place.
    Data { host: HostOffset, copied: bool },
    /// Inside a compressed stream; the run never passes the end of its cluster.
    Compressed(CompressedCluster),
}

/// A run of guest bytes that live in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) len: u64,
    pub(crate) place: Place,
}

/// The longest run from `offset` on, at most `max_len` bytes. `entry(i)` gives the `i`-th L2 entry counted from the
/// one that maps `offset`; `entries` of them may be asked for.
pub(crate) fn resolve_run(
    format: &L2Format,
    offset: GuestOffset,
    max_len: u64,
    entries: u64,
    mut entry: impl FnMut(u64) -> Result<L2Entry, FormatError>,
) -> Result<Run, FormatError> {
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

/// The first byte of the cluster after `first` whose subcluster has another state.
fn same_state_end(format: &L2Format, cluster: &ClusterEntry, first: u32) -> u64 {
    let (count, state) = (format.geometry.subclusters(), cluster.state(first));
    let end = (first + 1..count).find(|&i| cluster.state(i) != state).unwrap_or(count);
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
