//! Meta contexts: what a disk knows of its ranges besides their bytes.

use qcow2_core::bitmap::Bits;
use qcow2_core::format::text::bytes_of;
use qcow2_core::{Error, ErrorKind, ExtentState, GuestDisk, GuestOffset, GuestRange, Result};
use qcow2_nbd::proto::{Extent, state};

/// A meta context of an export.
#[derive(Debug)]
#[non_exhaustive]
pub enum Context {
    /// Which ranges are allocated, and which are zeroes.
    Allocation,
    /// Which layer of the chain each range comes from.
    Depth,
    /// What a bitmap marks.
    Bitmap {
        /// Its name.
        name: String,
        /// The marks at the time of the export. A bitmap that records meanwhile is read each time.
        kept: Option<Bits>,
    },
}

impl Context {
    /// The context of the bitmap `name`. Errors: there is none, or it cannot be used.
    pub(super) fn bitmap(disk: &dyn GuestDisk, name: &str) -> Result<Self> {
        let image = disk.as_image().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("no bitmap '{name}': the disk is no qcow2 image"))
        })?;
        let bytes = bytes_of(name);
        let bits = image.bitmap_bits(&bytes)?;
        let records = image.bitmaps()?.iter().any(|bitmap| bitmap.name == *bytes && bitmap.auto);
        Ok(Self::Bitmap { name: name.to_owned(), kept: (!records).then_some(bits) })
    }

    /// The name that clients ask for.
    pub fn name(&self) -> String {
        match self {
            Self::Allocation => "base:allocation".to_owned(),
            Self::Depth => "qemu:allocation-depth".to_owned(),
            Self::Bitmap { name, .. } => format!("qemu:dirty-bitmap:{name}"),
        }
    }

    /// Appends the extents of a beginning of `range` (offset and length in bytes), at least one and at most
    /// `most`. Neighbours differ.
    pub(super) fn extents(
        &self,
        disk: &dyn GuestDisk,
        (offset, len): (u64, u64),
        most: usize,
        extents: &mut Vec<Extent>,
    ) -> Result<()> {
        match self {
            Self::Bitmap { kept: Some(bits), .. } => marks(bits, (offset, len), most, extents),
            Self::Bitmap { name, kept: None } => {
                let image = disk.as_image().ok_or_else(|| Error::new(ErrorKind::NotFound, "no image"))?;
                let bits = image.bitmap_bits(&bytes_of(name))?;
                marks(&bits, (offset, len), most, extents);
            }
            Self::Allocation | Self::Depth => {
                let mut at = offset;
                for _ in 0..MAX_LOOKUPS {
                    if at == offset + len {
                        break;
                    }
                    let run = Run::at(disk, at, offset + len - at)?;
                    let flags = match self {
                        Self::Depth => run.depth,
                        _ => run.flags(),
                    };
                    if !append(extents, Extent { len: run.len, flags }, most) {
                        break;
                    }
                    at += run.len;
                }
            }
        }
        Ok(())
    }
}

/// Appends `next`, or makes the last extent longer. Returns false if there is no room.
fn append(extents: &mut Vec<Extent>, next: Extent, most: usize) -> bool {
    if let Some(last) = extents.last_mut().filter(|last| last.flags == next.flags) {
        last.len += next.len;
        return true;
    }
    let has_room = extents.len() < most;
    if has_room {
        extents.push(next);
    }
    has_room
}

fn marks(bits: &Bits, (offset, len): (u64, u64), most: usize, extents: &mut Vec<Extent>) {
    let end = offset + len;
    let mut at = offset;
    for (start, len) in bits.marked_runs().skip_while(|(start, len)| start + len <= offset) {
        let (start, stop) = (start.clamp(at, end), (start + len).min(end));
        if start > at && !append(extents, Extent { len: start - at, flags: 0 }, most) {
            return;
        }
        if stop <= start {
            at = start;
            break;
        }
        if !append(extents, Extent { len: stop - start, flags: DIRTY }, most) {
            return;
        }
        at = stop;
    }
    if at < end {
        append(extents, Extent { len: end - at, flags: 0 }, most);
    }
}

/// A run of a disk with its chain.
struct Run {
    len: u64,
    is_data: bool,
    is_zero: bool,
    /// 1 for the top layer; 0: no layer has it.
    depth: u64,
}

impl Run {
    fn at(disk: &dyn GuestDisk, at: u64, len: u64) -> Result<Self> {
        let mut len = len;
        let mut layer = disk;
        let mut depth = 1;
        loop {
            let size = layer.size();
            if at >= size {
                break;
            }
            let range = GuestRange::between(GuestOffset::new(at), GuestOffset::new(at + len.min(size - at)));
            let extent = layer.extent_at(range)?;
            len = extent.len;
            let (is_data, is_zero) = match extent.state {
                ExtentState::Unallocated => match layer.backing() {
                    Some(backing) => {
                        layer = &**backing;
                        depth += 1;
                        continue;
                    }
                    None => break,
                },
                ExtentState::Zero { .. } => (false, true),
                ExtentState::Data { .. } | ExtentState::Compressed => (true, false),
            };
            return Ok(Self { len, is_data, is_zero, depth });
        }
        Ok(Self { len, is_data: false, is_zero: true, depth: 0 })
    }

    fn flags(&self) -> u64 {
        let hole = if self.is_data { 0 } else { state::HOLE };
        hole | if self.is_zero { state::ZERO } else { 0 }
    }
}

/// A beginning of the range that is all zeroes, or that is not.
pub(super) fn zero_run(disk: &dyn GuestDisk, offset: u64, len: u64) -> Result<(u64, bool)> {
    let first = Run::at(disk, offset, len)?;
    let mut total = first.len;
    // Fewer, longer chunks: the client pays for each.
    for _ in 0..MAX_JOINED {
        if total == len {
            break;
        }
        let next = Run::at(disk, offset + total, len - total)?;
        if next.is_zero != first.is_zero {
            break;
        }
        total += next.len;
    }
    Ok((total, first.is_zero))
}

/// Runs that are looked up for one context of a block status, at most: what is left is told by the next one.
const MAX_LOOKUPS: u32 = 1 << 20;
/// Runs that are joined to one chunk, at most.
const MAX_JOINED: u32 = 4096;
/// The flag of a marked range.
const DIRTY: u64 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_neighbours_are_one_extent_and_the_number_is_bounded() {
        let mut extents = Vec::new();
        let mut add = |len, flags| append(&mut extents, Extent { len, flags }, 2);
        assert!(add(1, 0) && add(2, 0) && add(4, 3) && !add(8, 0) && add(16, 3));
        assert_eq!(extents, [Extent { len: 3, flags: 0 }, Extent { len: 20, flags: 3 }]);
    }
}
