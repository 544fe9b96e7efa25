//! How far a copy is. What counts is the data to be copied, piece by piece, as it does in qemu-img, where a
//! disk of nothing but holes is done from the start.

use crate::progress::Progress;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Bytes reported at once; fewer at the end of a run of data.
const PIECE: u64 = 2 << 20;

/// Tells a progress of data that is copied.
pub(crate) struct Pieces<'a> {
    progress: &'a dyn Progress,
    last: Mutex<LastRun>,
}

/// The run of data that was copied last.
#[derive(Default)]
struct LastRun {
    start: u64,
    end: u64,
    /// It was told of the run up to here.
    told: u64,
}

impl<'a> Pieces<'a> {
    pub(crate) fn new(progress: &'a dyn Progress) -> Self {
        Self { progress, last: Mutex::default() }
    }

    /// These bytes are copied. In guest order each piece is reported when it is whole; otherwise what
    /// follows a gap ends the run before it.
    pub(crate) fn copied(&self, data: &[Range<u64>]) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        for range in data {
            if range.start != last.end {
                self.tell(&mut last, u64::MAX);
                *last = LastRun { start: range.start, end: range.start, told: range.start };
            }
            last.end = range.end;
            self.tell(&mut last, PIECE);
        }
    }

    /// All is copied.
    pub(crate) fn end(&self) {
        self.tell(&mut self.last.lock().unwrap_or_else(PoisonError::into_inner), u64::MAX);
    }

    /// Reports what is whole of the run; `piece` is `u64::MAX` for all of it.
    fn tell(&self, last: &mut LastRun, piece: u64) {
        let rest = if piece == u64::MAX { 0 } else { (last.end - last.start) % piece };
        let whole = last.end - rest;
        if whole > last.told {
            self.progress.advance(whole - last.told);
            last.told = whole;
        }
    }
}

/// Adds a range to ranges in ascending order, joined with the one that it follows.
pub(crate) fn add(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Told(Mutex<Vec<u64>>);

    impl Progress for Told {
        fn set_total(&self, _: u64) {}

        fn advance(&self, bytes: u64) {
            self.0.lock().unwrap().push(bytes);
        }

        fn should_stop(&self) -> bool {
            false
        }
    }

    #[test]
    fn pieces_begin_where_their_run_does() {
        const MIB: u64 = 1 << 20;
        let told = Told::default();
        let pieces = Pieces::new(&told);
        // A run that is copied in three parts, and one after a gap.
        pieces.copied(&[MIB / 2..MIB]);
        pieces.copied(&[MIB..3 * MIB]);
        pieces.copied(&[3 * MIB..4 * MIB, 10 * MIB..11 * MIB]);
        assert_eq!(*told.0.lock().unwrap(), [2 * MIB, 3 * MIB / 2]);
        pieces.end();
        pieces.end();
        assert_eq!(*told.0.lock().unwrap(), [2 * MIB, 3 * MIB / 2, MIB]);
    }

    #[test]
    fn neighbours_are_joined() {
        let mut ranges = Vec::new();
        [0..1, 1..5, 6..7].into_iter().for_each(|range| add(&mut ranges, range));
        assert_eq!(ranges, [0..5, 6..7]);
    }
}
