//! Resolver for the backing file and the data file of a new image. The caller named them, so no policy
//! applies.

use qcow2_core::{Reference, ResolveError, ResolvedSource, Resolver};
use std::sync::Arc;

/// Resolves the image's names to files that were opened before the image was created.
pub(crate) struct Given {
    /// The backing file, opened for reading.
    pub(crate) backing: Option<ResolvedSource>,
    /// The external data file, opened for writing.
    pub(crate) data: Option<ResolvedSource>,
}

impl Given {
    pub(crate) fn into_resolver(self) -> Arc<dyn Resolver> {
        Arc::new(self)
    }
}

impl Resolver for Given {
    fn resolve(&self, reference: Reference<'_>, writable: bool) -> Result<ResolvedSource, ResolveError> {
        let given = match reference {
            Reference::Backing { .. } if !writable => self.backing.as_ref(),
            Reference::DataFile { .. } => self.data.as_ref(),
            _ => None,
        };
        given
            .cloned()
            .ok_or_else(|| ResolveError::denied("the image names another file than it was created with"))
    }
}
