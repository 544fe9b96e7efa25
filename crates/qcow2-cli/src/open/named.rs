//! Backing files that an image names by more than a path: `nbd://host/export`, `json:{...}`.
//!
//! They are followed as paths are: by verbs that need what the whole chain holds, and by nobody who only
//! looks at an image. A name of this kind is complete; nothing in it is relative to the image.

use super::OpenAs;
use super::node::{Opening, Trouble};
use super::trail::Trail;
use crate::args::ImageArgs;
use crate::imagename::ImageName;
use qcow2_core::{Reference, ResolveError, ResolvedSource, Resolver};
use std::sync::Arc;

/// Resolves paths as `inner` does, and other names of backing files as those on the command line.
pub(super) struct NamedBacking {
    pub(super) inner: Arc<dyn Resolver>,
    pub(super) args: ImageArgs,
    pub(super) how: OpenAs,
    /// How the image whose names these are was reached.
    pub(super) trail: Trail,
}

impl Resolver for NamedBacking {
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError> {
        self.trail.count_named().map_err(ResolveError::failed)?;
        match reference {
            Reference::Backing { name, format } if is_more_than_a_path(name) => {
                self.open(name, format, writable)
            }
            reference => {
                let source = self.inner.resolve(reference, writable)?;
                let resolver = Arc::new(Self {
                    inner: source.resolver,
                    args: self.args.clone(),
                    how: self.how,
                    trail: self.trail.with_file(source.id),
                });
                Ok(ResolvedSource { resolver, ..source })
            }
        }
    }
}

impl NamedBacking {
    fn open(&self, name: &str, format: Option<&str>, writable: bool) -> Result<ResolvedSource, ResolveError> {
        let format = format.map(str::to_owned);
        let args = ImageArgs { format, image_opts: false, ..self.args.clone() };
        let failed =
            |failure: crate::failure::Failure| ResolveError::failed(failure.without_name().to_string());
        let node = ImageName::parse(name, &args).map_err(failed)?.node;
        let format = super::format_of(&node);
        let opening = Opening::new(&args, self.how.below(writable), format.as_ref(), &self.trail);
        let opened = opening.open(&node).map_err(Trouble::in_image)?;
        Ok(opened.0)
    }
}

/// Whether `name` begins with the name of a protocol that is not that of files.
fn is_more_than_a_path(name: &str) -> bool {
    name.split_once(':').is_some_and(|(prefix, _)| prefix != "file" && !prefix.contains('/'))
}
