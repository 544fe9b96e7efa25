//! Copies what one layer alone allocates into a layer below it.

use crate::error::{Error, ErrorKind, Result};
use qcow2_core::chain::reads_zero;
use qcow2_core::{ExtentState, GuestDisk, GuestOffset, GuestRange, ZeroMode};

/// The most bytes that are read at a time.
const PIECE: u64 = 1 << 20;

/// The range from `start` up to `end`.
pub(super) fn range(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
}

/// Makes `to` read like `from` wherever `from` itself, without the layers below it, allocates a part of
/// `whole`. `buffer`: for reuse. Zeroes that `to` reads as already are not written. Errors: `Extents`,
/// `Read`, `Write` with the first byte of the failed range.
pub(super) fn copy_layer(
    from: &dyn GuestDisk,
    to: &dyn GuestDisk,
    whole: GuestRange,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    let (mut at, end) = (whole.start().value(), whole.end().value());
    while at < end {
        let failed = |kind, step: &str| {
            let text = format!("{step} at byte {at}");
            move |e| Error::new(kind, text).with_source(e)
        };
        let extent = from
            .extent_at(range(at, end.min(at + PIECE)))
            .map_err(failed(ErrorKind::Extents, "reading the block status"))?;
        let here = range(at, at + extent.len);
        match extent.state {
            ExtentState::Unallocated => {}
            ExtentState::Zero { .. } => {
                let there = reads_zero(to, here).map_err(failed(ErrorKind::Extents, "looking for zeroes"))?;
                if !there {
                    to.write_zeroes(here, ZeroMode::MayUnmap)
                        .map_err(failed(ErrorKind::Write, "writing zeroes"))?;
                }
            }
            ExtentState::Data { .. } | ExtentState::Compressed => {
                buffer.resize(extent.len as usize, 0);
                from.read_at(here.start(), buffer).map_err(failed(ErrorKind::Read, "reading"))?;
                to.write_at(here.start(), buffer).map_err(failed(ErrorKind::Write, "writing"))?;
            }
        }
        at += extent.len;
    }
    Ok(())
}
