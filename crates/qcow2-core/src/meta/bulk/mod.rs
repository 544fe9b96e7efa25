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

use super::Meta;
use super::alloc::Refcounts;
use super::overlap::OverlapChecks;
use super::run::ClusterRun;
use crate::error::{Error, Result};
use crate::rules::OrderingRule;
use crate::sync::{MutexGuard, lock};
use ::alloc::collections::BTreeSet;
use ::alloc::format;
use window::{Spans, Window};

/// The refcounts while a bulk change goes on: nobody else touches them, in memory or on disk.
struct Held<'a> {
    refcounts: MutexGuard<'a, Refcounts>,
    _writing: MutexGuard<'a, ()>,
    _flushing: MutexGuard<'a, ()>,
}

impl Meta {
    fn hold_refcounts(&self) -> Held<'_> {
        let flushing = lock(&self.flushing);
        let refcounts = lock(&self.refcounts);
        Held { refcounts, _writing: lock(&self.refcount_io), _flushing: flushing }
    }

    /// Adds one reference to every L2 table of `tree`, and to everything that they refer to. Disk: reads the
    /// tables, then writes the refcount blocks; no barrier. Errors: `NoSpace` where a refcount is at its
    /// largest value, `Corrupt` for a damaged table or a cluster that is not counted; nothing was written
    /// then. After an error of the storage some counts may be too high.
    pub(crate) fn raise_tree(&self, tree: &Tree) -> Result<()> {
        let held = self.hold_refcounts();
        let spans = Spans::new(&self.geometry, held.refcounts.table.len() as u64);
        let touched = self.touched(tree, &spans, &held.refcounts)?;
        if touched.len() > 1 {
            // All must fit before anything is written.
            for &span in &touched {
                self.raised(tree, spans.window(self, &held.refcounts, span))?;
            }
        }
        for &span in &touched {
            let window = self.raised(tree, spans.window(self, &held.refcounts, span))?;
            self.poison_on_error(window.store())?;
        }
        self.forget_tables();
        Ok(())
    }

    fn raised<'a>(&self, tree: &Tree, mut window: Window<'a>) -> Result<Window<'a>> {
        self.for_each_run(tree, &mut |run, times| window.raise(run.clusters, times))?;
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
    /// having changed; what `unlink` says; `Storage`, counts being left too high.
    pub(crate) fn lower_tree(
        &self,
        tree: &Tree,
        kept: &[Tree],
        mut active: Option<&mut [u64]>,
        unlink: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut held = self.hold_refcounts();
        let spans = Spans::new(&self.geometry, held.refcounts.table.len() as u64);
        let mut touched = self.touched(tree, &spans, &held.refcounts)?;
        let active_tree = active.as_deref().map(|entries| Tree::new(entries, &self.geometry)).transpose()?;
        active_tree.iter().try_for_each(|tree| self.check_tables(tree))?;
        let marked = match &active_tree {
            Some(active) => self.touched(active, &spans, &held.refcounts)?,
            None => BTreeSet::new(),
        };
        // All must fit before anything is unlinked. One window is kept, several would take too much memory.
        let mut only = None;
        for &span in &touched {
            let mut window = self.lowered(tree, spans.window(self, &held.refcounts, span))?;
            self.check_kept(kept, &mut window)?;
            only = Some(window).filter(|_| touched.len() == 1);
        }
        let (before, after) = match self.rules.keep(OrderingRule::UnlinkBeforeFree) {
            true => (Some(unlink), None),
            false => (None, Some(unlink)),
        };
        before.map_or(Ok(()), |unlink| unlink())?;
        touched.extend(marked);
        let mut freed = None;
        for &span in &touched {
            let mut window = match only.take() {
                Some(window) if touched.len() == 1 => window,
                _ => self.lowered(tree, spans.window(self, &held.refcounts, span))?,
            };
            if let (Some(tree), Some(entries)) = (&active_tree, active.as_deref_mut()) {
                self.mark_copied(tree, entries, &mut window)?;
            }
            window.store()?;
            self.storage.flush()?;
            window.for_each_freed(&mut |run| self.give_back_freed(run, &mut freed));
        }
        after.map_or(Ok(()), |unlink| unlink())?;
        self.forget_tables();
        self.expanded.clear();
        held.refcounts.pack = None;
        if let Some(lowest) = freed {
            held.refcounts.first_free = held.refcounts.first_free.min(lowest);
        }
        Ok(())
    }

    /// Makes sure that [`lower_tree`](Self::lower_tree) can lower every count, before a change that it is the
    /// end of.
    pub(crate) fn check_lowering(&self, tree: &Tree, kept: &[Tree]) -> Result<()> {
        let held = self.hold_refcounts();
        let spans = Spans::new(&self.geometry, held.refcounts.table.len() as u64);
        for &span in &self.touched(tree, &spans, &held.refcounts)? {
            let mut window = self.lowered(tree, spans.window(self, &held.refcounts, span))?;
            self.check_kept(kept, &mut window)?;
        }
        Ok(())
    }

    /// Refuses counts so low that a table which stays would be freed with those that go.
    fn check_kept(&self, kept: &[Tree], window: &mut Window<'_>) -> Result<()> {
        for table in kept.iter().flat_map(Tree::offsets) {
            let cluster = self.geometry.host_cluster(table).value();
            if window.holds(cluster) && window.count(cluster)? == 0 {
                return Err(self.mark_corrupt(format!("the refcount of the l2 table at {table} is too low")));
            }
        }
        Ok(())
    }

    fn lowered<'a>(&self, tree: &Tree, mut window: Window<'a>) -> Result<Window<'a>> {
        let lowered = self.for_each_run(tree, &mut |run, times| {
            self.check_owner(run)?;
            window.lower(run.clusters, times)
        });
        lowered?;
        window.check_places()?;
        Ok(window)
    }

    /// Refuses a tree one of whose tables is other metadata.
    pub(crate) fn check_tables(&self, tree: &Tree) -> Result<()> {
        let size = self.geometry.cluster_size();
        tree.offsets().try_for_each(|table| self.check_table_place(OverlapChecks::L2, table, size))
    }

    /// A freed run: no longer metadata, and the storage may have its space. A failed discard loses nothing.
    fn give_back_freed(&self, run: ClusterRun, lowest: &mut Option<u64>) {
        *lowest = Some(lowest.map_or(run.first(), |so_far| so_far.min(run.first())));
        run.clusters().for_each(|cluster| self.guard.forget(OverlapChecks::L2, cluster));
        let _ = self.storage.discard(run.offset(&self.geometry), run.len(&self.geometry));
    }

    /// Which windows `tree` has references in.
    fn touched(&self, tree: &Tree, spans: &Spans, refcounts: &Refcounts) -> Result<BTreeSet<u64>> {
        if spans.count() <= 1 {
            return Ok(BTreeSet::from([0]));
        }
        let mut touched = BTreeSet::new();
        let per_block = self.geometry.refcount_block_entries();
        self.for_each_run(tree, &mut |run, _| {
            let (first, last) = (run.clusters.first(), run.clusters.end() - 1);
            if last / per_block >= refcounts.table.len() as u64 {
                return Err(uncounted(last));
            }
            touched.extend(spans.of(first)..=spans.of(last));
            Ok(())
        })?;
        Ok(touched)
    }

    /// Drops all cached tables: the disk has others now.
    pub(crate) fn forget_tables(&self) {
        self.l2_cache.clear();
        self.refcount_cache.clear();
    }
}

fn uncounted(cluster: u64) -> Error {
    Error::corrupt(format!("host cluster {cluster} is in use but its refcount is 0"))
}
