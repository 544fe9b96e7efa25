//! Clusters of a compressed target are written whole, so where the source is unallocated for less than that
//! it is copied. Which clusters these are is qemu-img's choice: so both leave the same ones to the target's
//! backing file, whatever that holds.

use crate::source::{Content, Run, SECTOR, Source};
use qcow2_core::GuestDisk;
use std::ops::Range;

/// The bytes of a compressed target that are copied although the top layer of the (single) `source` does not
/// allocate them: its clusters that the backing file of `target` ends in and that the source ends in, and all
/// of them if the source cannot tell of that much at once. In ascending order.
pub(crate) fn copied_anyway(source: &Source, target: &dyn GuestDisk) -> Vec<Range<u64>> {
    let (size, unit) = (source.size(), target.cluster_size().max(SECTOR));
    if source.longest_unallocated().is_some_and(|longest| longest < unit) {
        return std::iter::once(0..size).collect();
    }
    let backing_end = target.backing().and_then(|backing| backing.size().checked_next_multiple_of(SECTOR));
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for end in [backing_end.filter(|end| *end < size), Some(size)].into_iter().flatten() {
        let start = end - end % unit;
        let cluster = start..start.saturating_add(unit).min(size);
        if start < end && ranges.last() != Some(&cluster) {
            ranges.push(cluster);
        }
    }
    ranges
}

/// `run` up to the first of the ranges in `anyway`, if it is backed; data inside of one.
pub(crate) fn before(run: Run, anyway: &[Range<u64>]) -> Run {
    let Some(next) = anyway.iter().find(|range| range.end > run.start) else { return run };
    match run.content {
        Content::Backing if next.start <= run.start => {
            Run { len: next.end.min(run.end()) - run.start, content: Content::Data, ..run }
        }
        Content::Backing => Run { len: next.start.min(run.end()) - run.start, ..run },
        _ => run,
    }
}

/// `runs` with those that stay backed reduced to whole clusters of `unit` bytes outside of `anyway`, the last
/// one of which may end at `end`; what is cut off of them is data.
pub(crate) fn whole_clusters(runs: &[Run], end: u64, unit: u64, anyway: &[Range<u64>]) -> Vec<Run> {
    let mut wide: Vec<Run> = Vec::with_capacity(runs.len() * 3);
    let mut push = |start: u64, end: u64, content| match wide.last_mut() {
        _ if start >= end => {}
        Some(last) if last.content == content => last.len += end - start,
        _ => wide.push(Run { start, len: end - start, content }),
    };
    for run in runs {
        if run.content != Content::Backing {
            push(run.start, run.end(), run.content);
            continue;
        }
        let first = run.start.next_multiple_of(unit).min(run.end());
        let last = if run.end() == end { end } else { (run.end() - run.end() % unit).max(first) };
        push(run.start, first, Content::Data);
        let mut at = first;
        while at < last {
            let piece = before(Run { start: at, len: last - at, content: Content::Backing }, anyway);
            push(at, piece.end(), piece.content);
            at = piece.end();
        }
        push(last, run.end(), Content::Data);
    }
    wide
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDisk;
    use std::sync::Arc;

    #[test]
    fn the_cluster_that_an_end_is_in_is_copied() {
        let check = |size: u64, backing: u64, expected: &[(u64, u64)]| {
            let source: Arc<dyn GuestDisk> = Arc::new(TestDisk::empty(size, 512));
            let backing = Arc::new(TestDisk::empty(backing, 512));
            let target = TestDisk::empty(size, 4096).with_backing(&backing);
            let source = Source::new(std::slice::from_ref(&source)).unwrap();
            let found = copied_anyway(&source, &target).into_iter().map(|range| (range.start, range.end));
            assert_eq!(found.collect::<Vec<_>>(), expected, "{size} over {}", backing.size());
        };
        check(16_384, 16_384, &[]);
        check(16_384, 4096, &[]);
        // Rounded up to a sector it ends with a cluster.
        check(16_384, 4095, &[]);
        check(16_384, 4097, &[(4096, 8192)]);
        check(16_384, 1, &[(0, 4096)]);
        check(16_384, 20_000, &[]);
        check(12_800, 20_000, &[(12_288, 12_800)]);
        check(12_800, 12_300, &[(12_288, 12_800)]);
        check(12_800, 5000, &[(4096, 8192), (12_288, 12_800)]);
    }

    #[test]
    fn unallocated_runs_lose_what_is_copied() {
        let run = |start, end: u64, content| Run { start, len: end - start, content };
        let runs = [run(0, 100, Content::Data), run(100, 1000, Content::Backing)];
        let expected = |runs: &[(u64, u64, Content)]| -> Vec<Run> {
            runs.iter().map(|(start, end, content)| run(*start, *end, *content)).collect()
        };
        let whole = |anyway: &[Range<u64>]| whole_clusters(&runs, 1000, 64, anyway);
        let (data, backing) = (Content::Data, Content::Backing);
        assert_eq!(whole(&[]), expected(&[(0, 128, data), (128, 1000, backing)]));
        assert_eq!(
            whole(&[256..320, 960..1000]),
            expected(&[
                (0, 128, data),
                (128, 256, backing),
                (256, 320, data),
                (320, 960, backing),
                (960, 1000, data)
            ])
        );
        assert_eq!(
            whole(std::slice::from_ref(&(64..128))),
            expected(&[(0, 128, data), (128, 1000, backing)])
        );
        assert_eq!(whole(std::slice::from_ref(&(0..1000))), expected(&[(0, 1000, data)]));
    }
}
