//! The kept answers: sorted runs of pieces of the guest disk, in a log of bounded size.
//!
//! Invariant: a reader uses no word that may have been overwritten. It takes no lock and writes nothing: it
//! loads the words first and then `oldest`; the writer raises `oldest` before it reuses a segment. So whoever
//! has seen a new word sees the new `oldest` too.

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, OnceLock, Rank, lock};
use ::alloc::boxed::Box;

/// The largest segment in words. Origin: ours; the most runs of a piece, and what is dropped at a time.
const MAX_SEGMENT: u64 = 8 << 10;
/// The most cells of a piece: its number has 16 bits in a run.
const MAX_CELLS_BITS: u32 = 16;
/// One of so many misses fills a piece if that drops others: filling costs as much as many reads without it.
const SAMPLE: u64 = 16;
/// The largest disk that is indexed: sums of offsets in it do not overflow.
const MAX_SIZE: u64 = 1 << 62;
const START_SHIFT: u32 = 48;
const LAYER_SHIFT: u32 = 32;

/// What a cell answers: 16 bits for the layer, 32 for the host offset in units of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer(u64);

/// An [`Answer`] to its reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Zeroes in a layer.
    Zero { layer: usize },
    /// In no layer: this one is the last that is long enough, or the last of all. Reads as zeroes.
    Nothing { layer: usize },
    /// Uncompressed in a layer, at a host offset.
    Data { layer: usize, host: u64 },
    /// No layer above this one has it. This one has it in a way that is not kept here, or cannot say. Behind
    /// the merged layers it is the disk below them.
    From { layer: usize },
}

impl Found {
    /// The layer; those above it have nothing.
    pub(crate) fn layer(self) -> usize {
        match self {
            Self::Zero { layer }
            | Self::Nothing { layer }
            | Self::Data { layer, .. }
            | Self::From { layer } => layer,
        }
    }
}

impl Answer {
    /// Not known yet; never part of a run.
    pub(crate) const OPEN: Self = Self(u64::MAX);
    /// Layers that can be told from each other.
    pub(crate) const MAX_LAYERS: usize = 0xf000;
    const FROM: u64 = u32::MAX as u64;
    const ZERO: u64 = Self::FROM - 1;
    const NOTHING: u64 = Self::FROM - 2;

    fn new(layer: usize, what: u64) -> Self {
        debug_assert!(layer <= Self::MAX_LAYERS, "layer {layer} has no number");
        Self((layer as u64) << LAYER_SHIFT | what)
    }

    /// The answer of `layer` itself is to be asked for.
    pub(crate) fn from(layer: usize) -> Self {
        Self::new(layer, Self::FROM)
    }

    /// Zeroes in `layer`.
    pub(crate) fn zero(layer: usize) -> Self {
        Self::new(layer, Self::ZERO)
    }

    /// Nothing down to `layer`, and nothing below it can be seen.
    pub(crate) fn nothing(layer: usize) -> Self {
        Self::new(layer, Self::NOTHING)
    }

    /// At `host`, in units of a cell. A host offset too large for an answer is asked for again.
    pub(crate) fn data(layer: usize, host: u64) -> Self {
        if host < Self::NOTHING { Self::new(layer, host) } else { Self::from(layer) }
    }

    fn is_data(self) -> bool {
        self.host() < Self::NOTHING
    }

    fn layer(self) -> usize {
        (self.0 >> LAYER_SHIFT) as usize
    }

    fn host(self) -> u64 {
        self.0 & u64::from(u32::MAX)
    }

    /// True if `next`, `cells` further, belongs to the same run.
    pub(crate) fn continues(self, cells: u64, next: Self) -> bool {
        if !self.is_data() {
            return self == next;
        }
        next.is_data() && self.layer() == next.layer() && self.host() + cells == next.host()
    }

