//! Recovery of an image whose dirty bit is set: recounts the refcounts.
//!
//! Order on disk: corrected refcount blocks, or a new refcount structure behind all clusters in use and the
//! header's switch to it; barrier; only then the dirty bit is cleared. A crash in between leaves the bit set,
//! and the next open starts over. Spec: "Header" (dirty bit).

pub(crate) mod count;

use crate::error::Result;
use crate::image::Image;
use count::{Recount, ReferenceCounts};

impl Image {
    /// Makes every refcount exact and clears the dirty bit. Called on open, before any request. Errors:
    /// `Corrupt` for damaged tables: such an image needs a repair, which may lose data.
    pub(crate) fn recover(&self) -> Result<()> {
        let counts = self.recount().references()?;
        if !self.correct_refcounts(&counts, false)? {
            self.rebuild_refcounts(&counts)?;
        }
        self.flusher.settle()?;
        self.header.retract_warnings()
    }

    /// Corrects the refcounts in the existing blocks, with `only_lower` only those that are too high. Returns
    /// false, without a change, if a cluster in use has no refcount block or the refcount structure itself is
    /// damaged.
    pub(crate) fn correct_refcounts(&self, counts: &ReferenceCounts, only_lower: bool) -> Result<bool> {
        self.refcounts.correct_blocks(counts, only_lower, &mut || self.flusher.flush_if_pressed())
    }

    /// Writes a new refcount structure behind the last cluster in use, and switches the header to it.
    pub(crate) fn rebuild_refcounts(&self, counts: &ReferenceCounts) -> Result<()> {
        self.refcounts.rebuild(counts)?;
        self.learn_metadata()
    }

    /// A counter of the references in the tables on disk.
    pub(crate) fn recount(&self) -> Recount<'_> {
        Recount::new(&self.tables, self.header())
    }
}
