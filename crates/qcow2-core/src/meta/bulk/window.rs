//! Refcount blocks in memory while many of their refcounts change.
//!
//! Invariant I1: no refcount goes below the number of references, because each decrement stands for a removed
//! reference.

use crate::damage::bad_refcount_table_entry;
use crate::error::{Error, ErrorKind, Result};
use crate::meta::overlap::OverlapChecks;
use crate::meta::run::ClusterRun;
use crate::meta::tables::Tables;
use ::alloc::format;
use ::alloc::vec;
use ::alloc::vec::Vec;
use core::ops::Range;
use qcow2_format::bytes::{push_words, words};
use qcow2_format::refcount::{RefcountWidth, decode_table_entry};
use qcow2_format::{Geometry, HostOffset};

/// Bytes of refcount blocks in memory at most (but always one block): enough for a disk of 1 TiB with default
/// options.
const WINDOW_BYTES: u64 = 48 << 20;

/// The error for a referenced cluster with refcount 0.
pub(super) fn uncounted(cluster: u64) -> Error {
    Error::corrupt(format!("host cluster {cluster} is in use but its refcount is 0"))
}

/// The division of the refcount table into windows.
pub(super) struct Spans {
    blocks_per_window: u64,
    clusters_per_window: u64,
    table_entries: u64,
}

impl Spans {
    pub(super) fn new(geometry: &Geometry, table_entries: u64) -> Self {
        let blocks_per_window = (WINDOW_BYTES / geometry.cluster_size()).max(1);
        let clusters_per_window = blocks_per_window * geometry.refcount_block_entries();
        Self { blocks_per_window, clusters_per_window, table_entries }
    }

    /// How many windows there are.
    pub(super) fn count(&self) -> u64 {
        self.table_entries.div_ceil(self.blocks_per_window)
    }

    /// The window that holds the refcount of `cluster`.
    pub(super) fn of(&self, cluster: u64) -> u64 {
        cluster / self.clusters_per_window
    }

    /// Window `number`; reads its blocks when they are needed.
    pub(super) fn window<'a>(&self, tables: &'a Tables, table: &'a [u64], number: u64) -> Window<'a> {
        let geometry = tables.file().geometry();
        debug_assert!(number < self.count().max(1), "window {number} of {}", self.count());
        let first_block = number * self.blocks_per_window;
        let len = self.table_entries.saturating_sub(first_block).min(self.blocks_per_window);
        // A single window covers all clusters, so that one past the refcount table is found as an error.
        let clusters = match self.count() {
            0 | 1 => 0..u64::MAX,
            _ => number * self.clusters_per_window..(number + 1) * self.clusters_per_window,
        };
        Window {
            tables,
            table,
            per_block: geometry.refcount_block_entries(),
            width: geometry.refcount_width(),
            clusters,
            first_block,
            blocks: (0..len).map(|_| None).collect(),
        }
    }
}

/// The refcounts of a range of clusters.
pub(super) struct Window<'a> {
    tables: &'a Tables,
    /// The raw entries of the refcount table.
    table: &'a [u64],
    per_block: u64,
    width: RefcountWidth,
    /// The clusters whose refcounts it holds.
    clusters: Range<u64>,
    first_block: u64,
    blocks: Vec<Option<Block>>,
}

/// One refcount block.
struct Block {
    offset: HostOffset,
    words: Vec<u64>,
    dirty: bool,
    /// A bitmap of the clusters whose refcount has become zero; empty as long as there is none.
    freed: Vec<u64>,
}

