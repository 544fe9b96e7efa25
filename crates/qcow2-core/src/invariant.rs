//! The engine's promises to itself, as assertions.
//!
//! The numbers are those of ARCHITECTURE.md. Each is asserted where something is decided and once more where
//! it is written or read back, so that one place alone cannot break it unnoticed. None can fail because of
//! what a file holds: damaged content is an error before it comes here. What costs nothing beside the work
//! around it is asserted in release builds too.

use crate::meta::run::ClusterRun;
use crate::read::resolve::Run;
use core::ops::Range;
use qcow2_format::l2::{ClusterEntry, L2Entry};
use qcow2_format::refcount::RefcountWidth;
use qcow2_format::{Geometry, HostOffset};

/// I1: a refcount fits its width, so that none wraps around and falls below the references.
pub(crate) fn count_fits(width: RefcountWidth, count: u64) {
    assert!(count <= width.max(), "refcount {count} in {} bits", width.bits());
}

/// I1, I5: clusters that are handed out are some, and not the header's.
pub(crate) fn handed_out(run: ClusterRun) {
    assert!(run.first() > 0 && !run.is_empty(), "{run:?} are handed out");
}

/// I2: an entry that the engine makes leads to a whole cluster.
pub(crate) fn leads_to_cluster(geometry: &Geometry, entry: &L2Entry) {
    if let L2Entry::Standard(ClusterEntry { host: Some(host), allocated, zero, .. }) = entry {
        debug_assert!(geometry.is_aligned(host.value()), "an entry leads to {host}");
        debug_assert!(allocated & zero == 0, "subclusters {allocated:#x} and {zero:#x} overlap");
    }
}

/// I3: what was unlinked in epoch `unlinked` is used again in epoch `now` only when nobody can see it.
pub(crate) fn unseen(unlinked: u64, now: u64) {
    assert!(unlinked + 2 <= now, "unlinked in epoch {unlinked}, used again in {now}");
}

/// I4: a cluster whose copied flag is set was reserved for this image alone, or had the flag already.
pub(crate) fn ours_alone(reserved: bool, was_copied: bool, data_file: bool) {
    assert!(reserved || was_copied || data_file, "a cluster of others is written in place");
}

/// I5: a table's bytes are whole words, and none lies past what an entry can lead to.
pub(crate) fn table_words(offset: HostOffset, len: usize) {
    debug_assert!(len.is_multiple_of(8), "{len} bytes of a table");
    debug_assert!(offset.checked_add(len as u64).is_some(), "a table at {offset} with {len} bytes");
}

/// I6: the sector that is about to be the header's is one.
pub(crate) fn is_header(sector: &[u8]) {
    assert!(sector.starts_with(b"QFI\xfb"), "the first sector would be no header");
}

/// I7: only an image that was opened for writing is written.
pub(crate) fn may_write(writable: bool) {
    assert!(writable, "an image that was opened for reading is written");
}

/// I8: a run covers bytes, and no more than were asked for. In debug builds only: on the path of every read
/// the check alone cost 7 % of 4 KiB random reads.
pub(crate) fn covers(run: &Run, asked: u64) {
    debug_assert!(
        run.len > 0 && run.len <= asked || asked == 0,
        "a run of {} bytes where {asked} were asked for",
        run.len
    );
}

/// I8: the bytes beside a write lie in its cluster, in order, and do not touch each other or the write's own.
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

    #[track_caller]
    fn check(broken: impl FnOnce() + std::panic::UnwindSafe) {
        assert!(std::panic::catch_unwind(broken).is_err(), "a broken promise was not noticed");
    }

    #[test]
    fn broken_promises_are_noticed() {
        let width = RefcountWidth::from_order(3).unwrap();
        check(move || count_fits(width, 256));
        check(|| handed_out(ClusterRun::one(0)));
        check(|| handed_out(ClusterRun::new(1, 0)));
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
    fn kept_promises_pass() {
        count_fits(RefcountWidth::from_order(3).unwrap(), 255);
        handed_out(ClusterRun::one(1));
        unseen(5, 7);
        ours_alone(false, true, false);
        is_header(b"QFI\xfb\0\0\0\x03");
        covers(&Run { len: 4, place: Place::Unallocated }, 4);
        beside(&[(0, 5), (20, 100)], 5..20, 100);
        table_words(HostOffset::new(8), 16);
    }
}
