//! Refcounts of whole trees: changed in memory, written once.
//!
//! A snapshot is a second L1 table above the same clusters, so taking, applying and deleting one adds a
//! reference to everything below a table, or drops one. That is two passes over the tables and one over the
//! refcount blocks; nothing is looked up by cluster. Refcount blocks are held in windows of bounded size, so
//! that memory is too.
//!
//! The caller is alone (nobody reads or writes guest data), and everything that was changed before is on
//! disk: the passes go to the storage itself, and the caches are empty afterwards.

mod tree;
mod window;

pub(crate) use tree::Tree;

use super::flush::Flusher;
use super::overlap::OverlapChecks;
use super::refcount::{HeldRefcounts, RefcountStore};
use super::run::ClusterRun;
use super::tables::Tables;
use crate::error::{ErrorKind, Result};
use crate::rules::OrderingRule;
use crate::sync::MutexGuard;
use ::alloc::collections::BTreeSet;
use ::alloc::format;
use ::alloc::vec::Vec;
use qcow2_format::l1::L1Entry;
use qcow2_format::l2::L2Item;
use qcow2_format::{Geometry, L2Index};
use window::{Spans, Window, uncounted};

/// The refcounts while a bulk change goes on: nobody else touches them, in memory or on disk.
struct Held<'a> {
    refcounts: HeldRefcounts<'a>,
    // Dropped last: a round that began before the refcounts are let go would wait for them.
    _flushing: MutexGuard<'a, ()>,
}

/// A change of whole trees of an image.
pub(crate) struct Bulk<'a> {
    tables: &'a Tables,
    refcounts: &'a RefcountStore,
    flusher: &'a Flusher,
}

impl<'a> Bulk<'a> {
    /// The three are of one image.
    pub(crate) fn new(tables: &'a Tables, refcounts: &'a RefcountStore, flusher: &'a Flusher) -> Self {
        Self { tables, refcounts, flusher }
    }

