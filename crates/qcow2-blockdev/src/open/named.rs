//! Files that an image names by more than a path: `nbd://host/export`, `json:{...}`.
//!
//! They are followed as paths are, where names inside images lead anywhere, and by nobody who only looks at
//! an image. A name of this kind is complete; nothing in it is relative to the image.

use super::bytes::Opening;
use super::options::OpenOptions;
use super::policy::{Follow, Policy, Refusal};
use super::trail::Trail;
use crate::driver::{Driver, is_known_driver};
use crate::failure::FailureKind;
use crate::keys::Secrets;
use crate::name::{ImageName, Naming};
use crate::tree::{Node, protocol_below};
use qcow2_core::{ImageFormat, Reference, ResolveError, ResolvedSource, Resolver};
use qcow2_io::{FileResolver, RawEvents, path_of, text_of_name};
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
        // Before the file is looked for.
        if let Reference::Backing { format: Some(format), .. } = reference
            && let ImageFormat::Other(format) = ImageFormat::from_name(format)
        {
            return Err(in_image(FailureKind::UnsupportedFormat(format)));
        }
        self.trail.count_named().map_err(in_image)?;
        let trail = match reference {
            Reference::Backing { .. } => self.trail.below(),
            _ => self.trail.clone(),
        };
        match reference {
            Reference::Backing { format: Some(format), .. } if !is_known_driver(format) => {
                Err(in_image(FailureKind::UnknownDriver(format.to_owned())))
            }
            Reference::Backing { name, format } if is_more_than_a_path(name) => {
                self.open(name, format, writable, &trail)
            }
            Reference::DataFile { name } if is_more_than_a_path(name) => {
                self.open_data(name, writable, &trail)
            }
            reference => {
                let reference = match reference {
                    Reference::DataFile { name } => {
                        Reference::DataFile { name: name.strip_prefix("file:").unwrap_or(name) }
                    }
                    backing => backing,
                };
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
        let (name, is_backing) = match reference {
            Reference::Backing { name, .. } => (name, true),
            Reference::DataFile { name } => (name, false),
            _ => ("", false),
        };
        let backing = Some(name).filter(|_| is_backing);
        let allowed = match self.how.policy.follow {
            Follow::Nothing => false,
            Follow::SameDirectory => !is_more_than_a_path(name),
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

    fn open_data(&self, name: &str, writable: bool, trail: &Trail) -> Result<ResolvedSource, ResolveError> {
        let node = protocol_below(name).map_err(in_image)?;
        data_file(&node, writable, (&self.how, &self.secrets), trail)
    }
}

/// Opens the data file that `node` leads to, below an image that is opened as `how` says.
pub(super) fn data_file(
    node: &Node,
    writable: bool,
    (how, secrets): (&OpenOptions, &Secrets),
    trail: &Trail,
) -> Result<ResolvedSource, ResolveError> {
    let mut how = how.below(false);
    (how.writable, how.resizes) = (writable, true);
    let opening = Opening::new(&how, secrets, Some(&ImageFormat::Raw), trail).as_part();
    let (source, ..) = opening.open(node).map_err(in_image)?;
    if node.is_probed() || node.driver() != Driver::Raw {
        return Ok(source);
    }
    Ok(ResolvedSource { storage: RawEvents::wrap(source.storage), ..source })
}

/// Says whether `policy` allows opening the backing file that the image at `image` calls `name`, for whoever
/// opens it as a name of its own. `depth`: how many layers stand on that image. Opens nothing.
pub fn permit_backing(policy: &Policy, image: &str, name: &str, depth: usize) -> Result<(), Refusal> {
    let (owned, follow) = ((image.to_owned(), name.to_owned()), policy.follow);
    let files = FileResolver::new(path_of(image), follow.files());
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

/// Where `name` leads as the image at `image` calls it: names of files are relative to the image, those of
/// other kinds stay as they are. Opens nothing.
pub fn locate_backing(image: &str, name: &str) -> String {
    let has_protocol = name.split_once(':').is_some_and(|(protocol, _)| !protocol.contains('/'));
    if has_protocol {
        return name.to_owned();
    }
    FileResolver::new(path_of(image), qcow2_io::Policy::Allow)
        .locate(Reference::Backing { name, format: None })
        .map_or_else(|_| name.to_owned(), |path| text_of_name(path.as_os_str()))
}

/// The failure of a name that the policy does not allow.
pub(super) fn denied(refusal: Refusal) -> ResolveError {
    ResolveError::denied("the policy does not allow it").with_source(FailureKind::from(refusal))
}

/// Whether `name` begins with the name of a protocol that is not that of files.
fn is_more_than_a_path(name: &str) -> bool {
    name.split_once(':').is_some_and(|(prefix, _)| prefix != "file" && !prefix.contains('/'))
}

/// The failure of a name in an image, as the engine passes it on.
pub(super) fn in_image(kind: FailureKind) -> ResolveError {
    ResolveError::failed("what it names cannot be opened").with_source(kind)
}

/// The format that a name gives.
pub(super) fn format_of(node: &Node) -> Option<ImageFormat> {
    if node.is_probed() { None } else { node.driver().format() }
}
