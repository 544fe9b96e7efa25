//! A chain whose layers are opened one by one, so that one below the top can be changed.

use super::layers::{open_bytes, open_layers};
use super::look::{Tell, warnings_of_change};
use super::options::{OpenOptions, Sharing};
use crate::failure::{FailureKind, OpenFailure};
use crate::name::ImageName;
use crate::tree::Node;
use qcow2_core::chain::MAX_CHAIN_LEN;
use qcow2_core::walk::read_header;
use qcow2_core::{GuestDisk, ImageFormat, Layers, Reference, ResolvedSource, SourceId};
use qcow2_io::ThrottleStorage;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The layers of a chain down to one that takes changes.
#[non_exhaustive]
pub struct OpenedChain {
    /// The layers over the base, top first, each without what is below it.
    pub above: Vec<Arc<dyn GuestDisk>>,
    /// The base with its own chain, writable.
    pub base: Arc<dyn GuestDisk>,
}

/// Opens the image that `name` leads to for changes, and below it every layer down to `base`, that one for
/// changes too. `base`: as the user names it; `None` is the backing file of the top. `tell` hears whether the
/// top was taken for raw by its looks, and what opening it for changes is about to put right, before that.
/// Errors: as [`open`](super::open); [`FailureKind::NoBase`].
pub fn open_down_to(
    name: &ImageName,
    how: &OpenOptions,
    base: Option<&str>,
    tell: Tell<'_>,
) -> Result<OpenedChain, OpenFailure> {
    let mut writable = how.clone().writable();
    writable.bytes_per_second = None;
    let mut source = open_bytes(name, &writable)?.source;
    name.guess_warning(&source.format).iter().for_each(|warning| tell(warning, &source));
    let mut above: Vec<Arc<dyn GuestDisk>> = Vec::new();
    let mut seen: BTreeSet<SourceId> = source.id.into_iter().collect();
    // Each layer has its own password.
    let mut layer_name = name.clone();
    loop {
        let is_top = above.is_empty();
        // The user may have named another one for the top.
        let other = if is_top { name.node.other_backing() } else { None };
        let recorded = backing_of(&source).map_err(|error| failed(name, error.into(), above.len()))?;
        let below = match &other {
            Some(node) => node.as_ref().map(Backing::named_by_user),
            None => recorded,
        };
        let mut layer = writable.clone().with_layers(Layers::NoBacking);
        layer.writable = is_top;
        let Some(below) = below else {
            tell_of_change(is_top, &source, tell);
            // What does not open is told first.
            open_layers(&layer_name, source, &layer, above.len())?;
            let (name, base) = (name.typed.clone(), base.map(str::to_owned));
            return Err(OpenFailure::new(name.clone(), FailureKind::NoBase { name, base }));
        };
        let is_base = base.is_none_or(|base| is_same(&source.name, base, &below.path));
        let next = match other.flatten() {
            Some(node) => {
                let mut how = writable.clone();
                how.writable = is_base;
                how.sharing = if is_base { Sharing::TopAlone } else { how.sharing };
                let named = ImageName { node, ..name.clone() };
                open_bytes(&named, &how).map_err(|failure| failure.below(1))?.source
            }
            None => source
                .resolver
                .resolve(below.reference(), is_base)
                .map_err(|error| failed(name, qcow2_core::Error::from(error).into(), above.len() + 1))?,
        };
        check_chain(&next, &mut seen, above.len()).map_err(|kind| failed(name, kind, above.len() + 1))?;
        tell_of_change(is_top, &source, tell);
        let opened = open_layers(&layer_name, source, &layer, above.len())?;
        above.push(opened.disk);
        layer_name.keys = layer_name.keys.below();
        source = next;
        if is_base {
            break;
        }
    }
    if let Some(rate) = how.bytes_per_second {
        source.storage = Arc::new(ThrottleStorage::new(source.storage, rate));
    }
    let base = open_layers(&layer_name, source, &writable, above.len())?.disk;
    Ok(OpenedChain { above, base })
}

fn failed(name: &ImageName, kind: FailureKind, layer: usize) -> OpenFailure {
    OpenFailure::new(&name.typed, kind).below(layer)
}

fn tell_of_change(is_changed: bool, source: &ResolvedSource, tell: Tell<'_>) {
    if is_changed {
        warnings_of_change(source).iter().for_each(|warning| tell(warning, source));
    }
}

/// Refuses a layer that is one of those above it, and a chain that is too long, as the engine does where it
/// opens one.
fn check_chain(
    next: &ResolvedSource,
    seen: &mut BTreeSet<SourceId>,
    above: usize,
) -> Result<(), FailureKind> {
    if above + 2 > MAX_CHAIN_LEN {
        return Err(FailureKind::ChainTooLong(MAX_CHAIN_LEN));
    }
    match next.id {
        Some(id) if !seen.insert(id) => Err(FailureKind::Loop(next.name.clone())),
        _ => Ok(()),
    }
}

/// What an image says of its backing file.
struct Backing {
    name: String,
    format: Option<String>,
    /// Where the name leads.
    path: PathBuf,
}

impl Backing {
    fn named_by_user(node: &Node) -> Self {
        Self { name: String::new(), format: None, path: PathBuf::from(node.path().unwrap_or_default()) }
    }

    fn reference(&self) -> Reference<'_> {
        Reference::Backing { name: &self.name, format: self.format.as_deref() }
    }
}

fn backing_of(source: &ResolvedSource) -> qcow2_core::Result<Option<Backing>> {
    if source.format != ImageFormat::Qcow2 {
        return Ok(None);
    }
    let header = read_header(&*source.storage)?;
    let format = header.extensions.backing_format_name();
    Ok(header.backing_file_name().filter(|name| !name.is_empty()).map(|backing| {
        let path = beside(&source.name, &backing);
        Backing { name: backing, format, path }
    }))
}

/// `name` as an image at `image` means it.
fn beside(image: &str, name: &str) -> PathBuf {
    Path::new(image).parent().unwrap_or(Path::new("")).join(name.strip_prefix("file:").unwrap_or(name))
}

/// Whether `base`, taken from where the image at `image` is, leads to the file at `path`.
fn is_same(image: &str, base: &str, path: &Path) -> bool {
    let named = Path::new(image).parent().unwrap_or(Path::new("")).join(base);
    match (named.canonicalize(), path.canonicalize()) {
        (Ok(named), Ok(path)) => !base.is_empty() && named == path,
        _ => false,
    }
}