    fn hold(&self) -> Held<'a> {
        let flushing = self.flusher.hold();
        Held { refcounts: self.refcounts.hold(), _flushing: flushing }
    }

    fn geometry(&self) -> &'a Geometry {
        self.tables.file().geometry()
    }

    fn spans(&self, held: &Held<'_>) -> Spans {
        Spans::new(self.geometry(), held.refcounts.table().len() as u64)
    }

    /// Adds one reference to every L2 table of `tree`, and to everything that they refer to. Disk: reads the
    /// tables, then writes the refcount blocks; no barrier. Errors: `NoSpace` where a refcount is at its
    /// largest value, `Corrupt` for a damaged table or a cluster that is not counted; nothing was written
    /// then. After an error of the storage some counts may be too high.
    pub(crate) fn raise_tree(&self, tree: &Tree) -> Result<()> {
        let held = self.hold();
        let spans = self.spans(&held);
        let touched = self.touched(tree, &spans, held.refcounts.table())?;
        if touched.len() > 1 {
            // All must fit before anything is written.
            for &span in &touched {
                self.raised(tree, spans.window(self.tables, held.refcounts.table(), span))?;
            }
        }
        for &span in &touched {
            let window = self.raised(tree, spans.window(self.tables, held.refcounts.table(), span))?;
            self.tables.file().poison_on_error(window.store())?;
        }
        self.forget_tables();
        Ok(())
    }

    fn raised<'w>(&self, tree: &Tree, mut window: Window<'w>) -> Result<Window<'w>> {
        tree.for_each_run(self.tables, &mut |run, times| window.raise(run.clusters, times))?;
        Ok(window)
    }

    /// Drops one reference from every L2 table of `tree`, and from everything that they refer to. `unlink`
    /// makes the disk lead there no more; it is called once it is certain that every count can be lowered,
    /// that nothing below the tree is other metadata and that the tables of `kept` stay counted, so that what
    /// cannot be freed stays linked. What nobody refers to then is free and given back to the storage. With
    /// `active`, the raw entries of the active L1 table, the copied flags below and in it are made to agree
    /// with the refcounts; the caller writes the entries.
    ///
    /// Disk: reads the tables; `unlink`; writes the refcount blocks and L2 tables whose flags change,
    /// barrier; then discards. Errors: `Corrupt` for a damaged table or a count that is too low, nothing
    /// having changed; those of `unlink`; `Storage`, counts being left too high.
    pub(crate) fn lower_tree(
        &self,
        tree: &Tree,
        kept: &[Tree],
        mut active: Option<&mut [u64]>,
        unlink: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut held = self.hold();
        let spans = self.spans(&held);
        let mut touched = self.touched(tree, &spans, held.refcounts.table())?;
        let active_tree = active.as_deref().map(|entries| Tree::new(entries, self.geometry())).transpose()?;
        active_tree.iter().try_for_each(|tree| self.check_tables(tree))?;
        let marked = match &active_tree {
            Some(active) => self.touched(active, &spans, held.refcounts.table())?,
            None => BTreeSet::new(),
        };
        // All must fit before anything is unlinked. One window is kept, several would take too much memory.
        let mut only = None;
        for &span in &touched {
            let mut window = self.lowered(tree, spans.window(self.tables, held.refcounts.table(), span))?;
            self.check_kept(kept, &mut window)?;
            only = Some(window).filter(|_| touched.len() == 1);
        }
        // Links first, then counts: the other way round a crash would leave links to clusters that count as
        // free (I1).
        let (before, after) = match self.tables.file().keeps(OrderingRule::UnlinkBeforeFree) {
            true => (Some(unlink), None),
            false => (None, Some(unlink)),
        };
        before.map_or(Ok(()), |unlink| unlink())?;
        touched.extend(marked);
        let mut freed = None;
        for &span in &touched {
            let mut window = match only.take() {
                Some(window) if touched.len() == 1 => window,
                _ => self.lowered(tree, spans.window(self.tables, held.refcounts.table(), span))?,
            };
            if let (Some(tree), Some(entries)) = (&active_tree, active.as_deref_mut()) {
                self.mark_copied(tree, entries, &mut window)?;
            }
            window.store()?;
            self.tables.file().flush()?;
            window.for_each_freed(&mut |run| self.give_back_freed(run, &mut freed));
        }
        after.map_or(Ok(()), |unlink| unlink())?;
        self.forget_tables();
        self.flusher.mapping().expanded().clear();
        held.refcounts.lowered(freed);
        Ok(())
    }

    /// Makes sure that [`lower_tree`](Self::lower_tree) can lower every count, before a change that it is the
    /// end of.
    pub(crate) fn check_lowering(&self, tree: &Tree, kept: &[Tree]) -> Result<()> {
        let held = self.hold();
        let spans = self.spans(&held);
        for &span in &self.touched(tree, &spans, held.refcounts.table())? {
            let mut window = self.lowered(tree, spans.window(self.tables, held.refcounts.table(), span))?;
            self.check_kept(kept, &mut window)?;
        }
        Ok(())
    }

    /// Refuses counts so low that a table which stays would be freed with those that go.
    fn check_kept(&self, kept: &[Tree], window: &mut Window<'_>) -> Result<()> {
        for table in kept.iter().flat_map(Tree::offsets) {
            let cluster = self.geometry().host_cluster(table).value();
            if window.holds(cluster) && window.count(cluster)? == 0 {
                return Err(self
                    .tables
                    .header()
                    .mark_corrupt(format!("the refcount of the l2 table at {table} is too low")));
            }
        }
        Ok(())
    }

    fn lowered<'w>(&self, tree: &Tree, mut window: Window<'w>) -> Result<Window<'w>> {
        let lowered = tree.for_each_run(self.tables, &mut |run, times| {
            self.tables.check_owner(run)?;
            window.lower(run.clusters, times)
        });
        lowered?;
        window.check_places()?;
        Ok(window)
    }

    /// Refuses a tree one of whose tables is other metadata.
    pub(crate) fn check_tables(&self, tree: &Tree) -> Result<()> {
        let size = self.geometry().cluster_size();
        tree.offsets().try_for_each(|table| self.tables.check_place(OverlapChecks::L2, table, size))
    }

    /// A freed run: no longer metadata, and the storage may have its space. A failed discard loses nothing.
    fn give_back_freed(&self, run: ClusterRun, lowest: &mut Option<u64>) {
        assert!(run.first() > 0, "the header's cluster is freed with a tree");
        *lowest = Some(lowest.map_or(run.first(), |so_far| so_far.min(run.first())));
        run.clusters().for_each(|cluster| self.tables.guard().forget(OverlapChecks::L2, cluster));
        let _ = self.tables.file().storage().discard(run.offset(self.geometry()), run.len(self.geometry()));
    }

    /// Which windows `tree` has references in.
    fn touched(&self, tree: &Tree, spans: &Spans, table: &[u64]) -> Result<BTreeSet<u64>> {
        if spans.count() <= 1 {
            return Ok(BTreeSet::from([0]));
        }
        let mut touched = BTreeSet::new();
        let per_block = self.geometry().refcount_block_entries();
        tree.for_each_run(self.tables, &mut |run, _| {
            debug_assert!(!run.clusters.is_empty(), "a tree refers to no cluster");
            let (first, last) = (run.clusters.first(), run.clusters.end() - 1);
            if last / per_block >= table.len() as u64 {
                return Err(uncounted(last));
            }
            touched.extend(spans.of(first)..=spans.of(last));
            Ok(())
        })?;
        Ok(touched)
    }

    /// Drops all cached tables: the disk has others now.
    fn forget_tables(&self) {
        self.flusher.mapping().forget_tables();
        self.refcounts.forget_cached();
    }

    /// Clears the copied flag in every L2 table of `tree`: everything below has several references from now
    /// on, or may be treated so. Disk: writes the tables that had one set; no barrier.
    pub(crate) fn clear_copied(&self, tree: &Tree) -> Result<()> {
        let format = self.tables.file().l2_format();
        tree.for_each_table(self.tables, &mut |_, _, bytes| Ok(format.clear_copied_flags(bytes)))?;
        self.flusher.mapping().forget_tables();
        Ok(())
    }

    /// Makes the copied flags of those clusters that `window` counts say whether the count is one: in the L2
    /// tables of `tree`, on disk, and in `entries`, the L1 entries that it was made of.
    fn mark_copied(&self, tree: &Tree, entries: &mut [u64], window: &mut Window<'_>) -> Result<()> {
        let (geometry, format) = (self.geometry(), self.tables.file().l2_format());
        for raw in entries.iter_mut().filter(|raw| **raw != 0) {
            let Ok(L1Entry { l2_table: Some(table), .. }) = L1Entry::decode(*raw, geometry) else {
                continue;
            };
            let cluster = geometry.host_cluster(table).value();
            if window.holds(cluster) {
                // What no block counts is not ours alone, and no reason to fail now.
                let copied = match window.count(cluster) {
                    Err(error) if error.kind() == ErrorKind::Corrupt => false,
                    count => count? == 1,
                };
                *raw = L1Entry { l2_table: Some(table), copied }.encode();
            }
        }
        let mut wrong: Vec<L2Index> = Vec::new();
        tree.for_each_table(self.tables, &mut |_, _, bytes| {
            wrong.clear();
            let mut result = Ok(());
            format.scan(bytes, |item| {
                if let (true, L2Item::Clusters { index, host, count, copied }) = (result.is_ok(), item) {
                    let run = ClusterRun::new(geometry.host_cluster(host).value(), count);
                    result = window.mismatches(run, copied, &mut |at| {
                        wrong.push(L2Index::new(index.value() + at));
                    });
                }
            });
            debug_assert!(wrong.iter().all(|index| index.value() < geometry.l2_entries()), "{wrong:?}");
            wrong.iter().for_each(|&index| format.flip_copied_flag(bytes, index));
            result.map(|()| !wrong.is_empty())
        })
    }
}
