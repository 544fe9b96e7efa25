//! Changes of the refcounts of whole trees: made in memory, each block written once.
//!
//! A snapshot is a second L1 table above the same clusters, so taking, applying and deleting one adds or
//! drops one reference to everything below an L1 table. That takes two passes over the L2 tables and one over
//! the refcount blocks, without a lookup for each cluster. Refcount blocks are processed in windows of
//! bounded size, which bounds memory.
//!
//! The caller holds the structure lock for writing (there is no guest I/O) and has flushed everything: the
//! passes read and write the storage directly, and empty the caches at the end.

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

/// The locks of a bulk change: nothing else reads or writes refcounts, in memory or on disk.
struct Held<'a> {
    refcounts: HeldRefcounts<'a>,
    // Dropped last: a flush round that started before that would only wait for the refcounts.
    _flushing: MutexGuard<'a, ()>,
}

/// Changes of the refcounts of whole trees of an image.
pub(crate) struct Bulk<'a> {
    tables: &'a Tables,
    refcounts: &'a RefcountStore,
    flusher: &'a Flusher,
}

impl<'a> Bulk<'a> {
    /// All three belong to one image.
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
        Spans::new(self.geometry(), held.refcounts.entries(self.geometry()))
    }

    /// Adds one reference to every L2 table of `tree`, and to every cluster that they refer to. Disk: reads
    /// the tables, then writes the refcount blocks; no barrier. Errors: `NoSpace` if a refcount is at its
    /// maximum, `Corrupt` for a damaged table or a referenced cluster with refcount 0, both before anything
    /// is written; `Storage`: some refcounts may be too high then.
    pub(crate) fn raise_tree(&self, tree: &Tree) -> Result<()> {
        let held = self.hold();
        let spans = self.spans(&held);
        let touched = self.touched(tree, &spans, held.refcounts.table())?;
        if touched.len() > 1 {
            // Check that all can be raised before anything is written.
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

    /// Drops one reference to every L2 table of `tree`, and to every cluster that they refer to. Clusters
    /// whose refcount gets zero are free, and are discarded in the storage.
    ///
    /// `unlink` removes the pointer to the tree on disk. It is called after these checks: every refcount can
    /// be lowered, nothing below the tree is other metadata, and the L2 tables of `kept` keep a nonzero
    /// refcount. So a tree that cannot be freed stays linked. `active`: the raw entries of the active L1
    /// table; the copied flags in it and in its L2 tables are made to agree with the refcounts, and the
    /// caller writes the entries.
    ///
    /// Disk: reads the tables; `unlink`; writes the refcount blocks and the L2 tables whose flags change,
    /// barrier; then discards. Errors: `Corrupt` for a damaged table or a refcount that is too low, before
    /// anything has changed; those of `unlink`; `Storage`: some refcounts may be too high then.
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
        // Check that all can be lowered before anything is unlinked. A single window is kept for the second
        // pass; several would take too much memory.
        let mut only = None;
        for &span in &touched {
            let mut window = self.lowered(tree, spans.window(self.tables, held.refcounts.table(), span))?;
            self.check_kept(kept, &mut window)?;
            only = Some(window).filter(|_| touched.len() == 1);
        }
        // Links before refcounts: in the other order a crash would leave links to clusters that count as free
        // (I1).
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

    /// Checks that [`lower_tree`](Self::lower_tree) will be able to lower every refcount, for a change that
    /// ends with it.
    pub(crate) fn check_lowering(&self, tree: &Tree, kept: &[Tree]) -> Result<()> {
        let held = self.hold();
        let spans = self.spans(&held);
        for &span in &self.touched(tree, &spans, held.refcounts.table())? {
            let mut window = self.lowered(tree, spans.window(self.tables, held.refcounts.table(), span))?;
            self.check_kept(kept, &mut window)?;
        }
        Ok(())
    }

    /// Refuses a refcount so low that an L2 table of `kept` would be freed.
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

    /// Refuses a tree if one of its L2 tables is other metadata.
    pub(crate) fn check_tables(&self, tree: &Tree) -> Result<()> {
        let size = self.geometry().cluster_size();
        tree.offsets().try_for_each(|table| self.tables.check_place(OverlapChecks::L2, table, size))
    }

    /// Records that `run` was freed: removes it from the metadata map and discards it. A failed discard is
    /// ignored: it is a hint.
    fn give_back_freed(&self, run: ClusterRun, lowest: &mut Option<u64>) {
        assert!(run.first() > 0, "the header's cluster is freed with a tree");
        *lowest = Some(lowest.map_or(run.first(), |so_far| so_far.min(run.first())));
        run.clusters().for_each(|cluster| self.tables.guard().forget(OverlapChecks::L2, cluster));
        let _ = self.tables.file().storage().discard(run.offset(self.geometry()), run.len(self.geometry()));
    }

    /// The windows that hold refcounts of clusters of `tree`.
    fn touched(&self, tree: &Tree, spans: &Spans, table: &[u64]) -> Result<BTreeSet<u64>> {
        if spans.count() <= 1 {
            return Ok(BTreeSet::from([0]));
        }
        let mut touched = BTreeSet::new();
        let per_block = self.geometry().refcount_block_entries();
        tree.for_each_run(self.tables, &mut |run, _| {
            debug_assert!(!run.clusters.is_empty(), "an empty run in a tree");
            let (first, last) = (run.clusters.first(), run.clusters.end() - 1);
            if last / per_block >= table.len() as u64 {
                return Err(uncounted(last));
            }
            touched.extend(spans.of(first)..=spans.of(last));
            Ok(())
        })?;
        Ok(touched)
    }

    /// Drops all cached tables: those on disk have changed.
    fn forget_tables(&self) {
        self.flusher.mapping().forget_tables();
        self.refcounts.forget_cached();
    }

    /// Clears the copied flags in every L2 table of `tree`, because its clusters are shared from now on.
    /// Disk: writes the tables that had a flag set; no barrier.
    pub(crate) fn clear_copied(&self, tree: &Tree) -> Result<()> {
        let format = self.tables.file().l2_format();
        tree.for_each_table(self.tables, &mut |_, _, bytes| Ok(format.clear_copied_flags(bytes)))?;
        self.flusher.mapping().forget_tables();
        Ok(())
    }

    /// Sets the copied flag of clusters with refcount 1 and clears it for others, as far as `window` holds
    /// their refcounts: in the L2 tables of `tree`, on disk, and in `entries`, the L1 entries of the tree, in
    /// memory.
    fn mark_copied(&self, tree: &Tree, entries: &mut [u64], window: &mut Window<'_>) -> Result<()> {
        let (geometry, format) = (self.geometry(), self.tables.file().l2_format());
        for raw in entries.iter_mut().filter(|raw| **raw != 0) {
            let Ok(L1Entry { l2_table: Some(table), .. }) = L1Entry::decode(*raw, geometry) else {
                continue;
            };
            let cluster = geometry.host_cluster(table).value();
            if window.holds(cluster) {
                // Without a refcount block the flag stays clear, which is safe; the change itself is done and
                // must not fail any more.
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
