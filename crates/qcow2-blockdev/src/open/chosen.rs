//! Files that the user has chosen for an image: instead of those that it names, or with options for them.

use super::bytes::Opening;
use super::named::{data_file, denied, format_of, in_image, locate_backing, permit_backing};
use super::options::OpenOptions;
use super::policy::{Follow, Refusal};
use super::trail::Trail;
use crate::driver::is_device;
use crate::keys::Secrets;
use crate::tree::{Backing, Node, Options, Scalar, from_options};
use qcow2_core::{ImageFormat, NoResolver, Reference, ResolveError, ResolvedSource, Resolver};
use qcow2_io::MemoryStorage;
use std::sync::Arc;

/// Resolves what an image names, but for what the user has chosen.
pub(super) struct ChosenFiles {
    /// For everything else.
    pub(super) inner: Arc<dyn Resolver>,
    /// The image whose files these are.
    pub(super) image: String,
    pub(super) backing: Backing,
    pub(super) data_file: Option<Box<Node>>,
    pub(super) secrets: Secrets,
    pub(super) how: OpenOptions,
    /// How that image was reached.
    pub(super) trail: Trail,
}

impl Resolver for ChosenFiles {
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError> {
        match (reference, &self.backing, &self.data_file) {
            (Reference::Backing { .. }, Backing::Nothing | Backing::Empty, _) => Ok(nothing()),
            (Reference::Backing { name, format }, Backing::Given(options), _) => {
                self.open_backing((name, format), options.clone(), writable)
            }
            (Reference::DataFile { .. }, _, Some(node)) => {
                data_file(node, writable, (&self.how, &self.secrets), &self.trail)
            }
            _ => self.inner.resolve(reference, writable),
        }
    }

    fn has_chosen(&self, reference: Reference<'_>) -> bool {
        match reference {
            Reference::Backing { .. } => matches!(self.backing, Backing::Given(_)),
            Reference::DataFile { .. } => self.data_file.is_some(),
            _ => false,
        }
    }
}

impl ChosenFiles {
    /// Opens the backing file that `options` describe. Where they name no file it is the recorded one, which
    /// the policy must allow.
    fn open_backing(
        &self,
        (name, format): (&str, Option<&str>),
        mut options: Options,
        writable: bool,
    ) -> Result<ResolvedSource, ResolveError> {
        if let Some(format) = format.filter(|_| !options.has("driver")) {
            options.set("driver", Scalar::text(format));
        }
        let recorded =
            (!name.is_empty() && !options.has("file.filename")).then(|| locate_backing(&self.image, name));
        if let Some(path) = &recorded {
            self.permit(name, path).map_err(denied)?;
        }
        // The user may be an image, which describes its backing file.
        self.trail.count_named().map_err(in_image)?;
        let trail = self.trail.below();
        let node = from_options(options, recorded.as_deref(), false, 0).map_err(in_image)?;
        let (how, format) = (self.how.below(writable), format_of(&node));
        let opening = Opening::new(&how, &self.secrets, format.as_ref(), &trail);
        opening.open(&node).map(|(source, ..)| source).map_err(in_image)
    }

    /// Refuses the recorded `name`, which leads to `path`, where the policy does.
    fn permit(&self, name: &str, path: &str) -> Result<(), Refusal> {
        let policy = &self.how.policy;
        permit_backing(policy, &self.image, name, self.trail.layers())?;
        match policy.follow {
            Follow::All => Ok(()),
            _ if !is_device(path) => Ok(()),
            follow => Err(Refusal::Name { image: self.image.clone(), name: name.to_owned(), follow }),
        }
    }
}

/// A backing file without a byte, which hides nothing and shows nothing.
fn nothing() -> ResolvedSource {
    ResolvedSource {
        storage: Arc::new(MemoryStorage::new()),
        format: ImageFormat::Raw,
        name: String::new(),
        id: None,
        resolver: Arc::new(NoResolver),
    }
}
