//! Copy offload: the system copies data directly from the source's file to the target's file
//! (`copy_file_range`). The data does not pass through this program, and file systems that can share blocks
//! may do so.

use crate::source::Source;
use qcow2_core::format::CryptMethod;
use qcow2_core::{
    ExtentState, GuestDisk, GuestOffset, GuestRange, HostOffset, Image, Piece, RawDisk, Result, Storage,
    StorageError, ZeroMode,
};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Copy offload to one target; given up at the first failure.
pub(crate) struct Offload<'a> {
    target: Target<'a>,
    refused: AtomicBool,
}

enum Target<'a> {
    Raw(&'a RawDisk),
    Image(&'a Image),
}

/// The outcome of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// Everything was copied.
    All,
    /// Copy offload is not possible or failed. The caller must read and write the whole range.
    Refused,
}

impl<'a> Offload<'a> {
    /// `None` for a target that is neither raw nor qcow2, or that is encrypted: its bytes on disk differ from
    /// the guest's.
    pub(crate) fn new(target: &'a dyn GuestDisk) -> Option<Self> {
        let target = match (target.as_raw(), target.as_image()) {
            (Some(raw), _) => Target::Raw(raw),
            (None, Some(image)) if image.header().crypt_method == CryptMethod::None => Target::Image(image),
            _ => return None,
        };
        Some(Self { target, refused: AtomicBool::new(false) })
    }

    /// False once a copy has been refused.
    pub(crate) fn is_possible(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// Copies `range`, which layer `depth` of the source stores uncompressed. Errors are the engine's for the
    /// target. A copy that the storage refuses is not an error; no further copy is tried.
    pub(crate) fn copy(&self, source: &Source, range: Range<u64>, depth: u32) -> Result<Moved> {
        let mut at = range.start;
        while at < range.end {
            let Some(from) = From::find(source, at, depth) else { return Ok(self.refuse()) };
            let len = (range.end - at).min(from.len);
            let copied = match self.target {
                Target::Raw(raw) => from.copy_to(&**raw.storage(), HostOffset::new(at), len)?.then_some(len),
                Target::Image(image) => from.copy_into(image, GuestRange::new(GuestOffset::new(at), len))?,
            };
            match copied {
                Some(len) => at += len,
                None => return Ok(self.refuse()),
            }
        }
        Ok(Moved::All)
    }

    fn refuse(&self) -> Moved {
        // A worker that sees this late makes one more attempt, which is harmless.
        self.refused.store(true, Ordering::Relaxed);
        Moved::Refused
    }
}

/// A guest offset in a layer of the source.
struct From<'a> {
    layer: &'a dyn GuestDisk,
    offset: u64,
    /// Bytes from `offset` to the end of the disk that the layer belongs to.
    len: u64,
}

impl<'a> From<'a> {
    fn find(source: &'a Source, at: u64, depth: u32) -> Option<Self> {
        let (layer, offset, len) = source.layer_at(at, depth)?;
        Some(Self { layer: &**layer, offset, len })
    }

    /// Copies `len` bytes to `host` in `to`. Returns `false` if that is not possible.
    fn copy_to(&self, to: &dyn Storage, host: HostOffset, len: u64) -> Result<bool> {
        if let Some(raw) = self.layer.as_raw() {
            return Ok(done(to.copy_from(&**raw.storage(), HostOffset::new(self.offset), host, len)));
        }
        let Some(image) = self.layer.as_image() else { return Ok(false) };
        let Some(data) = image.data_storage() else { return Ok(false) };
        // The mapping may have changed since it was read. The pin keeps clusters that are freed meanwhile
        // from being reused, so the extents below stay valid until the copy is done.
        let pin = image.pin();
        let mut copied = 0;
        while copied < len {
            let rest = GuestRange::new(GuestOffset::new(self.offset + copied), len - copied);
            let Some(rest) = rest else { return Ok(false) };
            let extent = pin.extent_at(rest)?;
            let (ExtentState::Data { host: Some(from) }, Some(host)) =
                (extent.state, host.checked_add(copied))
            else {
                return Ok(false);
            };
            if !done(to.copy_from(&**data, from, host, extent.len)) {
                return Ok(false);
            }
            copied += extent.len;
        }
        Ok(true)
    }

    /// Copies the first part of `range` into `image`, at newly allocated clusters. Returns the length of that
    /// part.
    fn copy_into(&self, image: &Image, range: Option<GuestRange>) -> Result<Option<u64>> {
        let (Some(range), Some(data)) = (range, image.data_storage()) else { return Ok(None) };
        let ticket = image.prepare_write(range)?;
        let len = ticket.range().len();
        for piece in ticket.pieces() {
            match piece {
                Piece::Guest { host } if self.copy_to(&**data, host, len)? => {}
                Piece::Bytes { host, bytes } => data.write_at(host, bytes)?,
                Piece::Zeroes { host, len } => data.write_zeroes(host, len, ZeroMode::KeepAllocated)?,
                // Dropping the ticket gives its clusters back.
                _ => return Ok(None),
            }
        }
        ticket.commit()?;
        Ok(Some(len))
    }
}

/// The reason for a refusal does not matter: reading and writing will report what is broken.
fn done(copied: std::result::Result<(), StorageError>) -> bool {
    copied.is_ok()
}