    /// The word of a run that starts at cell `start` with this answer.
    pub(crate) fn run(self, start: u64) -> u64 {
        debug_assert!(start < 1 << MAX_CELLS_BITS && self != Self::OPEN, "a run of {self:?} at cell {start}");
        start << START_SHIFT | self.0
    }

    /// What it tells of the byte `skipped` bytes behind the start of its run.
    fn found(self, skipped: u64, cell_bits: u32) -> Found {
        let layer = self.layer();
        match self.host() {
            Self::FROM => Found::From { layer },
            Self::ZERO => Found::Zero { layer },
            Self::NOTHING => Found::Nothing { layer },
            host => Found::Data { layer, host: (host << cell_bits) + skipped },
        }
    }
}

/// How the guest disk is divided: into pieces, which are filled and dropped as a whole, of cells, each of
/// which has one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) cell_bits: u32,
    pub(crate) piece_bits: u32,
    /// Pieces of the disk.
    pub(crate) pieces: u64,
}

impl Shape {
    /// For a disk of `size` bytes. `cell_bits`: log2 of the smallest unit that any layer maps. `extended`:
    /// some layer has subclusters. Pieces are such that one of them costs little to fill, and longer if there
    /// were more than `most` of them otherwise.
    fn new(size: u64, cell_bits: u32, extended: bool, most: u64) -> Self {
        let mut piece_bits = cell_bits + if extended { 13 } else { 10 };
        while (size.saturating_sub(1) >> piece_bits) >= most && piece_bits < cell_bits + MAX_CELLS_BITS {
            piece_bits += 1;
        }
        Self { cell_bits, piece_bits, pieces: (size.saturating_sub(1) >> piece_bits) + 1 }
    }

    /// Cells of a piece.
    pub(crate) fn cells(&self) -> u64 {
        1 << (self.piece_bits - self.cell_bits)
    }

    pub(crate) fn piece(&self, offset: u64) -> u64 {
        offset >> self.piece_bits
    }

    /// Guest offset of the first byte of `piece`.
    pub(crate) fn start(&self, piece: u64) -> u64 {
        piece << self.piece_bits
    }

    /// Bytes from `offset` to the end of its piece.
    pub(crate) fn left(&self, offset: u64) -> u64 {
        (1 << self.piece_bits) - (offset & ((1 << self.piece_bits) - 1))
    }
}

/// An answer, and for how many bytes from the place on that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Hit {
    pub(crate) found: Found,
    pub(crate) len: u64,
}

/// Pieces whose answers are known.
pub(crate) struct Index {
    shape: Shape,
    /// For each piece, or some that share a slot: 0, or where in the log its words start.
    slots: Box<[AtomicU64]>,
    /// The log. Segments are numbered without end; number `n` has its words in `n` modulo their count.
    segments: Box<[OnceLock<Box<[AtomicU64]>>]>,
    segment_words: usize,
    /// The first segment whose words have not been overwritten.
    oldest: AtomicU64,
    end: Mutex<End>,
    misses: AtomicU64,
}

/// The end of the log.
struct End {
    segment: u64,
    at: usize,
}

