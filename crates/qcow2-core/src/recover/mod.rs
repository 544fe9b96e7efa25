//! Recovery of an image that was not closed cleanly: its refcounts are recounted.
//!
//! Order on disk: corrected refcount blocks, or a new refcount structure behind everything in use and the
//! header's switch to it; barrier; only then the dirty bit is cleared. A crash in between leaves the bit set,
//! and the next open begins again. Spec: "Header" (dirty bit).

pub(crate) mod count;

use crate::error::Result;
use crate::image::Image;
use count::{Recount, ReferenceCounts};

impl Image {
    /// Makes every refcount exact and clears the dirty bit. The image was opened for writing and nobody uses
    /// it yet. Errors: `Corrupt` where tables are damaged: such an image needs a repair that may lose data,
    /// not a recount.
    pub(crate) fn recover(&self) -> Result<()> {
        let counts = self.recount().references()?;
        if !self.correct_refcounts(&counts, false)? {
            self.rebuild_refcounts(&counts)?;
        }
        self.flusher.settle()?;
        self.header.retract_warnings()
    }

    /// Corrects the counts in the blocks that there are, or only those that are too high. `false` where a
    /// cluster in use has no block to count it, or the refcount structures themselves are damaged.
    pub(crate) fn correct_refcounts(&self, counts: &ReferenceCounts, only_lower: bool) -> Result<bool> {
        self.refcounts.correct_blocks(counts, only_lower, &mut || self.flusher.flush_if_pressed())
    }

    /// Writes a new refcount structure behind the last cluster in use and switches to it.
    pub(crate) fn rebuild_refcounts(&self, counts: &ReferenceCounts) -> Result<()> {
        self.refcounts.rebuild(counts)?;
        self.learn_metadata()
    }

    /// Counts what the tables on disk refer to.
    pub(crate) fn recount(&self) -> Recount<'_> {
        Recount::new(&self.tables, self.header())
    }
}
