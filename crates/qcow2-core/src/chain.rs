//! Opens the backing chain: without recursion, with a limit on its length, and loops are found.

use crate::container::ContainerDisk;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Image;
use crate::live::{LiveDisk, chain_extent};
use crate::open::{Layers, OpenOptions};
use crate::port::disk::{ExtentState, GuestDisk};
use crate::port::resolver::{ImageFormat, Reference, ResolvedSource, SourceId};
use crate::raw::RawDisk;
use ::alloc::boxed::Box;
use ::alloc::collections::BTreeSet;
use ::alloc::format;
use ::alloc::string::{String, ToString};
use ::alloc::sync::Arc;
use ::alloc::vec::Vec;
use qcow2_format::{GuestOffset, GuestRange};

/// The longest chain that is followed. Origin: ours; QEMU has no limit.
pub const MAX_CHAIN_LEN: usize = 1024;

/// Opens a disk and its backing chain. `source`: the top layer; its resolver opens the names in its header.
/// Backing files are opened for reading. Disk: reads headers and L1 tables.
///
/// Errors: as [`Image::open`]; `Resolve` if a layer cannot be opened, `Chain` for a loop or more than
/// [`MAX_CHAIN_LEN`] layers.
pub fn open_disk(source: ResolvedSource, options: &OpenOptions) -> Result<Arc<dyn GuestDisk>> {
    match source.format {
        ImageFormat::Raw => Ok(Arc::new(RawDisk::new(source.storage, options.writable)?)),
        ImageFormat::Qcow2 => Ok(Image::open(source, options)?),
        ImageFormat::Luks => {
            Ok(Arc::new(ContainerDisk::open(&source, options.keys.as_deref(), options.writable, 0)?))
        }
        ImageFormat::Other(name) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("unknown driver '{name}': allowed are qcow2 and raw"),
        )),
    }
}

/// Opens the layers below `top`, whose header names `first` as its backing file.
pub(crate) fn open_backing(
    top: &ResolvedSource,
    first: (&str, Option<&str>),
    options: &OpenOptions,
) -> Result<Arc<dyn GuestDisk>> {
    let below = OpenOptions { writable: false, layers: Layers::Follow, ..options.clone() };
    let mut seen: BTreeSet<SourceId> = top.id.into_iter().collect();
    let mut opened: Vec<Layer> = Vec::new();
    let mut resolver = Arc::clone(&top.resolver);
    let mut next = Some((first.0.to_string(), first.1.map(ToString::to_string)));
    while let Some((name, format)) = next {
        if opened.len() + 1 >= MAX_CHAIN_LEN {
            let message = format!("backing chain has more than {MAX_CHAIN_LEN} layers");
            return Err(Error::new(ErrorKind::Chain, message));
        }
        let source =
            resolver.resolve(Reference::Backing { name: &name, format: format.as_deref() }, false)?;
        if source.id.is_some_and(|id| !seen.insert(id)) {
            let message = format!("backing file '{}' creates an infinite loop", source.name);
            return Err(Error::new(ErrorKind::Chain, message));
        }
        resolver = Arc::clone(&source.resolver);
        let layer = Layer::open(&source, &below, opened.len() + 1)?;
        next = match &layer {
            Layer::Raw(_) | Layer::Container(_) => None,
            Layer::Image(image) => self::below(&source, image),
        };
        opened.push(layer);
    }
    let mut disk: Option<Arc<dyn GuestDisk>> = None;
    while let Some(layer) = opened.pop() {
        let layer = layer.stand_on(disk);
        disk = Some(if options.exchangeable { Arc::new(LiveDisk::frozen(layer)) } else { layer });
    }
    disk.ok_or_else(|| Error::new(ErrorKind::Chain, "backing chain is empty"))
}

/// The name and the format of the backing file of `image`, which is in `source`: the recorded ones, or empty
/// where the caller has chosen one for an image that records none.
pub(crate) fn below(source: &ResolvedSource, image: &Image) -> Option<(String, Option<String>)> {
    let chosen = || source.resolver.has_chosen(Reference::Backing { name: "", format: None });
    image.backing_reference().or_else(|| chosen().then(|| (String::new(), None)))
}

enum Layer {
    Raw(RawDisk),
    Container(ContainerDisk),
    Image(Box<Image>),
}

impl Layer {
    fn open(source: &ResolvedSource, options: &OpenOptions, depth: usize) -> Result<Self> {
        match &source.format {
            ImageFormat::Raw => Ok(Self::Raw(RawDisk::new(Arc::clone(&source.storage), false)?)),
            ImageFormat::Qcow2 => Ok(Self::Image(Box::new(Image::open_layer(source, options, depth)?))),
            ImageFormat::Luks => {
                let keys = options.keys.as_deref();
                Ok(Self::Container(ContainerDisk::open(source, keys, false, depth)?))
            }
            ImageFormat::Other(name) => Err(Error::new(
                ErrorKind::Unsupported,
                format!("'{}': unknown driver '{name}', allowed are qcow2 and raw", source.name),
            )),
        }
    }

    fn stand_on(self, below: Option<Arc<dyn GuestDisk>>) -> Arc<dyn GuestDisk> {
        match self {
            Self::Raw(disk) => Arc::new(disk),
            Self::Container(disk) => Arc::new(disk),
            Self::Image(image) => Arc::new(image.with_backing(below)),
        }
    }
}

/// True if the tables show that `range` reads as zeroes. Reads no data, so `false` does not mean that there
/// is a nonzero byte. `range` lies inside `disk`. Disk: may read tables. Errors: as [`GuestDisk::extent_at`].
pub fn reads_zero(disk: &dyn GuestDisk, range: GuestRange) -> Result<bool> {
    let (mut at, end) = (range.start().value(), range.end().value());
    while at < end {
        let here = GuestRange::between(GuestOffset::new(at), GuestOffset::new(end));
        let extent = chain_extent(disk, here)?;
        if !matches!(extent.state, ExtentState::Zero { .. } | ExtentState::Unallocated) {
            return Ok(false);
        }
        assert!(extent.len > 0, "the disk returned an empty extent at {at:#x}");
        at += extent.len;
    }
    Ok(true)
}
