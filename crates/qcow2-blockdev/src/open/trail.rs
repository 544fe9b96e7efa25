//! Bounds for images that are opened inside one another.
//!
//! The engine opens a backing chain one layer after the other and finds its loops. A `json:` name can put an
//! image inside another image, whose chain is then opened recursively, and there the engine does not see the
//! layers above. A trail has what that takes: the files between the image that the user names and the one
//! that is being opened, the depth of the recursion, and how many files were opened because images name them.

use crate::failure::FailureKind;
use qcow2_core::SourceId;
use qcow2_core::chain::MAX_CHAIN_LEN;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How the image that is being opened was reached.
#[derive(Clone, Default)]
pub(super) struct Trail {
    /// The file that was opened last, and those before it.
    last: Option<Arc<Step>>,
    /// Nodes whose opening is not finished.
    depth: usize,
    /// Backing files between the image that the user names and this one, itself included.
    layers: usize,
    /// Files that images have named, on all trails from the same image.
    named: Arc<AtomicUsize>,
}

struct Step {
    id: SourceId,
    before: Option<Arc<Step>>,
}

impl Trail {
    /// The trail into one more node. Errors: there are too many.
    pub(super) fn deeper(&self) -> Result<Self, FailureKind> {
        if self.depth >= MAX_DEPTH {
            return Err(FailureKind::TooDeep(MAX_DEPTH));
        }
        Ok(Self { depth: self.depth + 1, ..self.clone() })
    }

    /// The trail to the backing file of the image that it leads to.
    pub(super) fn below(&self) -> Self {
        Self { layers: self.layers + 1, ..self.clone() }
    }

    /// How many backing files it goes through.
    pub(super) fn layers(&self) -> usize {
        self.layers
    }

    /// The trail with one more file. `None`: the system does not tell which one it is.
    pub(super) fn with_file(&self, id: Option<SourceId>) -> Self {
        let Some(id) = id else { return self.clone() };
        Self { last: Some(Arc::new(Step { id, before: self.last.clone() })), ..self.clone() }
    }

    /// Refuses the file called `name` where it is on the trail already.
    pub(super) fn check_new(&self, id: Option<SourceId>, name: &str) -> Result<(), FailureKind> {
        let mut next = self.last.as_ref();
        while let Some(step) = next {
            if Some(step.id) == id {
                return Err(FailureKind::Loop(name.to_owned()));
            }
            next = step.before.as_ref();
        }
        Ok(())
    }

    /// Counts one more file that an image names.
    pub(super) fn count_named(&self) -> Result<(), FailureKind> {
        if self.named.fetch_add(1, Ordering::Relaxed) >= MAX_NAMED {
            return Err(FailureKind::TooManyNamed(MAX_NAMED));
        }
        Ok(())
    }
}

/// Nodes one inside the other, at most: their openings nest on the stack, some 12 KiB for an image. Origin:
/// ours; QEMU has no limit.
const MAX_DEPTH: usize = 32;

/// Files that are opened because images name them, at most: the longest chain, each layer with a data file.
const MAX_NAMED: usize = 2 * MAX_CHAIN_LEN;

#[cfg(test)]
mod tests {
    use super::*;

    fn id(file: u64) -> Option<SourceId> {
        Some(SourceId { device: 1, file })
    }

    #[test]
    fn a_file_comes_once_on_a_trail() {
        let first = Trail::default().with_file(id(1));
        let (left, right) = (first.with_file(id(2)), first.with_file(None).with_file(id(3)));
        assert!(left.check_new(id(3), "x").is_ok() && left.check_new(None, "x").is_ok());
        for (trail, file) in [(&left, 1), (&left, 2), (&right, 1), (&right, 3)] {
            let error = trail.check_new(id(file), "x");
            assert!(matches!(error, Err(FailureKind::Loop(name)) if name == "x"));
        }
    }

    #[test]
    fn depth_is_per_trail_and_the_count_is_shared() {
        let mut trail = Trail::default();
        for _ in 0..MAX_DEPTH {
            trail = trail.deeper().unwrap();
        }
        assert!(trail.deeper().is_err() && Trail::default().deeper().is_ok());
        let trails = [trail.with_file(id(1)), trail.with_file(id(2))];
        (0..MAX_NAMED).for_each(|number| trails[number % 2].count_named().unwrap());
        assert!(trails.iter().all(|trail| trail.count_named().is_err()));
    }
}