impl Index {
    /// An index of about `budget` bytes at most, which it takes as pieces are filled. `None` if that is too
    /// little for anything, or the disk too large. Otherwise as [`Shape`] describes.
    pub(crate) fn new(size: u64, cell_bits: u32, extended: bool, budget: u64) -> Option<Self> {
        if size > MAX_SIZE {
            return None;
        }
        // A quarter for the slots at most.
        let most_slots = (budget / 32).checked_ilog2().map(|bits| 1 << bits)?;
        let shape = Shape::new(size, cell_bits, extended, most_slots);
        let slots = shape.pieces.min(most_slots).next_power_of_two();
        let words = budget / 8 - slots;
        let needed = shape.pieces.saturating_mul(shape.cells() + 1);
        let segment = (1 << (words / 4).checked_ilog2()?).min(MAX_SEGMENT);
        let segment: u64 = segment.min(needed.checked_next_power_of_two().unwrap_or(segment));
        let segments = (words / segment).min(needed.div_ceil(segment) + 1);
        Some(Self {
            shape,
            slots: (0..slots).map(|_| AtomicU64::new(0)).collect(),
            segments: (0..segments).map(|_| OnceLock::new()).collect(),
            segment_words: segment as usize,
            oldest: AtomicU64::new(0),
            end: Mutex::new(Rank::IndexEnd, End { segment: 0, at: 0 }),
            misses: AtomicU64::new(0),
        })
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// True if all pieces fit however many runs they have.
    pub(crate) fn is_ample(&self) -> bool {
        let words = (self.segments.len() - 1) as u64 * self.segment_words as u64;
        self.shape.pieces.saturating_mul(self.shape.cells() + 1) <= words
    }

    /// The most runs of a piece.
    pub(crate) fn most_runs(&self) -> usize {
        self.segment_words - 1
    }

    /// Bytes in use.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        let segments = self.segments.iter().filter(|segment| segment.get().is_some()).count();
        8 * (self.slots.len() + segments * self.segment_words)
    }

    fn slot(&self, piece: u64) -> &AtomicU64 {
        &self.slots[piece as usize & (self.slots.len() - 1)]
    }

    /// The answer at guest offset `offset`, if it is known.
    #[inline]
    pub(crate) fn find(&self, offset: u64) -> Option<Hit> {
        let piece = self.shape.piece(offset);
        let slot = self.slot(piece).load(Ordering::Acquire);
        let segment = (slot >> 16).checked_sub(1)?;
        let words = self.segments[(segment % self.segments.len() as u64) as usize].get()?;
        let at = (slot & 0xffff) as usize;
        let header = words.get(at)?.load(Ordering::Acquire);
        if header >> 16 != piece {
            return None;
        }
        let runs = words.get(at + 1..at + 1 + (header & 0xffff) as usize)?;
        let inside = offset & ((1 << self.shape.piece_bits) - 1);
        let cell = inside >> self.shape.cell_bits;
        let after = first_after(runs, cell, self.shape.piece_bits - self.shape.cell_bits);
        let run = runs.get(after.checked_sub(1)?)?.load(Ordering::Acquire);
        let end =
            runs.get(after).map_or(self.shape.cells(), |run| run.load(Ordering::Acquire) >> START_SHIFT);
        // Last: until here the words may have been those of another piece, by halves.
        if self.oldest.load(Ordering::Acquire) > segment {
            return None;
        }
        let skipped = inside - ((run >> START_SHIFT) << self.shape.cell_bits);
        let found = Answer(run & ((1 << START_SHIFT) - 1)).found(skipped, self.shape.cell_bits);
        Some(Hit { found, len: (end << self.shape.cell_bits) - inside })
    }

    /// True if `piece`, which is not known, is worth filling now: always while there is room, else one time
    /// of many.
    pub(crate) fn admits(&self, piece: u64) -> bool {
        let oldest = self.oldest.load(Ordering::Relaxed);
        let slot = self.slot(piece).load(Ordering::Relaxed);
        if oldest == 0 && slot == 0 {
            return true;
        }
        self.misses.fetch_add(1, Ordering::Relaxed).is_multiple_of(SAMPLE)
    }

