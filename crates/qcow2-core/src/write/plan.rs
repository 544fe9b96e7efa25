//! Decides what a guest write does, from the L2 entries alone. Holds no port.
//!
//! Invariant: a host cluster is written in place only if its copied flag is set, that is, its refcount is
//! one.

use qcow2_format::l2::{ClusterEntry, L2Entry, L2Format};
use qcow2_format::{GuestOffset, HostOffset};

/// How the clusters of a run are written. Not covered: `prepare` handles most in-place writes before it
/// plans, and compressed writes are in [`pack`](super::pack).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WriteKind {
    /// The clusters are data already; no entry changes.
    InPlace {
        /// Host offset of the run's first cluster.
        host: HostOffset,
    },
    /// The host clusters are allocated already, but some written subclusters are not data; they become data.
    Fill {
        /// Host offset of the run's first cluster.
        host: HostOffset,
    },
    /// New host clusters are allocated; the old ones, if any, lose a reference.
    Allocate,
}

/// A run of guest clusters that are written the same way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WritePlan {
    pub(crate) kind: WriteKind,
    /// Number of clusters, at least 1.
    pub(crate) clusters: u64,
    /// How many bytes of the request are in these clusters.
    pub(crate) len: u64,
}

/// Plans the write of `len` bytes at `offset`: a run of clusters from the one that holds `offset`. `entry(i)`
/// is the L2 entry of the run's `i`-th cluster; `i` is below `entries`.
#[inline]
pub(crate) fn plan_write<E>(
    format: &L2Format,
    offset: GuestOffset,
    len: u64,
    entries: u64,
    mut entry: impl FnMut(u64) -> Result<L2Entry, E>,
) -> Result<WritePlan, E> {
    debug_assert!(len > 0 && entries > 0, "a write of {len} bytes in {entries} entries");
    let geometry = &format.geometry;
    let size = geometry.cluster_size();
    let inside = geometry.in_cluster(offset.value());
    let mut run = kind_of(format, offset, &entry(0)?, touched(format, inside, len));
    let (mut clusters, mut covered) = (1, size - inside);
    while covered < len && clusters < entries {
        let guest = GuestOffset::new(offset.value() + covered);
        let kind = kind_of(format, guest, &entry(clusters)?, touched(format, 0, len - covered));
        let Some(joined) = joined(run, kind, clusters * size) else { break };
        run = joined;
        clusters += 1;
        covered += size;
    }
    Ok(WritePlan { kind: run, clusters, len: covered.min(len) })
}

fn kind_of(format: &L2Format, guest: GuestOffset, entry: &L2Entry, touched: u32) -> WriteKind {
    let L2Entry::Standard(cluster) = entry else { return WriteKind::Allocate };
    match cluster.host {
        Some(host) if cluster.copied && cluster.allocated & touched == touched => WriteKind::InPlace { host },
        Some(host) if cluster.copied => WriteKind::Fill { host },
        // In an external data file the host offset always equals the guest offset.
        _ if format.external_data => {
            WriteKind::Fill { host: HostOffset::new(format.geometry.align_down(guest.value())) }
        }
        _ => WriteKind::Allocate,
    }
}

/// How the clusters of a run and the one behind it are written together; `None`: they are not. `distance`:
/// from the run's first cluster to that one.
fn joined(run: WriteKind, next: WriteKind, distance: u64) -> Option<WriteKind> {
    use WriteKind::{Allocate, Fill, InPlace};
    let follows = |a: HostOffset, b: HostOffset| a.checked_add(distance) == Some(b);
    match (run, next) {
        (Allocate, Allocate) => Some(Allocate),
        (InPlace { host }, InPlace { host: next }) if follows(host, next) => Some(InPlace { host }),
        // To fill what is data already changes no entry.
        (InPlace { host } | Fill { host }, InPlace { host: next } | Fill { host: next })
            if follows(host, next) =>
        {
            Some(Fill { host })
        }
        _ => None,
    }
}

/// Mask of the subclusters that `len` bytes at byte `inside` of a cluster touch.
pub(crate) fn touched(format: &L2Format, inside: u64, len: u64) -> u32 {
    let size = format.geometry.subcluster_size();
    let end = inside.saturating_add(len).min(format.geometry.cluster_size());
    mask(inside / size, end.div_ceil(size))
}

/// Bits `first..end`.
pub(crate) fn mask(first: u64, end: u64) -> u32 {
    debug_assert!(first <= end && end <= 32, "subclusters {first} to {end}");
    (((1u64 << end) - 1) & !((1u64 << first) - 1)) as u32
}

/// The new entry of a cluster whose `touched` subclusters were written to the host cluster at `host`. `kept`:
/// the subclusters that were copied there, or are there already.
pub(crate) fn written_entry(old: &L2Entry, host: HostOffset, touched: u32, kept: u32) -> L2Entry {
    let data = touched | kept;
    debug_assert!(host.value() > 0 || data != 0, "a written entry without data and host offset");
    let zero = match old {
        L2Entry::Standard(cluster) => cluster.zero & !data,
        L2Entry::Compressed(_) => 0,
    };
    L2Entry::Standard(ClusterEntry { host: Some(host), copied: true, allocated: data, zero })
}

