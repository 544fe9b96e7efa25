//! A chain whose layers are opened one by one, so that one below the top can be changed.

use super::layers::{OpenedDisk, open_bytes, open_layers};
use super::look::{Tell, warnings_of_change};
use super::options::OpenOptions;
use crate::failure::{FailureKind, OpenFailure};
use crate::name::ImageName;
use crate::tree::Backing;
use qcow2_core::walk::read_header;
use qcow2_core::{GuestDisk, ImageFormat, Layers, Reference, ResolvedSource};
use qcow2_io::{ThrottleStorage, path_of, text_of_name};
use qcow2_ops::{CallerError, Chain, LayerRole, NextLayer, OpenChain};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Opens the chain of an image for [`commit`](qcow2_ops::commit()). Errors it returns are [`OpenFailure`]s.
pub struct ChainFiles<'a> {
    name: &'a ImageName,
    how: OpenOptions,
    /// Limit for writes to the base.
    bytes_per_second: Option<u64>,
    tell: Tell<'a>,
}

impl<'a> ChainFiles<'a> {
    /// The chain of the image that `name` leads to. Names of bases are paths relative to the directory of the
    /// image that refers to them. `tell`: called with the warnings for the top image, before it is opened for
    /// writing.
    pub fn new(name: &'a ImageName, how: &OpenOptions, tell: Tell<'a>) -> Self {
        let mut writable = how.clone().writable();
        writable.bytes_per_second = None;
        Self { name, how: writable, bytes_per_second: how.bytes_per_second, tell }
    }

    /// What the user said of the backing file of the layer at `depth`.
    fn chosen(&self, depth: usize) -> Backing {
        self.name.node.backing.layers().nth(depth).unwrap_or(Backing::AsNamed)
    }

    fn failed(&self, kind: impl Into<FailureKind>, depth: usize) -> CallerError {
        OpenFailure::new(&self.name.typed, kind).below(depth).into()
    }

    /// The name with the keys of the layer at `depth`: each layer has its own.
    fn layer_name(&self, depth: usize) -> ImageName {
        let keys = (0..depth).fold(self.name.keys.clone(), |keys, _| keys.below());
        ImageName { keys, ..self.name.clone() }
    }
}

impl OpenChain for ChainFiles<'_> {
    fn open_top(&self) -> Result<ResolvedSource, CallerError> {
        let source = open_bytes(self.name, &self.how)?.source;
        self.name.guess_warning(&source.format).iter().for_each(|warning| (self.tell)(warning, &source));
        Ok(source)
    }

    fn look_below(
        &self,
        above: &ResolvedSource,
        depth: usize,
        base: Option<&str>,
    ) -> Result<NextLayer, CallerError> {
        // A damaged header is reported even if the backing file it records is not used.
        let recorded = backing_of(above).map_err(|error| self.failed(error, depth))?;
        let by_name = recorded.map(|backing| beside(&above.name, &backing.name));
        let path = match self.chosen(depth) {
            Backing::AsNamed => by_name,
            Backing::Nothing | Backing::Empty => None,
            Backing::Given(options) => {
                match ["file.filename", "filename"].iter().find_map(|key| options.text(key)) {
                    Some(path) => Some(path_of(&path).into_owned()),
                    None => Some(by_name.unwrap_or_default()),
                }
            }
        };
        Ok(match path {
            None => NextLayer::None,
            Some(path) if base.is_none_or(|base| is_same(&above.name, base, &path)) => NextLayer::Base,
            Some(_) => NextLayer::Middle,
        })
    }

    fn open_below(
        &self,
        above: &ResolvedSource,
        depth: usize,
        writable: bool,
    ) -> Result<ResolvedSource, CallerError> {
        let backing = backing_of(above).map_err(|error| self.failed(error, depth - 1))?.unwrap_or_default();
        let reference = Reference::Backing { name: &backing.name, format: backing.format.as_deref() };
        let resolved = above.resolver.resolve(reference, writable);
        resolved.map_err(|error| self.failed(qcow2_core::Error::from(error), depth))
    }

    fn open_layer(
        &self,
        mut source: ResolvedSource,
        depth: usize,
        role: LayerRole,
    ) -> Result<Arc<dyn GuestDisk>, CallerError> {
        let mut how = self.how.clone().with_layers(Layers::NoBacking);
        match role {
            LayerRole::Top => {
                warnings_of_change(&source).iter().for_each(|warning| (self.tell)(warning, &source));
            }
            LayerRole::Middle => how.writable = false,
            LayerRole::Base => {
                how = self.how.clone();
                if let Some(rate) = self.bytes_per_second {
                    source.storage = Arc::new(ThrottleStorage::new(source.storage, rate));
                }
            }
        }
        Ok(open_layers(&self.layer_name(depth), source, &how, depth)?.disk)
    }
}

impl From<&OpenedDisk> for Chain {
    /// Two layers are the same if they are the same file by its path, opened in the same format. Not by its
    /// inode: names recorded in an image are relative to the path by which it is opened.
    fn from(opened: &OpenedDisk) -> Self {
        let mut chain = Self::new(Arc::clone(&opened.disk));
        chain.layers = opened
            .files
            .iter()
            .map(|layer| {
                let path = path_of(&layer.image).canonicalize().ok()?;
                Some(format!(
                    "{} {}",
                    if layer.raw { "raw" } else { "image" },
                    text_of_name(path.as_os_str())
                ))
            })
            .collect();
        chain
    }
}

/// What an image records of its backing file.
#[derive(Default)]
struct Recorded {
    name: String,
    format: Option<String>,
}

fn backing_of(source: &ResolvedSource) -> qcow2_core::Result<Option<Recorded>> {
    if source.format != ImageFormat::Qcow2 {
        return Ok(None);
    }
    let header = read_header(&*source.storage)?;
    let format = header.extensions.backing_format_name();
    let name = header.backing_file_name().filter(|name| !name.is_empty());
    Ok(name.map(|name| Recorded { name, format }))
}

/// `name` as an image at `image` means it.
fn beside(image: &str, name: &str) -> PathBuf {
    let name = name.strip_prefix("file:").unwrap_or(name);
    path_of(image).parent().unwrap_or(Path::new("")).join(path_of(name))
}

/// Whether `base`, taken from where the image at `image` is, leads to the file at `path`.
fn is_same(image: &str, base: &str, path: &Path) -> bool {
    let named = path_of(image).parent().unwrap_or(Path::new("")).join(path_of(base));
    match (named.canonicalize(), path.canonicalize()) {
        (Ok(named), Ok(path)) => !base.is_empty() && named == path,
        _ => false,
    }
}