    /// Keeps `runs`, all of `piece`: at least one, in ascending order, the first of which starts at cell 0.
    /// More than [`most_runs`](Self::most_runs) are not kept.
    pub(crate) fn insert(&self, piece: u64, runs: &[u64]) {
        debug_assert!(runs.first().is_some_and(|run| run >> START_SHIFT == 0), "a piece without a start");
        debug_assert!(runs.is_sorted_by(|a, b| a >> START_SHIFT < b >> START_SHIFT), "runs out of order");
        if runs.is_empty() || runs.len() > self.most_runs() {
            return;
        }
        let mut end = lock(&self.end);
        if end.at + 1 + runs.len() > self.segment_words {
            *end = End { segment: end.segment + 1, at: 0 };
            let count = self.segments.len() as u64;
            // Before the words: whoever sees a new word sees this too.
            self.oldest.store((end.segment + 1).saturating_sub(count), Ordering::Release);
        }
        let segment = &self.segments[(end.segment % self.segments.len() as u64) as usize];
        let words = segment.get_or_init(|| (0..self.segment_words).map(|_| AtomicU64::new(0)).collect());
        words[end.at].store(piece << 16 | runs.len() as u64, Ordering::Release);
        for (word, run) in words[end.at + 1..].iter().zip(runs) {
            word.store(*run, Ordering::Release);
        }
        self.slot(piece).store((end.segment + 1) << 16 | end.at as u64, Ordering::Release);
        end.at += 1 + runs.len();
    }
}

