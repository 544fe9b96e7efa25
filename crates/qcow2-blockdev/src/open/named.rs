//! Backing files that an image names by more than a path: `nbd://host/export`, `json:{...}`; and files that
//! the user names instead of those that the image does.
//!
//! The former are followed as paths are, where names inside images lead anywhere, and by nobody who only
//! looks at an image. A name of this kind is complete; nothing in it is relative to the image.

use super::bytes::Opening;
use super::options::OpenOptions;
use super::policy::{Follow, Policy, Refusal};
use super::trail::Trail;
use crate::driver::Driver;
use crate::failure::FailureKind;
use crate::keys::Secrets;
use crate::name::{ImageName, Naming};
use crate::tree::Node;
use qcow2_core::{ImageFormat, NoResolver, Reference, ResolveError, ResolvedSource, Resolver};
use qcow2_io::{FileResolver, MemoryStorage, RawEvents};
use std::sync::Arc;

/// Resolves the names in one image as far as the policy allows: paths as `inner` does, other names of backing
/// files as those on the command line.
pub(super) struct NamedFiles {
    pub(super) inner: Arc<dyn Resolver>,
    /// The image whose names these are.
    pub(super) image: String,
    pub(super) secrets: Secrets,
    pub(super) how: OpenOptions,
    /// How that image was reached.
    pub(super) trail: Trail,
}

impl Resolver for NamedFiles {
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError> {
        self.permit(reference)?;
        self.trail.count_named().map_err(in_image)?;
        let trail = match reference {
            Reference::Backing { .. } => self.trail.below(),
            _ => self.trail.clone(),
        };
        match reference {
            Reference::Backing { name, format } if is_more_than_a_path(name) => {
                self.open(name, format, writable, &trail)
            }
            reference => {
                let source = self
                    .inner
                    .resolve(reference, writable)
                    .map_err(|error| if error.is_denied() { self.refusal(reference) } else { error })?;
                let is_layer = matches!(reference, Reference::Backing { .. });
                if is_layer {
                    self.how.policy.check(&source, false).map_err(denied)?;
                }
                let resolver = Arc::new(Self {
                    inner: source.resolver,
                    image: source.name.clone(),
                    secrets: self.secrets.clone(),
                    how: self.how.clone(),
                    trail: trail.with_file(source.id),
                });
                Ok(ResolvedSource { resolver, ..source })
            }
        }
    }
}

impl NamedFiles {
    /// Refuses a name that the policy does not allow; where a path leads is left to `inner`.
    fn permit(&self, reference: Reference<'_>) -> Result<(), ResolveError> {
        let backing = match reference {
            Reference::Backing { name, .. } => Some(name),
            _ => None,
        };
        let allowed = match self.how.policy.follow {
            Follow::Nothing => false,
            Follow::SameDirectory => !backing.is_some_and(is_more_than_a_path),
            Follow::All => true,
        };
        if !allowed {
            return Err(self.refusal(reference));
        }
        let most = self.how.policy.max_depth;
        match backing.filter(|_| self.trail.layers() >= most) {
            Some(name) => {
                let (image, name) = (self.image.clone(), name.to_owned());
                Err(denied(Refusal::Depth { image, name, allowed: most }))
            }
            None => Ok(()),
        }
    }

    fn refusal(&self, reference: Reference<'_>) -> ResolveError {
        let name = match reference {
            Reference::Backing { name, .. } | Reference::DataFile { name } => name.to_owned(),
            _ => String::new(),
        };
        denied(Refusal::Name { image: self.image.clone(), name, follow: self.how.policy.follow })
    }

    fn open(
        &self,
        name: &str,
        format: Option<&str>,
        writable: bool,
        trail: &Trail,
    ) -> Result<ResolvedSource, ResolveError> {
        let naming = Naming::new(&self.secrets).with_format(format.map(str::to_owned));
        let node = ImageName::parse(name, &naming).map_err(|failure| in_image(failure.into_kind()))?.node;
        let (how, format) = (self.how.below(writable), format_of(&node));
        let opening = Opening::new(&how, &self.secrets, format.as_ref(), trail);
        opening.open(&node).map(|(source, ..)| source).map_err(in_image)
    }
}

