//! The engine's invariants as assertions.
//!
//! The numbers are those of ARCHITECTURE.md. Each invariant is asserted where something is decided and again
//! where it is written or read back, so that a bug in one place is caught in the other. No file content can
//! make an assertion fail: damaged content is an error before it gets here. Checks that cost little compared
//! to the work around them stay on in release builds.

use crate::meta::overlap::OverlapChecks;
use crate::meta::run::ClusterRun;
use crate::read::resolve::Run;
use core::ops::Range;
use qcow2_format::feature::AutoclearFeatures;
use qcow2_format::header::edit::autoclear;
use qcow2_format::l1::without_copied;
use qcow2_format::l2::{ClusterEntry, L2Entry};
use qcow2_format::refcount::RefcountWidth;
use qcow2_format::{Geometry, GuestOffset, Header, HostOffset, Version};

/// I1: a refcount fits its width; it would otherwise wrap around and fall below the references.
pub(crate) fn count_fits(width: RefcountWidth, count: u64) {
    assert!(count <= width.max(), "refcount {count} in {} bits", width.bits());
}

/// I1, I5: an allocation has at least one cluster, and not the header's.
pub(crate) fn handed_out(run: ClusterRun) {
    assert!(run.first() > 0 && !run.is_empty(), "{run:?} are allocated");
}

/// I1: `blocks` consecutive refcount blocks cover all clusters up to `end`, their own included.
pub(crate) fn all_counted(blocks: u64, per_block: u64, end: u64) {
    assert!(blocks.saturating_mul(per_block) >= end, "{blocks} refcount blocks do not cover cluster {end}");
}

/// I2: the copy-on-write edges of a write do not overlap its own bytes, and stay inside its host clusters.
pub(crate) fn edges_apart(edges: impl Iterator<Item = Range<u64>>, own: Range<u64>, place: Range<u64>) {
    for edge in edges {
        debug_assert!(place.start <= edge.start && edge.end <= place.end, "{edge:?} outside of {place:?}");
        debug_assert!(
            edge.end <= own.start || own.end <= edge.start,
            "{edge:?} touches the write at {own:?}"
        );
    }
}

/// I2: an L2 entry that the engine writes points to the start of a cluster.
pub(crate) fn leads_to_cluster(geometry: &Geometry, entry: &L2Entry) {
    if let L2Entry::Standard(ClusterEntry { host: Some(host), allocated, zero, .. }) = entry {
        debug_assert!(geometry.is_aligned(host.value()), "an l2 entry points to {host}");
        debug_assert!(allocated & zero == 0, "subclusters {allocated:#x} and {zero:#x} overlap");
    }
}

/// I3: a cluster that was unlinked in epoch `unlinked` may be freed in epoch `now`: no operation uses it.
pub(crate) fn unseen(unlinked: u64, now: u64) {
    assert!(unlinked + 2 <= now, "a cluster unlinked in epoch {unlinked} is freed in epoch {now}");
}

/// I4: a cluster that gets the copied flag was just allocated, or had the flag already.
pub(crate) fn ours_alone(reserved: bool, was_copied: bool, data_file: bool) {
    assert!(reserved || was_copied || data_file, "a shared cluster is written in place");
}

/// I4: L2 tables that a snapshot shares with the active disk have no copied flag in either L1 table.
pub(crate) fn none_copied(l1_entries: &[u64]) {
    debug_assert!(
        l1_entries.iter().all(|&raw| raw == without_copied(raw)),
        "the entry of a shared l2 table has the copied flag"
    );
}

/// I5: the header's cluster is never freed.
pub(crate) fn not_the_header(kinds: OverlapChecks, cluster: u64) {
    assert!(!kinds.any_of(OverlapChecks::MAIN_HEADER), "host cluster {cluster} is freed as {}", kinds.text());
}

/// I5: a table has whole words, and its end is a valid offset.
pub(crate) fn table_words(offset: HostOffset, len: usize) {
    debug_assert!(len.is_multiple_of(8), "{len} bytes of a table");
    debug_assert!(offset.checked_add(len as u64).is_some(), "a table at {offset} with {len} bytes");
}

/// I6: the sector that is going to be written at offset 0 is a header.
pub(crate) fn is_header(sector: &[u8]) {
    assert!(sector.starts_with(b"QFI\xfb"), "the new first sector is not a header");
}

/// I6: an image that is being changed has no unknown autoclear bits.
pub(crate) fn no_unknown_promise(header: &Header) {
    let unknown = header.features.autoclear.unknown();
    assert!(unknown == AutoclearFeatures::NONE, "unknown autoclear bits {:#x} at a change", unknown.bits());
}

