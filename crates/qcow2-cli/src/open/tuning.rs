//! The options of an image that say how the engine runs it, not what it holds: caches, checks, what becomes
//! of space.

use crate::failure::Failure;
use crate::imagename::Options;
use crate::imageopts::{read_number, read_size, read_switch};
use qcow2_core::format::{Header, Version};
use qcow2_core::{OpenOptions, OverlapChecks};

/// Sets what `node`, the options of a qcow2 image with `header`, asks of the engine. Errors: the first option
/// that is not of its type or does not go with the others, in QEMU's words.
pub(crate) fn tune(options: &mut OpenOptions, node: &Options, header: &Header) -> Result<(), Failure> {
    set_caches(options, node)?;
    check_entry_size(node, header)?;
    const LONGEST_INTERVAL: u64 = u32::MAX as u64;
    let interval = node.text("cache-clean-interval").map(|text| read_number("cache-clean-interval", &text));
    if interval.transpose()?.is_some_and(|seconds| seconds > LONGEST_INTERVAL) {
        return Err(Failure::new("Cache clean interval too big"));
    }
    if switch(node, "lazy-refcounts")? == Some(true) && header.version < Version::V3 {
        return Err(Failure::new(
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
        ));
    }
    options.overlap_checks = overlap_checks(node)?;
    let pass_request = switch(node, "pass-discard-request")?;
    switch(node, "pass-discard-snapshot")?;
    switch(node, "pass-discard-other")?;
    options.discard_freed = options.writable && pass_request.unwrap_or(true);
    options.discard_no_unref = switch(node, "discard-no-unref")?.unwrap_or(false);
    if options.discard_no_unref && header.version < Version::V3 {
        return Err(Failure::new("discard-no-unref is only supported since qcow2 version 3"));
    }
    Ok(())
}

fn switch(node: &Options, key: &str) -> Result<Option<bool>, Failure> {
    node.text(key).map(|text| read_switch(key, &text)).transpose()
}

fn size(node: &Options, key: &str) -> Result<Option<u64>, Failure> {
    node.text(key).map(|text| read_size(key, &text)).transpose()
}

/// What the three sizes mean together: the first one is the sum of the others.
fn set_caches(options: &mut OpenOptions, node: &Options) -> Result<(), Failure> {
    let part = |of: u64, part: u64, key: &str| {
        of.checked_sub(part).ok_or_else(|| Failure::new(format!("{key} may not exceed cache-size")))
    };
    let (all, l2, refcounts) =
        (size(node, "cache-size")?, size(node, "l2-cache-size")?, size(node, "refcount-cache-size")?);
    let (l2, refcounts) = match (all, l2, refcounts) {
        (Some(_), Some(_), Some(_)) => {
            return Err(Failure::new(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ));
        }
        (Some(all), Some(l2), None) => (Some(l2), Some(part(all, l2, "l2-cache-size")?)),
        (Some(all), None, Some(refcounts)) => {
            (Some(part(all, refcounts, "refcount-cache-size")?), Some(refcounts))
        }
        // Lookups profit more from L2 tables, so these get most of it.
        (Some(all), None, None) => (Some(all - all / 8), Some(all / 8)),
        (None, l2, refcounts) => (l2, refcounts),
    };
    options.l2_cache_size = l2;
    options.refcount_cache_size = refcounts;
    Ok(())
}

/// The size of a cached piece of a table is the engine's own choice; only what could not be is refused.
fn check_entry_size(node: &Options, header: &Header) -> Result<(), Failure> {
    let Some(size) = size(node, "l2-cache-entry-size")? else { return Ok(()) };
    let cluster_size = header.geometry().map_or(0, |geometry| geometry.cluster_size());
    if size.is_power_of_two() && (512..=cluster_size).contains(&size) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster_size})"
    )))
}

fn overlap_checks(node: &Options) -> Result<OverlapChecks, Failure> {
    const KINDS: [(&str, OverlapChecks); 9] = [
        ("overlap-check.main-header", OverlapChecks::MAIN_HEADER),
        ("overlap-check.active-l1", OverlapChecks::ACTIVE_L1),
        ("overlap-check.active-l2", OverlapChecks::ACTIVE_L2),
        ("overlap-check.refcount-table", OverlapChecks::REFCOUNT_TABLE),
        ("overlap-check.refcount-block", OverlapChecks::REFCOUNT_BLOCK),
        ("overlap-check.snapshot-table", OverlapChecks::SNAPSHOT_TABLE),
        ("overlap-check.inactive-l1", OverlapChecks::INACTIVE_L1),
        ("overlap-check.inactive-l2", OverlapChecks::INACTIVE_L2),
        ("overlap-check.bitmap-directory", OverlapChecks::BITMAP_DIRECTORY),
    ];
    let (plain, template) = (node.text("overlap-check"), node.text("overlap-check.template"));
    if let (Some(plain), Some(template)) = (&plain, &template)
        && plain != template
    {
        return Err(Failure::new(format!(
            "Conflicting values for qcow2 options 'overlap-check' ('{plain}') and 'overlap-check.template' ('{template}')"
        )));
    }
    let mut checks = match plain.or(template).as_deref() {
        None | Some("cached") => OverlapChecks::CACHED,
        Some("none") => OverlapChecks::NONE,
        Some("constant") => OverlapChecks::CONSTANT,
        Some("all") => OverlapChecks::ALL,
        Some(other) => {
            return Err(Failure::new(format!(
                "Unsupported value '{other}' for qcow2 option 'overlap-check'. Allowed are any of the following: \
                 none, constant, cached, all"
            )));
        }
    };
    for (key, kind) in KINDS {
        checks = match switch(node, key)? {
            Some(true) => checks.with(kind),
            Some(false) => checks.without(kind),
            None => checks,
        };
    }
    Ok(checks)
}
