//! Number of references to each host cluster, for one window of the file.

use qcow2_format::refcount::RefcountWidth;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Clusters per chunk, the unit of locking and of lazy allocation.
pub(super) const CHUNK: u64 = 1 << 16;

/// Counts that stop at the largest refcount of the image's width (at 2^32 - 1 with 64 bits). Any number of
/// workers may add at once.
pub(crate) struct Counters {
    window: Range<u64>,
    width: RefcountWidth,
    chunks: Vec<Mutex<Chunk>>,
}

/// The counts of [`CHUNK`] clusters.
pub(super) enum Chunk {
    /// All zero; no memory allocated.
    Empty,
    /// For refcount widths up to 16 bits.
    Narrow(Box<[u16]>),
    /// For larger widths.
    Wide(Box<[u32]>),
}

impl Counters {
    /// Memory per cluster in bytes.
    pub(super) fn bytes_per_cluster(width: RefcountWidth) -> u64 {
        if width.bits() <= 16 { 2 } else { 4 }
    }

    /// Counters at zero for the clusters of `window`, which must start at a multiple of [`CHUNK`].
    pub(super) fn new(window: Range<u64>, width: RefcountWidth) -> Self {
        let chunks = (window.end - window.start).div_ceil(CHUNK);
        Self { window, width, chunks: (0..chunks).map(|_| Mutex::new(Chunk::Empty)).collect() }
    }

    /// The clusters that are counted.
    pub(crate) fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Adds `times` to the counts of `clusters`, as far as they are in the window. A count that would exceed
    /// the largest refcount saturates, and `overflow` is called with the cluster and the excess.
    pub(super) fn add(&self, clusters: Range<u64>, times: u64, mut overflow: impl FnMut(u64, u64)) {
        let end = clusters.end.min(self.window.end);
        let mut at = clusters.start.max(self.window.start);
        let max = self.width.max().min(u32::MAX.into());
        while at < end {
            let (index, slot) = self.place(at);
            let len = (CHUNK - slot).min(end - at);
            let range = slot as usize..(slot + len) as usize;
            let mut report = |i: usize, excess| overflow(at + i as u64, excess);
            let mut chunk = self.lock(index);
            if let Chunk::Empty = *chunk {
                *chunk = self.fresh();
            }
            match &mut *chunk {
                Chunk::Empty => {}
                Chunk::Narrow(counts) => add_all(&mut counts[range], times, max, &mut report),
                Chunk::Wide(counts) => add_all(&mut counts[range], times, max, &mut report),
            }
            at += len;
        }
    }

    /// The count of `cluster`; 0 outside the window.
    pub(crate) fn count(&self, cluster: u64) -> u64 {
        if !self.window.contains(&cluster) {
            return 0;
        }
        let (index, slot) = self.place(cluster);
        self.lock(index).count(slot as usize)
    }

    /// Locks the chunk that holds `cluster`, which must be in the window. Also returns the cluster's slot in
    /// it.
    pub(super) fn chunk_of(&self, cluster: u64) -> (MutexGuard<'_, Chunk>, u64) {
        let (index, slot) = self.place(cluster);
        (self.lock(index), slot)
    }

    fn place(&self, cluster: u64) -> (usize, u64) {
        let at = cluster - self.window.start;
        ((at / CHUNK) as usize, at % CHUNK)
    }

    fn lock(&self, index: usize) -> MutexGuard<'_, Chunk> {
        // Every count is valid after each step, so the chunk of a worker that panicked is still consistent.
        self.chunks[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fresh(&self) -> Chunk {
        if Self::bytes_per_cluster(self.width) == 2 {
            Chunk::Narrow(vec![0; CHUNK as usize].into())
        } else {
            Chunk::Wide(vec![0; CHUNK as usize].into())
        }
    }
}

impl Chunk {
    /// The count in `slot`.
    pub(super) fn count(&self, slot: usize) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Narrow(counts) => counts[slot].into(),
            Self::Wide(counts) => counts[slot].into(),
        }
    }

    /// True if every count in `slots` equals `value`, 0 or 1.
    pub(super) fn all(&self, slots: Range<usize>, value: u8) -> bool {
        match self {
            Self::Empty => value == 0,
            Self::Narrow(counts) => counts[slots].iter().all(|&count| count == u16::from(value)),
            Self::Wide(counts) => counts[slots].iter().all(|&count| count == u32::from(value)),
        }
    }
}

/// An integer type for counts.
trait Count: Copy + Into<u64> + TryFrom<u64> {}
impl Count for u16 {}
impl Count for u32 {}

fn add_all<T: Count>(counts: &mut [T], times: u64, max: u64, overflow: &mut impl FnMut(usize, u64)) {
    for (index, count) in counts.iter_mut().enumerate() {
        let sum = (*count).into().saturating_add(times);
        // `max` fits the type: it is at most 2^16 - 1 for narrow counts and 2^32 - 1 for wide ones.
        *count = T::try_from(sum.min(max)).unwrap_or(*count);
        if sum > max {
            overflow(index, sum - max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn width(order: u32) -> RefcountWidth {
        RefcountWidth::from_order(order).unwrap()
    }

    #[test]
    fn counts_across_chunks_inside_the_window() {
        let counters = Counters::new(CHUNK..4 * CHUNK, width(4));
        counters.add(0..2 * CHUNK + 3, 2, |_, _| panic!("no overflow"));
        counters.add(2 * CHUNK..u64::MAX, 1, |_, _| panic!("no overflow"));
        let counts = [0, CHUNK - 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 2, 2 * CHUNK + 3, 4 * CHUNK - 1, 4 * CHUNK]
            .map(|cluster| counters.count(cluster));
        assert_eq!(counts, [0, 0, 2, 3, 3, 1, 1, 0]);
        let (chunk, slot) = counters.chunk_of(2 * CHUNK + 3);
        assert!(slot == 3 && chunk.all(3..CHUNK as usize, 1) && !chunk.all(2..4, 1));
    }

    #[test]
    fn saturates_at_the_largest_refcount() {
        for order in 0..=6 {
            let max = width(order).max().min(u32::MAX.into());
            let counters = Counters::new(0..1, width(order));
            let mut seen = Vec::new();
            counters.add(0..1, max, |cluster, excess| seen.push((cluster, excess)));
            counters.add(0..1, 3, |cluster, excess| seen.push((cluster, excess)));
            assert_eq!((counters.count(0), seen), (max, vec![(0, 3)]), "order {order}");
        }
    }

    #[test]
    fn untouched_chunks_are_not_allocated() {
        let counters = Counters::new(0..1 << 31, width(6));
        counters.add(5..6, 1, |_, _| ());
        let used = counters.chunks.iter().filter(|c| !matches!(*c.lock().unwrap(), Chunk::Empty)).count();
        assert_eq!(used, 1);
    }
}