/// I6: the parsed header and its sector have the same autoclear bits.
pub(crate) fn same_features(header: &Header, sector: &[u8]) {
    debug_assert!(
        header.version < Version::V3 || autoclear(sector) == header.features.autoclear,
        "the header's sector has other autoclear bits than the header"
    );
}

/// I7: only an image that was opened for writing is written to.
pub(crate) fn may_write(writable: bool) {
    assert!(writable, "write to an image that was opened for reading");
}

/// I8: a run is not empty, and no longer than asked for. Debug builds only: it is on the path of every read,
/// where the check cost 7 % of 4 KiB random reads.
pub(crate) fn covers(run: &Run, asked: u64) {
    debug_assert!(
        run.len > 0 && run.len <= asked || asked == 0,
        "a run of {} bytes, asked for at most {asked}",
        run.len
    );
}

/// I8: guest and host offset have the same distance from the start of their clusters. Debug builds only, as
/// [`covers`].
pub(crate) fn equally_far(geometry: &Geometry, guest: GuestOffset, host: HostOffset) {
    debug_assert_eq!(
        geometry.in_cluster(guest.value()),
        geometry.in_cluster(host.value()),
        "guest offset {guest} is mapped to {host}"
    );
}

/// I8: the copy-on-write ranges of a write lie in its cluster, in order, with gaps, and outside the write.
pub(crate) fn beside(ranges: &[(u64, u64)], write: Range<u64>, cluster_size: u64) {
    debug_assert!(ranges.iter().all(|range| range.0 < range.1 && range.1 <= cluster_size), "{ranges:?}");
    debug_assert!(ranges.windows(2).all(|pair| pair[0].1 < pair[1].0), "{ranges:?}");
    debug_assert!(
        ranges.iter().all(|range| range.1 <= write.start || write.end <= range.0),
        "{ranges:?} beside {write:?}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::read::resolve::Place;
    use qcow2_format::GeometryFields;

    #[track_caller]
    fn check(broken: impl FnOnce() + std::panic::UnwindSafe) {
        assert!(std::panic::catch_unwind(broken).is_err(), "a broken invariant was not noticed");
    }

    #[test]
    fn broken_invariants_panic() {
        let width = RefcountWidth::from_order(3).unwrap();
        check(move || count_fits(width, 256));
        check(|| handed_out(ClusterRun::one(0)));
        check(|| handed_out(ClusterRun::new(1, 0)));
        check(|| all_counted(2, 100, 201));
        check(|| edges_apart(core::iter::once(5..10), 10..20, 6..30));
        check(|| edges_apart(core::iter::once(5..11), 10..20, 0..30));
        check(|| none_copied(&[0x50000 | 1 << 63]));
        check(|| not_the_header(OverlapChecks::ALL, 0));
        let geometry =
            Geometry::new(GeometryFields { cluster_bits: 9, refcount_order: 4, extended_l2: false });
        check(move || equally_far(&geometry.unwrap(), GuestOffset::new(5), HostOffset::new(512)));
        let mut header = Header::new(Version::V3, 16);
        header.features.autoclear = AutoclearFeatures::from_bits(1 << 60);
        let other = header.clone();
        check(move || no_unknown_promise(&header));
        check(move || same_features(&other, &[0; 512]));
        check(|| unseen(5, 6));
        check(|| ours_alone(false, false, false));
        check(|| is_header(&[0; 512]));
        check(|| may_write(false));
        check(|| covers(&Run { len: 5, place: Place::Unallocated }, 4));
        check(|| covers(&Run { len: 0, place: Place::Unallocated }, 4));
        check(|| beside(&[(0, 10)], 5..20, 100));
        check(|| beside(&[(0, 10), (10, 20)], 30..40, 100));
        check(|| table_words(HostOffset::new(0), 7));
    }

    #[test]
    fn valid_values_pass() {
        count_fits(RefcountWidth::from_order(3).unwrap(), 255);
        handed_out(ClusterRun::one(1));
        all_counted(2, 100, 200);
        edges_apart([0..10, 20..30].into_iter(), 10..20, 0..30);
        none_copied(&[0, 0x50000]);
        not_the_header(OverlapChecks::L2, 1);
        no_unknown_promise(&Header::new(Version::V3, 16));
        same_features(&Header::new(Version::V3, 16), &[0; 512]);
        unseen(5, 7);
        ours_alone(false, true, false);
        is_header(b"QFI\xfb\0\0\0\x03");
        covers(&Run { len: 4, place: Place::Unallocated }, 4);
        beside(&[(0, 5), (20, 100)], 5..20, 100);
        table_words(HostOffset::new(8), 16);
    }
}