/// Index of the first of `runs` that starts after `cell`, of 2^`cells_bits` cells. Looks first where it would
/// be if all runs were equally long, and then in steps that double: in a scattered piece that is a few steps
/// where halving takes ten.
#[inline]
fn first_after(runs: &[AtomicU64], cell: u64, cells_bits: u32) -> usize {
    let is_after = |index: usize| runs[index].load(Ordering::Acquire) >> START_SHIFT > cell;
    let guess = ((cell * runs.len() as u64) >> cells_bits) as usize;
    let (mut low, mut high, mut step) = (0, runs.len(), 1);
    // All below `low` start at the cell or before, and those from `high` on after it.
    if guess < high && is_after(guess) {
        high = guess;
        while let Some(at) = guess.checked_sub(step) {
            if !is_after(at) {
                low = at + 1;
                break;
            }
            (high, step) = (at, step * 2);
        }
    } else {
        low = (guess + 1).min(high);
        while guess + step < high {
            let at = guess + step;
            if is_after(at) {
                high = at;
                break;
            }
            (low, step) = (at + 1, step * 2);
        }
    }
    low + runs[low..high].partition_point(|run| run.load(Ordering::Acquire) >> START_SHIFT <= cell)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::alloc::vec::Vec;

    fn index(size: u64, budget: u64) -> Index {
        Index::new(size, 16, false, budget).unwrap()
    }

    #[test]
    fn an_answer_is_found_in_the_middle_of_its_run() {
        let index = index(1 << 30, 1 << 20);
        assert_eq!((index.shape.piece_bits, index.shape.pieces), (26, 16));
        assert_eq!(index.find(5 << 26), None);
        let runs = [
            Answer::data(3, 7).run(0),
            Answer::zero(9).run(10),
            Answer::from(2).run(11),
            Answer::nothing(12).run(12),
        ];
        index.insert(5, &runs);
        let at = |cell: u64, byte: u64| index.find((5 << 26) + (cell << 16) + byte).unwrap();
        let data = |host| Found::Data { layer: 3, host };
        assert_eq!(at(0, 0), Hit { found: data(7 << 16), len: 10 << 16 });
        assert_eq!(at(9, 5), Hit { found: data((16 << 16) + 5), len: (1 << 16) - 5 });
        assert_eq!(at(10, 1), Hit { found: Found::Zero { layer: 9 }, len: (1 << 16) - 1 });
        assert_eq!(at(11, 0), Hit { found: Found::From { layer: 2 }, len: 1 << 16 });
        assert_eq!(at(1023, 0), Hit { found: Found::Nothing { layer: 12 }, len: 1 << 16 });
        assert_eq!(index.find(6 << 26), None);
    }

    #[test]
    fn the_first_run_after_a_cell_is_found_however_long_the_runs_are() {
        for starts in [
            (0..1024).collect::<Vec<u64>>(),
            Vec::from([0]),
            (0..100).chain([1023]).collect(),
            [0].into_iter().chain(900..1024).collect(),
            (0..32).map(|i| i * i).collect(),
        ] {
            let runs: Vec<AtomicU64> =
                starts.iter().map(|start| AtomicU64::new(Answer::zero(0).run(*start))).collect();
            for cell in 0..1024 {
                let wanted = starts.partition_point(|start| *start <= cell);
                assert_eq!(first_after(&runs, cell, 10), wanted, "cell {cell} of {starts:?}");
            }
        }
    }

    #[test]
    fn a_run_goes_on_with_the_next_host_offset_of_the_same_layer() {
        let data = Answer::data(1, 4);
        assert!(data.continues(3, Answer::data(1, 7)));
        assert!(!data.continues(3, Answer::data(1, 8)) && !data.continues(3, Answer::data(2, 7)));
        assert!(!data.continues(1, Answer::zero(1)) && Answer::zero(1).continues(9, Answer::zero(1)));
        // The last host offset that an answer can have is followed by one that it cannot.
        let last = Answer::data(1, Answer::NOTHING - 1);
        assert_eq!(Answer::data(1, Answer::NOTHING), Answer::from(1));
        assert!(!last.continues(1, Answer::nothing(1)) && !last.continues(4, Answer::data(2, 0)));
        assert!(Answer::from(1).continues(5, Answer::from(1)));
    }

    #[test]
    fn a_full_log_drops_the_oldest_pieces_and_stays_within_its_budget() {
        let (budget, size) = (16 << 10, 1 << 40);
        let index = index(size, budget);
        assert!(!index.is_ample() && index.shape.pieces > 100);
        let runs: Vec<u64> = (0..50).map(|start| Answer::data(0, start * 3).run(start)).collect();
        for piece in 0..100 {
            index.insert(piece, &runs);
            let hit = index.find(index.shape.start(piece)).unwrap();
            assert_eq!(hit.found, Found::Data { layer: 0, host: 0 });
        }
        assert!(index.bytes() as u64 <= budget, "{} bytes", index.bytes());
        assert_eq!(index.find(0), None);
        let filled = (0..64).filter(|_| index.admits(3)).count();
        assert_eq!(filled as u64, 64 / SAMPLE);
        let known = (0..100).filter(|piece| index.find(index.shape.start(*piece)).is_some()).count();
        assert!(known >= 20, "{known}");
    }

    #[test]
    fn a_large_disk_has_long_pieces_and_a_small_budget_none() {
        let pieces = |size| index(size, 512 << 10).shape.pieces;
        assert_eq!((pieces(1), pieces(1 << 40), pieces(1 << 46)), (1, 1 << 14, 1 << 14));
        assert!(Index::new(1 << 30, 16, false, 0).is_none() && Index::new(1 << 30, 16, false, 31).is_none());
        for budget in [32, 100, 1000, 4096] {
            if let Some(index) = Index::new(MAX_SIZE, 9, true, budget) {
                index.insert(7, &[Answer::zero(0).run(0)]);
                assert!(index.bytes() as u64 <= budget, "{} bytes of {budget}", index.bytes());
            }
        }
    }

    /// Readers of pieces that are dropped all the time find the piece that they ask for or none.
    #[test]
    #[cfg(not(feature = "unstable-shuttle"))]
    fn readers_never_see_half_of_a_piece() {
        let index = index(1 << 36, 8 << 10);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for first in 0..2 {
                let (index, done) = (&index, &done);
                scope.spawn(move || {
                    let mut number = first;
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        number += 7;
                        let piece = number % 64;
                        let Some(hit) = index.find(index.shape.start(piece) + (40 << 16)) else { continue };
                        let host = (piece * 1000 + 40) << 16;
                        assert_eq!(hit.found, Found::Data { layer: piece as usize, host });
                    }
                });
            }
            for round in 0..20_000u64 {
                let piece = round * 5 % 64;
                let runs: Vec<u64> = [0, 1 + piece % 30]
                    .map(|at| Answer::data(piece as usize, piece * 1000 + at).run(at))
                    .into();
                index.insert(piece, &runs);
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
