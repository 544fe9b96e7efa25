//! Bytes that the system copies by itself: from the place where a layer of the source has them to the place
//! where the target wants them. They do not pass through the program, and file systems that can share space
//! may do so.

use crate::source::Source;
use qcow2_core::format::CryptMethod;
use qcow2_core::{
    ExtentState, GuestDisk, GuestOffset, GuestRange, HostOffset, Image, Piece, RawDisk, Result, Storage,
    StorageError, ZeroMode,
};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// A target that takes bytes by the system's own copy until that fails for the first time.
pub(crate) struct Offload<'a> {
    target: Target<'a>,
    refused: AtomicBool,
}

enum Target<'a> {
    Raw(&'a RawDisk),
    Image(&'a Image),
}

/// What became of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// All of it is there.
    All,
    /// The storages cannot, or failed: whoever asked has to read and write, all of it.
    Refused,
}

impl<'a> Offload<'a> {
    /// `None` for a target whose bytes on disk are not the guest's, or that is neither raw nor qcow2.
    pub(crate) fn new(target: &'a dyn GuestDisk) -> Option<Self> {
        let target = match (target.as_raw(), target.as_image()) {
            (Some(raw), _) => Target::Raw(raw),
            (None, Some(image)) if image.header().crypt_method == CryptMethod::None => Target::Image(image),
            _ => return None,
        };
        Some(Self { target, refused: AtomicBool::new(false) })
    }

    /// Whether it is worth to ask.
    pub(crate) fn is_possible(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// Copies `range`, which the layer `depth` of the source has in plain bytes. Errors are the target's
    /// engine's; a copy that fails is no error, and none is tried after it.
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
        self.refused.store(true, Ordering::Relaxed);
        Moved::Refused
    }
}

/// A place in a layer of the source.
struct From<'a> {
    layer: &'a dyn GuestDisk,
    offset: u64,
    /// Bytes to the end of the disk that the layer belongs to.
    len: u64,
}

impl<'a> From<'a> {
    fn find(source: &'a Source, at: u64, depth: u32) -> Option<Self> {
        let (layer, offset, len) = source.layer_at(at, depth)?;
        Some(Self { layer: &**layer, offset, len })
    }

    /// Copies `len` bytes to `host` of `to`; `false` if that cannot be done.
    fn copy_to(&self, to: &dyn Storage, host: HostOffset, len: u64) -> Result<bool> {
        if let Some(raw) = self.layer.as_raw() {
            return Ok(done(to.copy_from(&**raw.storage(), HostOffset::new(self.offset), host, len)));
        }
        let Some(image) = self.layer.as_image() else { return Ok(false) };
        let Some(data) = image.data_storage() else { return Ok(false) };
        // Clusters that are freed meanwhile wait for the pin, and what the map said before may be old.
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

    /// Copies the first part of `range` to where `image` wants it, and says how long that part was.
    fn copy_into(&self, image: &Image, range: Option<GuestRange>) -> Result<Option<u64>> {
        let (Some(range), Some(data)) = (range, image.data_storage()) else { return Ok(None) };
        let ticket = image.prepare_write(range)?;
        let len = ticket.range().len();
        for piece in ticket.pieces() {
            match piece {
                Piece::Guest { host } if self.copy_to(&**data, host, len)? => {}
                Piece::Bytes { host, bytes } => data.write_at(host, bytes)?,
                Piece::Zeroes { host, len } => data.write_zeroes(host, len, ZeroMode::KeepAllocated)?,
                _ => return Ok(None),
            }
        }
        ticket.commit()?;
        Ok(Some(len))
    }
}

/// Why a storage does not copy makes no difference: reading and writing finds out what is broken.
fn done(copied: std::result::Result<(), StorageError>) -> bool {
    copied.is_ok()
}
