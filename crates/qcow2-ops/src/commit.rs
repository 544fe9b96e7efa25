//! What the upper layers of a chain hold goes into a lower one.

use crate::above::Above;
use crate::copy::{CopyPlan, CopyReport, copy};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Executor;
use crate::map::Layers;
use crate::pipeline::Order;
use crate::progress::Progress;
use crate::source::{Below, Source};
use qcow2_core::GuestDisk;
use std::sync::Arc;

/// How to commit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CommitOptions {
    /// Whether the top layer, whose bytes the base then has too, is made empty. Only where nothing lies
    /// between both.
    pub empty_top: bool,
}

/// Writes what `above` has into `base`, which gets longer where the top is. `above`: the layers over `base`,
/// top first, each opened without what lies below it, the first for writing where it is to be made empty.
/// `base`: the whole chain from there on down, open for writing; it is durable afterwards, and closed by the
/// caller.
///
/// Disk: the data; `base` durable; only then the top is made empty. A crash leaves a chain that reads as
/// before. Zeroes that `base` has already are not written. Memory: at most four chunks for each worker, a
/// chunk being 1 MiB or a cluster where that is more.
///
/// Errors: `Extents`, `Read`, `Write` with the first byte of the failed range; `Stopped`; `Unsupported` for a
/// top that cannot be made empty. The chain reads as before then too.
pub fn commit(
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
        base.resize(top.size()).map_err(write_error("making the base longer"))?;
    }
    let source: Arc<dyn GuestDisk> = Arc::new(Above::new(above));
    let source = Source::new(std::slice::from_ref(&source))?;
    let layers = Layers::new(base)
        .map_err(|e| Error::new(ErrorKind::Extents, "asking what the base has").with_source(e))?;
    let plan = CopyPlan {
        source: &source,
        target: &**base,
        sparse_size: SPARSE_SIZE,
        zero_from: None,
        below: Below::Unallocated,
        target_layers: Some(&layers),
        compress: None,
        offload: false,
        // What one worker at a time writes, lies together in the base's file, and goes there in few calls.
        order: Order::Claimed,
        salvage: false,
    };
    let copied = copy(&plan, executor, progress);
    // What was written so far is as good as what the layers above say: a stop leaves it there.
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

/// Runs of zeroes from this length on are not written as data.
const SPARSE_SIZE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;
    use crate::testing::{TestDisk, Threads};

    #[test]
    fn the_base_then_reads_as_the_chain_did() {
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
            commit(&[alone(2), alone(1)], &target, &CommitOptions::default(), &Threads(3), &Silent).unwrap();
            assert!(base.content() == expected, "seed {seed}");
        }
    }
}