/// Mask of the subclusters that must be copied when a new host cluster replaces `old`.
pub(crate) fn kept_subclusters(format: &L2Format, old: &L2Entry) -> u32 {
    match old {
        L2Entry::Standard(cluster) => cluster.allocated,
        L2Entry::Compressed(_) => format.all_subclusters(),
    }
}

/// What a zeroing request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ZeroKind {
    /// Write zeroes; allocated clusters stay allocated.
    Keep,
    /// Write zeroes; clusters may be freed.
    Unmap,
    /// Discard: the content no longer matters. Whole clusters only.
    Discard,
    /// Deallocate in this layer, so that reads go to the backing file. Whole clusters only.
    Forget,
}

/// What zeroing does to one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ZeroPlan {
    /// Nothing: the entry is right already, or a discard that the entry cannot record.
    Nothing,
    /// The entry changes.
    Change {
        /// The new entry.
        entry: L2Entry,
        /// True if the host clusters of the old entry lose a reference.
        free: bool,
    },
    /// No entry can record it: zeroes must be written as data.
    WriteData,
}

/// Plans the zeroing of `subclusters` (a mask) of one cluster. `backing`: true if there is a backing file, so
/// that an unallocated cluster may not read as zeroes. Spec: "Cluster mapping", "Extended L2 Entries".
pub(crate) fn plan_zero(
    format: &L2Format,
    old: &L2Entry,
    subclusters: u32,
    kind: ZeroKind,
    backing: bool,
) -> ZeroPlan {
    debug_assert!(subclusters != 0 && subclusters & !format.all_subclusters() == 0, "{subclusters:#x}");
    let whole = subclusters == format.all_subclusters();
    let blank = |zero| L2Entry::Standard(ClusterEntry { zero, ..ClusterEntry::UNALLOCATED });
    if kind == ZeroKind::Forget {
        return match old {
            L2Entry::Standard(ClusterEntry { host: None, zero: 0, .. }) => ZeroPlan::Nothing,
            L2Entry::Standard(cluster) => ZeroPlan::Change { entry: blank(0), free: cluster.host.is_some() },
            L2Entry::Compressed(_) => ZeroPlan::Change { entry: blank(0), free: true },
        };
    }
    let cluster = match old {
        L2Entry::Standard(cluster) => *cluster,
        L2Entry::Compressed(_) if whole && (format.zero_flag || !backing) => {
            let zero = if format.zero_flag { format.all_subclusters() } else { 0 };
            return ZeroPlan::Change { entry: blank(zero), free: true };
        }
        L2Entry::Compressed(_) => return without_flag(kind),
    };
    if !format.zero_flag {
        return match (backing, cluster.host) {
            (true, _) => without_flag(kind),
            (false, None) => ZeroPlan::Nothing,
            (false, Some(_)) => ZeroPlan::Change { entry: blank(0), free: true },
        };
    }
    let untouched = cluster.host.is_none() && cluster.zero == 0;
    if kind == ZeroKind::Discard && untouched && !backing {
        return ZeroPlan::Nothing;
    }
    let keep_host = cluster.host.is_some() && !(whole && (kind != ZeroKind::Keep || !cluster.copied));
    let entry = if keep_host {
        ClusterEntry {
            allocated: cluster.allocated & !subclusters,
            zero: cluster.zero | subclusters,
            ..cluster
        }
    } else {
        ClusterEntry { zero: cluster.zero | subclusters, ..ClusterEntry::UNALLOCATED }
    };
    debug_assert!(entry.allocated & entry.zero == 0, "a subcluster is both zero and data");
    let new = L2Entry::Standard(entry);
    if new == *old {
        return ZeroPlan::Nothing;
    }
    ZeroPlan::Change { entry: new, free: cluster.host.is_some() && !keep_host }
}

