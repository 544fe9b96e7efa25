//! Commit: writes the data of the upper layers of a backing chain into a lower layer, the base.

use crate::above::Above;
use crate::chain::OpenedChain;
use crate::copy::{CopyPlan, CopyReport, copy};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::map::Layers;
use crate::pipeline::Order;
use crate::port::OpenChain;
use crate::progress::Progress;
use crate::source::{Below, Source};
use qcow2_core::GuestDisk;
use std::sync::Arc;

/// Options of a commit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommitOptions {
    /// Name of the layer to commit into, for the caller's [`OpenChain`]; `None`: the backing file of the top.
    pub base: Option<String>,
    /// Drop all allocations of the top layer afterwards. Only valid if the base is the backing file of the
    /// top.
    pub empty_top: bool,
}

impl CommitOptions {
    /// Sets the layer to commit into.
    #[must_use]
    pub fn with_base(self, base: Option<String>) -> Self {
        Self { base, ..self }
    }

    /// Sets whether to empty the top layer.
    #[must_use]
    pub fn with_empty_top(self, empty_top: bool) -> Self {
        Self { empty_top, ..self }
    }
}

/// Commits the upper layers of a chain into its base. Opens the files, copies, and closes them.
///
/// 1. Opens the chain from the top down: the top for writing, the layers below it for reading, the base for
///    writing with its own chain. The file of a layer is opened before the image above it. A layer that is
///    the same file as one above, and a chain of more than
///    [`MAX_CHAIN_LEN`](qcow2_core::chain::MAX_CHAIN_LEN) layers, are refused.
/// 2. Copies, and empties the top if the options say so: see [`commit_layers`].
/// 3. Closes the base, then the top, also after an error.
///
/// Errors: `Open` with the caller's error or a [`ChainError`](crate::ChainError) as source; `NotFound` with
/// [`ChainError::NoBase`](crate::ChainError::NoBase) as source; those of [`commit_layers`]; `Close`. After an
/// error the chain still reads as before.
pub fn commit(
    chain: &dyn OpenChain,
    options: &CommitOptions,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    let opened = OpenedChain::down_to(chain, options.base.as_deref())?;
    let committed = commit_layers(&opened.above, &opened.base, options, executor, progress);
    let closed = opened.close();
    let report = committed?;
    closed.map(|()| report)
}

/// The copying step of [`commit`], for layers that are open already. Writes the data that `above` allocates
/// into `base`, which grows if the top is larger. `above`: the layers above the base, top first, each opened
/// without its backing file; the top for writing if it is to be emptied. `base`: opened for writing, with its
/// own backing chain. It is durable on return; the caller closes it.
///
/// Disk: writes the data, makes `base` durable, and only then empties the top. A crash leaves a chain that
/// reads as before. Zeroes that `base` already has are not written. Memory: at most four chunks per worker; a
/// chunk is 1 MiB, or a cluster if that is larger.
///
/// Errors: `Extents`, `Read`, `Write` with the first byte of the failed range; `Stopped`; `Unsupported` for a
/// top that cannot be emptied. After an error the chain still reads as before.
pub fn commit_layers(
    above: &[Arc<dyn GuestDisk>],
    base: &Arc<dyn GuestDisk>,
    options: &CommitOptions,
    executor: &dyn Executor,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    let Some(top) = above.first() else {
        return Err(Error::new(ErrorKind::InvalidOption, "nothing to commit"));
    };
    let write_error = |text: &'static str| move |e| Error::new(ErrorKind::Write, text).with_source(e);
    if top.size() > base.size() {
        base.resize(top.size()).map_err(write_error("growing the base"))?;
    }
    let source: Arc<dyn GuestDisk> = Arc::new(Above::new(above));
    let source = Source::new(std::slice::from_ref(&source))?;
    let layers = Layers::new(base)
        .map_err(|e| Error::new(ErrorKind::Extents, "reading the block status of the base").with_source(e))?;
    let plan = CopyPlan {
        source: &source,
        target: &**base,
        sparse_size: SPARSE_SIZE,
        zero_from: None,
        below: Below::Unallocated,
        copied_anyway: Vec::new(),
        target_layers: Some(&layers),
        compress: None,
        offload: false,
        // One worker writes at a time. That keeps its clusters together in the base's file, and writes them
        // in few calls.
        order: Order::Claimed,
        salvage: false,
    };
    let copied = copy(&plan, executor, progress);
    // Flush after an error or a stop too: what has been written equals the content of the upper layers, so it
    // may stay.
    let flushed = base.flush().map_err(write_error("making the base durable"));
    let report = copied?;
    flushed?;
    if options.empty_top {
        let image = top
            .as_image()
            .ok_or_else(|| Error::new(ErrorKind::Unsupported, "only a qcow2 image can be made empty"))?;
        image.make_empty().map_err(write_error("making the top layer empty"))?;
    }
    Ok(report)
}

/// Runs of zeroes of at least this many bytes are not written as data.
const SPARSE_SIZE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;
    use crate::testing::{TestDisk, Threads};

    #[test]
    fn committed_base_reads_like_the_chain() {
        for seed in 0..40 {
            let size = |i: u64| [3 << 20, 1 << 20, (2 << 20) + 512][((seed + i) % 3) as usize];
            let disk = |i: u64| TestDisk::mixed(size(i), 200_000, seed * 3 + i);
            let base = Arc::new(disk(0));
            let middle = Arc::new(disk(1).with_backing(&base));
            let top = disk(2).with_backing(&middle);
            let expected = {
                let mut content = base.content();
                let (seen, len) = (top.content(), content.len().max(top.size() as usize));
                content.resize(len, 0);
                content[..seen.len()].copy_from_slice(&seen);
                content
            };
            let alone = |i: u64| -> Arc<dyn GuestDisk> { Arc::new(disk(i)) };
            let target: Arc<dyn GuestDisk> = base.clone();
            let options = CommitOptions::default();
            commit_layers(&[alone(2), alone(1)], &target, &options, &Threads(3), &Silent).unwrap();
            assert!(base.content() == expected, "seed {seed}");
        }
    }
}
