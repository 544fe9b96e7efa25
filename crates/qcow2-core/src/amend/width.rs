//! Changes the refcount width: writes every block again in the new width, behind all clusters in use.
//!
//! Order on disk: the new blocks, which count themselves and not the old structure, and the new table;
//! barrier; the header's width and table offset in one sector; barrier. From then on the clusters of the old
//! structure are free.

use super::{AmendProgress, stopped};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::sync::write;
use ::alloc::format;
use qcow2_format::Version;

impl Image {
    /// Changes the refcount width to `bits`, a power of two up to 64. The image takes no changes afterwards:
    /// reopen it. `progress` gets the number of written blocks and the total. Errors: `InvalidOption` for
    /// another number of bits; `Unsupported` for version 2, which has 16; `OutOfRange` if a refcount does not
    /// fit, and `Stopped`, both without a change; `Corrupt`, `ReadOnly`, `Poisoned`, `Storage`. Spec:
    /// "Refcount blocks".
    pub fn set_refcount_bits(&self, bits: u32, progress: &mut AmendProgress<'_>) -> Result<()> {
        let _alone = write(&self.structure);
        self.file.check_writable()?;
        if !bits.is_power_of_two() || bits > 64 {
            let message = format!("refcount width is {bits}, allowed are powers of two up to 64");
            return Err(Error::new(ErrorKind::InvalidOption, message));
        }
        let header = self.header();
        if bits == self.file.geometry().refcount_width().bits() {
            return Ok(());
        }
        if header.version < Version::V3 {
            return Err(Error::new(ErrorKind::Unsupported, "refcounts of version 2 have 16 bits"));
        }
        self.flusher.settle()?;
        let plan = self.refcounts.plan_width(bits)?;
        let written = self.refcounts.write_width(&plan, &mut |done, of| stopped(progress(done, of)));
        let harmless = |error: &Error| matches!(error.kind(), ErrorKind::OutOfRange | ErrorKind::Stopped);
        if written.as_ref().is_err_and(harmless) {
            // Nothing points to the new blocks yet.
            return written;
        }
        self.file.poison_on_error(written)?;
        let mut header = self.header();
        header.refcount_order = bits.trailing_zeros();
        header.refcount_table_offset = plan.table_offset();
        header.refcount_table_clusters = plan.table_clusters() as u32;
        self.header.switch_to(header)?;
        self.end_use();
        Ok(())
    }
}