/// Says whether `policy` allows opening the backing file that the image at `image` calls `name`, for whoever
/// opens it as a name of its own. `depth`: how many layers stand on that image. Opens nothing.
pub fn permit_backing(policy: &Policy, image: &str, name: &str, depth: usize) -> Result<(), Refusal> {
    let (owned, follow) = ((image.to_owned(), name.to_owned()), policy.follow);
    let files = FileResolver::new(image, follow.files());
    let allowed = match follow {
        Follow::All => true,
        _ => !is_more_than_a_path(name) && files.check(Reference::Backing { name, format: None }).is_ok(),
    };
    let (image, name) = owned;
    match depth >= policy.max_depth {
        _ if !allowed => Err(Refusal::Name { image, name, follow }),
        true => Err(Refusal::Depth { image, name, allowed: policy.max_depth }),
        false => Ok(()),
    }
}

/// The failure of a name that the policy does not allow.
fn denied(refusal: Refusal) -> ResolveError {
    ResolveError::denied("the policy does not allow it").with_source(FailureKind::from(refusal))
}

/// Whether `name` begins with the name of a protocol that is not that of files.
fn is_more_than_a_path(name: &str) -> bool {
    name.split_once(':').is_some_and(|(prefix, _)| prefix != "file" && !prefix.contains('/'))
}

/// Resolves what an image names, but for the backing file, which the user has named.
pub(super) struct OtherBacking {
    pub(super) inner: Arc<dyn Resolver>,
    /// `None`: none at all.
    pub(super) node: Option<Node>,
    pub(super) secrets: Secrets,
    pub(super) how: OpenOptions,
}

impl Resolver for OtherBacking {
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError> {
        if !matches!(reference, Reference::Backing { .. }) {
            return self.inner.resolve(reference, writable);
        }
        let Some(node) = &self.node else {
            // A backing file without a byte hides nothing and shows nothing.
            return Ok(ResolvedSource {
                storage: Arc::new(MemoryStorage::new()),
                format: ImageFormat::Raw,
                name: String::new(),
                id: None,
                resolver: Arc::new(NoResolver),
            });
        };
        let (how, format, trail) = (self.how.below(false), format_of(node), Trail::default());
        let opening = Opening::new(&how, &self.secrets, format.as_ref(), &trail);
        opening.open(node).map(|(source, ..)| source).map_err(in_image)
    }
}

/// Resolves what an image names, but for the data file, which the user has named.
pub(super) struct OtherDataFile {
    pub(super) inner: Arc<dyn Resolver>,
    pub(super) node: Node,
    pub(super) secrets: Secrets,
    pub(super) how: OpenOptions,
}

impl Resolver for OtherDataFile {
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError> {
        if !matches!(reference, Reference::DataFile { .. }) {
            return self.inner.resolve(reference, writable);
        }
        let mut how = self.how.below(false);
        (how.writable, how.resizes) = (writable, true);
        let trail = Trail::default();
        let opening = Opening::new(&how, &self.secrets, Some(&ImageFormat::Raw), &trail).as_part();
        let (source, ..) = opening.open(&self.node).map_err(in_image)?;
        if self.node.is_probed() || self.node.driver() != Driver::Raw {
            return Ok(source);
        }
        Ok(ResolvedSource { storage: RawEvents::wrap(source.storage), ..source })
    }
}

/// The failure of a name in an image, as the engine passes it on.
fn in_image(kind: FailureKind) -> ResolveError {
    ResolveError::failed("what it names cannot be opened").with_source(kind)
}

/// The format that a name gives.
pub(super) fn format_of(node: &Node) -> Option<ImageFormat> {
    if node.is_probed() { None } else { node.driver().format() }
}
