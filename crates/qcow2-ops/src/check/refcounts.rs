//! The refcounts on disk: a bitmap of those that are exactly one, and the comparison with the references.

use super::Shared;
use super::collect::{Key, Phase};
use super::counters::{CHUNK, Counters};
use super::finding::Finding;
use crate::error::Result;
use qcow2_core::HostOffset;
use qcow2_core::walk::{PIECE_SIZE, Walk};
use qcow2_format::refcount::{RefcountWidth, decode_table_entry};
use qcow2_format::{bytes, limit};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// A decoded refcount table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    /// No block: all refcounts are 0.
    None,
    /// Host offset of a block. It may be past the end of the file, where it reads as zeroes.
    At(HostOffset),
    /// Not a valid offset.
    Unreadable,
}

/// The refcount table, and for one window of clusters a bitmap of the refcounts that are exactly one.
pub(super) struct Stored<'a> {
    walk: &'a Walk<'a>,
    table: &'a [u64],
    window: Range<u64>,
    /// One bit per cluster of the window: its refcount is one.
    ones: Vec<AtomicU64>,
}

/// Summary of the refcounts of a run of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ones {
    /// All are exactly one.
    All,
    /// None is exactly one.
    None,
    /// Some are, or some clusters are outside the window.
    Mixed,
}