impl Window<'_> {
    /// Adds `times` to the refcounts of the clusters of `run` that are in the window.
    pub(super) fn raise(&mut self, run: ClusterRun, times: u64) -> Result<()> {
        let width = self.width;
        self.change(run, |block, slots, base| {
            block.raise(width, slots, times).map_err(|(slot, old)| match old {
                0 => uncounted(base + slot),
                _ => Error::new(
                    ErrorKind::NoSpace,
                    format!(
                        "host cluster {}: refcount {old} cannot be raised, the largest is {}",
                        base + slot,
                        width.max()
                    ),
                ),
            })
        })
    }

    /// Subtracts `times` from those refcounts.
    pub(super) fn lower(&mut self, run: ClusterRun, times: u64) -> Result<()> {
        let width = self.width;
        self.change(run, |block, slots, base| {
            block.lower(width, slots, times).map_err(|slot| uncounted(base + slot))
        })
    }

    fn change(
        &mut self,
        run: ClusterRun,
        mut change: impl FnMut(&mut Block, Range<u64>, u64) -> Result<()>,
    ) -> Result<()> {
        let (mut at, end) = (run.first().max(self.clusters.start), run.end().min(self.clusters.end));
        while at < end {
            let base = at - at % self.per_block;
            let stop = end.min(base + self.per_block);
            change(self.block(at)?, at - base..stop - base, base)?;
            at = stop;
        }
        Ok(())
    }

    /// True if the window holds the refcount of `cluster`.
    pub(super) fn holds(&self, cluster: u64) -> bool {
        self.clusters.contains(&cluster)
    }

    /// The refcount of a cluster that the window [holds](Self::holds).
    pub(super) fn count(&mut self, cluster: u64) -> Result<u64> {
        let (width, slot) = (self.width, cluster % self.per_block);
        Ok(width.extract(self.block(cluster)?.words[width.word_index(slot)], slot))
    }

    /// Calls `visit` for the clusters of `run` in the window whose refcount disagrees with the copied flag
    /// `copied`, with the index in `run`. Skips clusters without a refcount block: at this point the change
    /// has been made already, and must not fail because of other damage.
    pub(super) fn mismatches(
        &mut self,
        run: ClusterRun,
        copied: bool,
        visit: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let (mut at, end) = (run.first().max(self.clusters.start), run.end().min(self.clusters.end));
        let (width, per_block) = (self.width, self.per_block);
        while at < end {
            let base = at - at % per_block;
            let stop = end.min(base + per_block);
            let words = match self.block(at) {
                Ok(block) => &block.words,
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    at = stop;
                    continue;
                }
                Err(error) => return Err(error),
            };
            for cluster in at..stop {
                let slot = cluster - base;
                if (width.extract(words[width.word_index(slot)], slot) == 1) != copied {
                    visit(cluster - run.first());
                }
            }
            at = stop;
        }
        Ok(())
    }

    /// The block with the refcount of `cluster`, read at the first use.
    fn block(&mut self, cluster: u64) -> Result<&mut Block> {
        let index = cluster / self.per_block;
        let place = index
            .checked_sub(self.first_block)
            .and_then(|at| self.blocks.get_mut(at as usize))
            .ok_or_else(|| uncounted(cluster))?;
        if place.is_none() {
            let raw = self.table.get(index as usize).copied().unwrap_or(0);
            let offset = decode_table_entry(raw, self.tables.file().geometry())
                .map_err(|e| bad_refcount_table_entry(index, e))?
                .ok_or_else(|| uncounted(cluster))?;
            let file = self.tables.file();
            let mut bytes = vec![0; file.geometry().cluster_size() as usize];
            file.storage().read_padded(offset, &mut bytes)?;
            let words: Vec<u64> = words(&bytes).collect();
            debug_assert_eq!(words.len() as u64 * u64::from(64 / self.width.bits()), self.per_block);
            *place = Some(Block { offset, words, dirty: false, freed: Vec::new() });
        }
        place.as_mut().ok_or_else(|| uncounted(cluster))
    }

    /// Checks that no changed block shares its cluster with other metadata, so that all can be written.
    /// Errors: `Corrupt`.
    pub(super) fn check_places(&self) -> Result<()> {
        let size = self.tables.file().geometry().cluster_size();
        let mut changed = self.blocks.iter().flatten().filter(|block| block.dirty);
        changed
            .try_for_each(|block| self.tables.check_place(OverlapChecks::REFCOUNT_BLOCK, block.offset, size))
    }

    /// Writes the changed blocks, in host order.
    pub(super) fn store(&self) -> Result<()> {
        let mut changed: Vec<&Block> = self.blocks.iter().flatten().filter(|block| block.dirty).collect();
        changed.sort_by_key(|block| block.offset);
        let mut bytes = Vec::with_capacity(self.tables.file().geometry().cluster_size() as usize);
        for block in changed {
            bytes.clear();
            push_words(&mut bytes, block.words.iter().copied());
            self.tables.write(OverlapChecks::REFCOUNT_BLOCK, block.offset, &bytes)?;
        }
        Ok(())
    }

    /// Calls `visit` for the runs of clusters whose refcount has become zero, in ascending order.
    pub(super) fn for_each_freed(&self, visit: &mut dyn FnMut(ClusterRun)) {
        let mut run = ClusterRun::NONE;
        for (index, block) in (self.first_block..).zip(&self.blocks) {
            let Some(block) = block else { continue };
            for slot in block.freed_slots() {
                debug_assert_eq!(
                    self.width.extract(block.words[self.width.word_index(slot)], slot),
                    0,
                    "a cluster that is referred to is freed"
                );
                let cluster = ClusterRun::one(index * self.per_block + slot);
                if run.is_empty() {
                    run = cluster;
                } else if !run.join(cluster) {
                    visit(core::mem::replace(&mut run, cluster));
                }
            }
        }
        if !run.is_empty() {
            visit(run);
        }
    }
}

impl Block {
    /// Error: the slot whose refcount cannot be raised, and that refcount.
    fn raise(&mut self, width: RefcountWidth, slots: Range<u64>, times: u64) -> Result<(), (u64, u64)> {
        self.dirty = true;
        width.raise_run(&mut self.words, slots, times)
    }

    /// Error: the slot whose refcount is too low.
    fn lower(&mut self, width: RefcountWidth, slots: Range<u64>, times: u64) -> Result<(), u64> {
        self.dirty = true;
        let all = self.words.len() as u64 * u64::from(64 / width.bits());
        let freed = &mut self.freed;
        width.lower_run(&mut self.words, slots, times, |slot| {
            if freed.is_empty() {
                *freed = vec![0; all.div_ceil(64) as usize];
            }
            freed[(slot / 64) as usize] |= 1 << (slot % 64);
        })
    }

    fn freed_slots(&self) -> impl Iterator<Item = u64> + '_ {
        (0u64..).zip(&self.freed).filter(|(_, word)| **word != 0).flat_map(|(index, &word)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index * 64 + bit)
        })
    }
}
