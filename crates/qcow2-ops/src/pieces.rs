//! How far a copy is. What counts is the data to be copied, piece by piece, as it does in qemu-img, where a
//! disk of nothing but holes is done from the start.

use crate::copy::CopyPlan;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::source::{Content, Run, SECTOR};
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

impl CopyPlan<'_> {
    /// Bytes of the source that are read, as far as its tables and holes show.
    pub(crate) fn data_to_copy(&self, progress: &dyn Progress) -> Result<u64> {
        let (mut at, mut total, end) = (0, 0, self.source.size());
        while at < end {
            self.check_stop(at, progress)?;
            let run = match self.joined_at(at, end - at) {
                Err(_) if self.salvage => self.cluster_at(at, end),
                run => run?,
            };
            total += if self.is_read(&run) { run.len } else { 0 };
            at = run.end();
        }
        Ok(total)
    }

    /// The run at `at`, joined with those behind it unless zeroes are copied like data.
    pub(crate) fn joined_at(&self, at: u64, len: u64) -> Result<Run> {
        match self.sparse_size {
            0 => self.source.content_at(at, len, self.below),
            _ => self.source.joined_at(at, len, self.below),
        }
    }

    pub(crate) fn is_read(&self, run: &Run) -> bool {
        match run.content {
            Content::Data => true,
            Content::Zero => self.sparse_size == 0,
            Content::Backing => false,
        }
    }

    /// The rest of the cluster at `at`, of which the tables do not tell where it is.
    pub(crate) fn cluster_at(&self, at: u64, end: u64) -> Run {
        let unit = self.source.cluster_size().max(SECTOR);
        let end = (at - at % unit).saturating_add(unit).min(end);
        Run { start: at, len: end - at, content: Content::Data }
    }

    /// Errors: `Stopped`, if `progress` wants that.
    pub(crate) fn check_stop(&self, at: u64, progress: &dyn Progress) -> Result<()> {
        let end = self.source.size();
        match progress.should_stop() {
            true => Err(Error::new(ErrorKind::Stopped, format!("stopped at byte {at} of {end}"))),
            false => Ok(()),
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
        [MIB / 2..MIB, MIB..3 * MIB].iter().for_each(|range| pieces.copied(std::slice::from_ref(range)));
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