impl<'a> Stored<'a> {
    /// Nothing is loaded yet. `window` must start at a multiple of the refcounts per block.
    pub(super) fn new(walk: &'a Walk<'a>, table: &'a [u64], window: Range<u64>) -> Self {
        let words = (window.end - window.start).div_ceil(64);
        Self { walk, table, window, ones: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    fn width(&self) -> RefcountWidth {
        self.walk.geometry().refcount_width()
    }

    fn block(&self, index: u64) -> Block {
        let raw = usize::try_from(index).ok().and_then(|i| self.table.get(i)).copied().unwrap_or(0);
        match decode_table_entry(raw, self.walk.geometry()) {
            Ok(None) => Block::None,
            Ok(Some(offset)) if offset.value() <= limit::MAX_FILE_OFFSET => Block::At(offset),
            _ => Block::Unreadable,
        }
    }

    /// The refcount table indexes whose blocks cover the window.
    fn indexes(&self) -> Range<u64> {
        let per = self.walk.geometry().refcount_block_entries();
        self.window.start / per..self.window.end.div_ceil(per)
    }

    /// Reads all blocks of the window with all workers and fills the bitmap.
    pub(super) fn load(&self, shared: &Shared<'_>) -> Result<()> {
        let indexes = self.indexes();
        // There are no blocks past the end of the table.
        let end = indexes.end.min(self.table.len() as u64);
        let size = self.walk.geometry().cluster_size();
        let step = (PIECE_SIZE / size).max(1);
        shared.in_pieces(indexes.start..end, step, |range, buffer| {
            shared.advance((range.end - range.start) * size);
            self.read_blocks(range, buffer, |index, block| {
                if let Some(block) = block {
                    self.note_ones(index, block);
                }
            })
        })
    }

    /// Calls `visit` with the bytes of each block in `range`; adjacent blocks are read together. `None` for a
    /// missing or unreadable block.
    fn read_blocks(
        &self,
        range: Range<u64>,
        buffer: &mut Vec<u8>,
        mut visit: impl FnMut(u64, Option<&[u8]>),
    ) -> Result<()> {
        let size = self.walk.geometry().cluster_size();
        let mut index = range.start;
        while index < range.end {
            let Block::At(first) = self.block(index) else {
                visit(index, None);
                index += 1;
                continue;
            };
            let follows =
                |n: u64| first.checked_add(n * size).is_some_and(|at| self.block(index + n) == Block::At(at));
            let count = (1..range.end - index).take_while(|&n| follows(n)).count() as u64 + 1;
            buffer.resize((count * size) as usize, 0);
            self.walk.read(first, buffer).map_err(super::metadata_error)?;
            for (n, block) in (index..).zip(buffer.chunks_exact(size as usize)) {
                visit(n, Some(block));
            }
            index += count;
        }
        Ok(())
    }

    fn note_ones(&self, index: u64, block: &[u8]) {
        let width = self.width();
        let per = self.walk.geometry().refcount_block_entries();
        let per_word = 64 >> width.order();
        let pattern = all_ones(width);
        // A block holds a multiple of 64 refcounts, and the window starts at a multiple of 64.
        let base = (index * per).saturating_sub(self.window.start) / 64;
        for (at, group) in (base as usize..).zip(block.chunks_exact(8 << width.order())) {
            let Some(ones) = self.ones.get(at) else { break };
            let mut bits = 0u64;
            for (n, word) in bytes::words(group).enumerate() {
                let found = match word {
                    0 => continue,
                    word if word == pattern => u64::MAX >> (64 - per_word),
                    word => (0..per_word).map(|s| u64::from(width.extract(word, s) == 1) << s).sum(),
                };
                bits |= found << (n as u64 * per_word);
            }
            ones.store(bits, Ordering::Relaxed);
        }
    }

    /// Summary of `clusters`, which must not be empty.
    pub(super) fn ones(&self, clusters: Range<u64>) -> Ones {
        if clusters.start < self.window.start || clusters.end > self.window.end {
            return Ones::Mixed;
        }
        let (mut at, end) = (clusters.start - self.window.start, clusters.end - self.window.start);
        let mut seen = None;
        while at < end {
            let len = (64 - at % 64).min(end - at);
            let mask = (u64::MAX >> (64 - len)) << (at % 64);
            let bits = self.ones[(at / 64) as usize].load(Ordering::Relaxed) & mask;
            let found = match bits {
                0 => Ones::None,
                bits if bits == mask => Ones::All,
                _ => return Ones::Mixed,
            };
            if seen.is_some_and(|s| s != found) {
                return Ones::Mixed;
            }
            seen = Some(found);
            at += len;
        }
        seen.unwrap_or(Ones::Mixed)
    }

    /// The refcount of any cluster, read from disk again; `None` if it cannot be read.
    pub(super) fn refcount(&self, cluster: u64) -> Result<Option<u64>> {
        let geometry = self.walk.geometry();
        let per = geometry.refcount_block_entries();
        let offset = match self.block(cluster / per) {
            Block::None => return Ok(Some(0)),
            Block::Unreadable => return Ok(None),
            Block::At(offset) => offset,
        };
        let slot = cluster % per;
        let mut word = [0; 8];
        let at = offset.checked_add(self.width().word_index(slot) as u64 * 8);
        let Some(at) = at else { return Ok(None) };
        self.walk.read(at, &mut word).map_err(super::metadata_error)?;
        Ok(Some(self.width().extract(u64::from_be_bytes(word), slot)))
    }

    /// Compares the window's refcounts with the references. `clusters`: number of clusters in the file; past
    /// them only clusters with references are compared. Returns the end (exclusive) of the clusters that have
    /// a refcount or a reference.
    pub(super) fn compare(&self, shared: &Shared<'_>, counters: &Counters, clusters: u64) -> Result<u64> {
        let per = self.walk.geometry().refcount_block_entries();
        let size = self.walk.geometry().cluster_size();
        let step = (PIECE_SIZE / size).max(1).max(CHUNK / per);
        let used_end = AtomicU64::new(0);
        shared.in_pieces(self.indexes(), step, |range, buffer| {
            shared.advance((range.end - range.start) * size);
            let mut end = 0;
            self.read_blocks(range, buffer, |index, block| {
                let first = index * per;
                let last = (first + per).min(self.window.end);
                let readable = block.is_some() || self.block(index) == Block::None;
                let comparison = Comparison { shared, counters, clusters, width: self.width() };
                end = end.max(if readable {
                    comparison.block(first..last, block.unwrap_or_default())
                } else {
                    comparison.unreadable(first..last)
                });
            })?;
            used_end.fetch_max(end, Ordering::Relaxed);
            Ok(())
        })?;
        Ok(used_end.into_inner())
    }
}

/// A word of refcounts that are all one.
fn all_ones(width: RefcountWidth) -> u64 {
    u64::MAX / width.max()
}

struct Comparison<'a> {
    shared: &'a Shared<'a>,
    counters: &'a Counters,
    clusters: u64,
    width: RefcountWidth,
}

impl Comparison<'_> {
    /// Compares the refcounts of `clusters` in `block` (empty: all 0). Returns the end (exclusive) of the
    /// used ones.
    fn block(&self, clusters: Range<u64>, block: &[u8]) -> u64 {
        let mut used_end = 0;
        let mut at = clusters.start;
        while at < clusters.end {
            let (chunk, slot) = self.counters.chunk_of(at);
            let len = (CHUNK - slot).min(clusters.end - at);
            let mut done = 0;
            while done < len {
                let first = at + done - clusters.start;
                let per_word = 64u64 >> self.width.order();
                let n = per_word.min(len - done);
                let word = bytes::read_u64(block, self.width.word_index(first) * 8).unwrap_or(0);
                let slots = (slot + done) as usize..(slot + done + n) as usize;
                if word == 0 && chunk.all(slots.clone(), 0) {
                    // Free, and without references.
                } else if word == all_ones(self.width)
                    && chunk.all(slots.clone(), 1)
                    && at + done + n <= self.clusters
                {
                    used_end = at + done + n;
                } else {
                    for (cluster, slot) in (at + done..).zip(slots) {
                        let stored = self.width.extract(word, cluster - clusters.start);
                        if self.cluster(cluster, stored, chunk.count(slot)) {
                            used_end = cluster + 1;
                        }
                    }
                }
                done += n;
            }
            at += len;
        }
        used_end
    }

    /// Compares the refcount of one cluster with its references. Returns true if either is above 0; past the
    /// end of the file only references count.
    fn cluster(&self, cluster: u64, stored: u64, references: u64) -> bool {
        if cluster >= self.clusters && references == 0 {
            return false;
        }
        // Reference counts of 64-bit images saturate at 2^32 - 1, so a higher refcount may well be right.
        let saturated = references == u64::from(u32::MAX) && stored > references;
        if stored != references && !saturated {
            let finding = Finding::Refcount { cluster, stored, references };
            self.shared.found(Key(Phase::Refcounts, cluster, 0), finding, 1);
        }
        stored > 0 || references > 0
    }

    /// Reports every cluster of an unreadable block. None of them counts as used.
    fn unreadable(&self, clusters: Range<u64>) -> u64 {
        for cluster in clusters {
            if cluster < self.clusters || self.counters.count(cluster) > 0 {
                let finding = Finding::RefcountUnreadable { cluster };
                self.shared.found(Key(Phase::Refcounts, cluster, 0), finding, 1);
            }
        }
        0
    }
}
