//! Writeback that starts while a file still grows, so that the flush at the end has little left to wait for.
//!
//! The kernel starts by itself when much of the memory is dirty, or data is half a minute old. Until then the
//! device has nothing to do, and a flush behind a gigabyte of new data waits for all of it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes for which writeback is started at once.
const STEP: u64 = 8 << 20;

/// How far writeback of new data was started. The last bytes are left: they may be written to again, and what
/// precedes them can be allocated in one piece.
#[derive(Debug)]
pub(crate) struct Early {
    /// Host offset up to which nothing more has to be started.
    started: AtomicU64,
    /// Bytes written from `started` on.
    written: AtomicU64,
}

impl Early {
    /// For a file of `len` bytes: what it has already is not new.
    pub(crate) fn new(len: u64) -> Self {
        Self { started: AtomicU64::new(len), written: AtomicU64::new(0) }
    }

    /// Counts a write of `start..end`. Returns the offset of [`STEP`] bytes to start writeback for, if it is
    /// time, and if they are mostly data: with holes between small pieces the device is not what takes the
    /// time, and starting early would be work in the way of the writer.
    pub(crate) fn wrote(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        let started = self.started.load(Ordering::Relaxed);
        if start < started {
            return None;
        }
        let written = self.written.fetch_add(end - start, Ordering::Relaxed).wrapping_add(end - start);
        if end < started + 2 * STEP {
            return None;
        }
        // One of several threads goes on; the others have counted.
        let next = started + STEP;
        self.started.compare_exchange(started, next, Ordering::Relaxed, Ordering::Relaxed).ok()?;
        // Another thread may have halved the sum meanwhile.
        let halve = |sum: u64| Some(sum.saturating_sub(written / 2));
        let _ = self.written.fetch_update(Ordering::Relaxed, Ordering::Relaxed, halve);
        (written >= STEP).then_some((started, STEP))
    }

    /// The file has `len` bytes now.
    pub(crate) fn cut(&self, len: u64) {
        self.started.fetch_min(len, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes `piece` bytes of every `unit` from `from` to `to`; returns the ranges that are started.
    fn grow(early: &Early, (from, to): (u64, u64), (piece, unit): (u64, u64)) -> Vec<(u64, u64)> {
        let starts = (from..to).step_by(unit as usize);
        starts.filter_map(|start| early.wrote(start, start + piece)).collect()
    }

    #[test]
    fn dense_data_is_started_once_each_and_not_up_to_the_end() {
        for piece in [4096, 64 << 10, 1 << 20] {
            let early = Early::new(100);
            let started = grow(&early, (100, 100 + 10 * STEP), (piece, piece));
            let expected: Vec<_> = (0..9).map(|i| (100 + i * STEP, STEP)).collect();
            assert_eq!(started, expected, "{piece}");
        }
    }

    #[test]
    fn small_pieces_with_holes_between_them_are_left_to_the_flush() {
        assert_eq!(grow(&Early::new(0), (0, 10 * STEP), (4096, 64 << 10)), []);
        assert_eq!(grow(&Early::new(0), (0, 10 * STEP), (28 << 10, 64 << 10)), []);
        // Dense data behind sparse data is found.
        let early = Early::new(0);
        grow(&early, (0, 10 * STEP), (4096, 64 << 10));
        assert!(grow(&early, (10 * STEP, 20 * STEP), (64 << 10, 64 << 10)).len() >= 8);
    }

    #[test]
    fn what_the_file_had_already_is_not_started() {
        let early = Early::new(20 * STEP);
        assert_eq!(grow(&early, (0, 20 * STEP), (1 << 20, 1 << 20)), []);
        assert_eq!(grow(&early, (20 * STEP, 22 * STEP), (1 << 20, 1 << 20)), [(20 * STEP, STEP)]);
    }

    #[test]
    fn a_file_that_was_cut_starts_anew() {
        let early = Early::new(0);
        assert_eq!(grow(&early, (0, 4 * STEP), (1 << 20, 1 << 20)).len(), 3);
        early.cut(STEP);
        assert_eq!(grow(&early, (STEP, 3 * STEP), (1 << 20, 1 << 20)), [(STEP, STEP)]);
    }

    #[test]
    fn threads_start_each_range_once() {
        let early = Early::new(0);
        let write = |thread: u64| {
            let starts = (0..16 * STEP / (4 << 16)).map(|i| (i * 4 + thread) << 16);
            starts.filter_map(|start| early.wrote(start, start + (1 << 16))).collect::<Vec<_>>()
        };
        let mut started: Vec<_> = std::thread::scope(|scope| {
            let threads = [0, 1, 2, 3].map(|thread| scope.spawn(move || write(thread)));
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        started.sort_unstable();
        assert!(started.windows(2).all(|pair| pair[0].0 + STEP <= pair[1].0), "{started:?}");
    }
}