/// If the entry cannot record zeroes, a discard does nothing and zeroes are written as data.
fn without_flag(kind: ZeroKind) -> ZeroPlan {
    if kind == ZeroKind::Discard { ZeroPlan::Nothing } else { ZeroPlan::WriteData }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::convert::Infallible;
    use qcow2_format::{Geometry, GeometryFields};

    fn format(extended_l2: bool, zero_flag: bool) -> L2Format {
        let geometry =
            Geometry::new(GeometryFields { cluster_bits: 16, refcount_order: 4, extended_l2 }).unwrap();
        L2Format { geometry, zero_flag, external_data: false }
    }

    fn cluster(host: u64, copied: bool, allocated: u32, zero: u32) -> L2Entry {
        let host = (host != 0).then_some(HostOffset::new(host));
        L2Entry::Standard(ClusterEntry { host, copied, allocated, zero })
    }

    fn plan(format: &L2Format, offset: u64, len: u64, entries: &[L2Entry]) -> WritePlan {
        let entry = |i: u64| Ok::<_, Infallible>(entries[i as usize]);
        plan_write(format, GuestOffset::new(offset), len, entries.len() as u64, entry).unwrap()
    }

    #[test]
    fn a_cluster_is_written_in_place_only_if_its_copied_flag_is_set() {
        let format = format(false, true);
        let ours = plan(&format, 0x100, 16, &[cluster(0x50000, true, 1, 0)]);
        assert_eq!(ours.kind, WriteKind::InPlace { host: HostOffset::new(0x50000) });
        let shared = plan(&format, 0x100, 16, &[cluster(0x50000, false, 1, 0)]);
        assert_eq!(shared.kind, WriteKind::Allocate);
    }

    #[test]
    fn runs_end_where_the_kind_changes_or_host_clusters_are_not_adjacent() {
        let format = format(false, true);
        let entries = [cluster(0, false, 0, 0), cluster(0, false, 0, 1), cluster(0x50000, true, 1, 0)];
        let run = plan(&format, 0x8000, 1 << 20, &entries);
        assert_eq!((run.kind, run.clusters, run.len), (WriteKind::Allocate, 2, 0x18000));
        let apart = [cluster(0x50000, true, 1, 0), cluster(0x70000, true, 1, 0)];
        assert_eq!(plan(&format, 0, 1 << 20, &apart).clusters, 1);
    }

    #[test]
    fn neighbours_on_the_host_are_one_run_whether_they_are_data_or_not() {
        let format = format(false, true);
        let (data, zero) = (|host| cluster(host, true, 1, 0), |host| cluster(host, true, 0, 1));
        let fill = WriteKind::Fill { host: HostOffset::new(0x50000) };
        for (entries, clusters) in [
            ([data(0x50000), zero(0x60000), data(0x70000)], 3),
            ([zero(0x50000), data(0x60000), data(0x90000)], 2),
            ([data(0x50000), zero(0x60000), cluster(0x70000, false, 1, 0)], 2),
        ] {
            let run = plan(&format, 0x8000, 1 << 20, &entries);
            assert_eq!((run.kind, run.clusters, run.len), (fill, clusters, (clusters << 16) - 0x8000));
        }
        assert_eq!(plan(&format, 0, 1 << 20, &[data(0x50000), zero(0x70000)]).clusters, 1);
    }

    #[test]
    fn in_place_needs_only_the_written_subclusters_to_be_data() {
        let format = format(true, true);
        let entry = cluster(0x50000, true, 0b10, 0);
        assert_eq!(
            plan(&format, 2048, 2048, &[entry]).kind,
            WriteKind::InPlace { host: HostOffset::new(0x50000) }
        );
        assert_eq!(plan(&format, 2047, 2, &[entry]).kind, WriteKind::Fill { host: HostOffset::new(0x50000) });
    }

    #[test]
    fn version_3_zeroing_sets_the_zero_flag_and_frees_unless_kept() {
        let format3 = format(false, true);
        let data = cluster(0x50000, true, 1, 0);
        let keep = plan_zero(&format3, &data, 1, ZeroKind::Keep, false);
        assert_eq!(keep, ZeroPlan::Change { entry: cluster(0x50000, true, 0, 1), free: false });
        let unmap = plan_zero(&format3, &data, 1, ZeroKind::Unmap, false);
        assert_eq!(unmap, ZeroPlan::Change { entry: cluster(0, false, 0, 1), free: true });
        let shared = plan_zero(&format3, &cluster(0x50000, false, 1, 0), 1, ZeroKind::Keep, false);
        assert_eq!(shared, ZeroPlan::Change { entry: cluster(0, false, 0, 1), free: true });
        let nothing = cluster(0, false, 0, 0);
        assert_eq!(plan_zero(&format3, &nothing, 1, ZeroKind::Discard, false), ZeroPlan::Nothing);
        let hidden = ZeroPlan::Change { entry: cluster(0, false, 0, 1), free: false };
        assert_eq!(plan_zero(&format3, &nothing, 1, ZeroKind::Discard, true), hidden);
    }

    #[test]
    fn version_2_zeroing_never_exposes_the_backing_file() {
        let format2 = format(false, false);
        let data = cluster(0x50000, true, 1, 0);
        assert_eq!(plan_zero(&format2, &data, 1, ZeroKind::Unmap, true), ZeroPlan::WriteData);
        assert_eq!(plan_zero(&format2, &data, 1, ZeroKind::Discard, true), ZeroPlan::Nothing);
        let cleared = ZeroPlan::Change { entry: cluster(0, false, 0, 0), free: true };
        assert_eq!(plan_zero(&format2, &data, 1, ZeroKind::Discard, false), cleared);
    }

    #[test]
    fn a_partly_zeroed_cluster_keeps_its_host_cluster() {
        let format = format(true, true);
        let old = cluster(0x50000, true, 0xff, 0);
        let wanted = ZeroPlan::Change { entry: cluster(0x50000, true, 0xf0, 0x0f), free: false };
        assert_eq!(plan_zero(&format, &old, 0x0f, ZeroKind::Unmap, true), wanted);
        assert_eq!(plan_zero(&format, &old, 0x0f, ZeroKind::Keep, true), wanted);
    }
}
