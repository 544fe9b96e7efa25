//! The options of an image that say how the engine runs it, not what it holds: caches, checks, what becomes
//! of space.

use crate::scalar::{OptionError, read_number, read_size, read_switch};
use crate::tree::Options;
use qcow2_core::format::{Header, Version};
use qcow2_core::{OpenOptions, OverlapChecks};
use std::fmt;

/// Options of a qcow2 image that do not go with the image or with each other.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TuningError {
    /// A value that its option does not take.
    Option(OptionError),
    /// More seconds between two cleanings of the caches than fit 32 bits.
    CleanInterval,
    /// An option that takes a qcow2 image of version 3.
    NeedsVersion3(&'static str),
    /// The size of one cache, named here, is larger than that of both together.
    LargerThanAll(&'static str),
    /// All three sizes of caches are given, of which two determine the third.
    ThreeSizes,
    /// The size of a cached piece of a table is no power of two from 512 to the size of a cluster.
    EntrySize {
        /// Bytes of a cluster.
        cluster_size: u64,
    },
    /// The two names of one option have different values.
    OverlapConflict {
        /// That of `overlap-check`.
        plain: String,
        /// That of `overlap-check.template`.
        template: String,
    },
    /// A set of overlap checks that is not known.
    OverlapTemplate(String),
}

impl fmt::Display for TuningError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Option(error) => error.fmt(f),
            Self::CleanInterval => {
                f.write_str("the interval between two cleanings of the caches is too long")
            }
            Self::NeedsVersion3(option) => write!(f, "{option} takes a qcow2 image of version 3"),
            Self::LargerThanAll(option) => write!(f, "{option} is larger than cache-size"),
            Self::ThreeSizes => {
                f.write_str("of cache-size, l2-cache-size and refcount-cache-size two can be given")
            }
            Self::EntrySize { cluster_size } => {
                write!(f, "l2-cache-entry-size is a power of two from 512 to {cluster_size}")
            }
            Self::OverlapConflict { plain, template } => {
                write!(f, "overlap-check is '{plain}' and overlap-check.template '{template}'")
            }
            Self::OverlapTemplate(text) => {
                write!(f, "overlap-check is none, constant, cached or all, not '{text}'")
            }
        }
    }
}

impl std::error::Error for TuningError {}

impl From<OptionError> for TuningError {
    fn from(error: OptionError) -> Self {
        Self::Option(error)
    }
}

/// Sets what `node`, the options of a qcow2 image with `header`, asks of the engine. Errors: the first option
/// that is not of its type or does not go with the others.
pub(crate) fn tune(options: &mut OpenOptions, node: &Options, header: &Header) -> Result<(), TuningError> {
    set_caches(options, node)?;
    check_entry_size(node, header)?;
    const LONGEST_INTERVAL: u64 = u32::MAX as u64;
    let interval = node.text("cache-clean-interval").map(|text| read_number("cache-clean-interval", &text));
    if interval.transpose()?.is_some_and(|seconds| seconds > LONGEST_INTERVAL) {
        return Err(TuningError::CleanInterval);
    }
    if switch(node, "lazy-refcounts")? == Some(true) && header.version < Version::V3 {
        return Err(TuningError::NeedsVersion3("lazy-refcounts"));
    }
    options.overlap_checks = overlap_checks(node)?;
    let pass_request = switch(node, "pass-discard-request")?;
    switch(node, "pass-discard-snapshot")?;
    switch(node, "pass-discard-other")?;
    options.discard_freed = options.writable && pass_request.unwrap_or(true);
    options.discard_no_unref = switch(node, "discard-no-unref")?.unwrap_or(false);
    if options.discard_no_unref && header.version < Version::V3 {
        return Err(TuningError::NeedsVersion3("discard-no-unref"));
    }
    Ok(())
}

fn switch(node: &Options, key: &str) -> Result<Option<bool>, OptionError> {
    node.text(key).map(|text| read_switch(key, &text)).transpose()
}

fn size(node: &Options, key: &str) -> Result<Option<u64>, OptionError> {
    node.text(key).map(|text| read_size(key, &text)).transpose()
}

/// What the three sizes mean together: the first one is the sum of the others.
fn set_caches(options: &mut OpenOptions, node: &Options) -> Result<(), TuningError> {
    let part = |of: u64, part: u64, key| of.checked_sub(part).ok_or(TuningError::LargerThanAll(key));
    let (all, l2, refcounts) =
        (size(node, "cache-size")?, size(node, "l2-cache-size")?, size(node, "refcount-cache-size")?);
    let (l2, refcounts) = match (all, l2, refcounts) {
        (Some(_), Some(_), Some(_)) => {
            return Err(TuningError::ThreeSizes);
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
fn check_entry_size(node: &Options, header: &Header) -> Result<(), TuningError> {
    let Some(size) = size(node, "l2-cache-entry-size")? else { return Ok(()) };
    let cluster_size = header.geometry().map_or(0, |geometry| geometry.cluster_size());
    if size.is_power_of_two() && (512..=cluster_size).contains(&size) {
        return Ok(());
    }
    Err(TuningError::EntrySize { cluster_size })
}

fn overlap_checks(node: &Options) -> Result<OverlapChecks, TuningError> {
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
        return Err(TuningError::OverlapConflict { plain: plain.clone(), template: template.clone() });
    }
    let mut checks = match plain.or(template).as_deref() {
        None | Some("cached") => OverlapChecks::CACHED,
        Some("none") => OverlapChecks::NONE,
        Some("constant") => OverlapChecks::CONSTANT,
        Some("all") => OverlapChecks::ALL,
        Some(other) => {
            return Err(TuningError::OverlapTemplate(other.to_owned()));
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
