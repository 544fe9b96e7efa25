//! Filters: nodes that show the disk below them, and treat requests to it in a way of their own.

use super::options::OpenOptions;
use crate::driver::{Driver, preallocation};
use crate::failure::FailureKind;
use crate::keys::Secrets;
use crate::scalar::{OptionError, OptionErrorKind, read_number, read_size};
use crate::tree::{Node, Options};
use qcow2_core::format::text::bytes_of;
use qcow2_core::{GuestDisk, RawDisk, Storage};
use qcow2_io::{
    BeforeWrite, CompressWrites, CopyBeforeWrite, CopyOnRead, DiskStorage, FilteredDisk, ThrottleGroup,
    ThrottledDisk, ThrottledStorage,
};
use std::sync::Arc;

/// What opens the disk that gets old content, for writing.
pub(super) type OpenTarget<'a> = &'a dyn Fn(&Node) -> Result<Arc<dyn GuestDisk>, FailureKind>;

/// What a filter does to a disk.
#[derive(Clone)]
pub(super) enum Filter {
    /// Nothing that is seen in the disk.
    Nothing,
    /// What is written is compressed.
    Compress,
    /// What is read from backing files is kept, of so many of them at most.
    CopyOnRead(Option<usize>),
    /// Requests wait for a group's limits.
    Throttle(Arc<ThrottleGroup>),
    /// Old content is kept before it changes.
    BeforeWrite(BeforeWrite),
}

impl Filter {
    /// The filter that `node` is, on a disk that is opened as `how` says. `shown`: that disk, where it is
    /// open already. Disk: opens the target of old content, for writing. Errors: what it stands on, or its
    /// options, do not allow it.
    pub(super) fn of(
        node: &Node,
        how: &OpenOptions,
        secrets: &Secrets,
        shown: Option<&dyn GuestDisk>,
        open: OpenTarget<'_>,
    ) -> Result<Self, FailureKind> {
        match node.driver() {
            Driver::Compress => match node.child().map_or(Driver::File, Node::driver) {
                Driver::Qcow2 => Ok(Self::Compress),
                other => Err(FailureKind::NoCompression(other)),
            },
            Driver::CopyOnRead => {
                let bottom = node.options.text("bottom");
                let layers = bottom.as_deref().map(|bottom| node.child()?.layer_called(bottom));
                match (layers, bottom) {
                    (Some(None), Some(bottom)) => Err(FailureKind::NoBottomNode(bottom)),
                    _ if !how.writable => Err(FailureKind::ReadOnlyNode),
                    (layers, _) => Ok(Self::CopyOnRead(layers.flatten())),
                }
            }
            Driver::Preallocate => preallocation(&node.options).map(|()| Self::Nothing),
            Driver::Throttle => {
                let name = node.options.text("throttle-group");
                let group = name.as_deref().and_then(|name| secrets.throttle_group(name));
                group.map(Self::Throttle).ok_or(FailureKind::NoThrottleGroup(name))
            }
            Driver::CopyBeforeWrite => before_write(node, how, shown, open).map(Self::BeforeWrite),
            _ => Ok(Self::Nothing),
        }
    }

    /// `disk`, which is `writable` or not, behind the filter.
    pub(super) fn on(&self, disk: Arc<dyn GuestDisk>, writable: bool) -> Arc<dyn GuestDisk> {
        let plain = |disk| -> Arc<dyn GuestDisk> { Arc::new(FilteredDisk::new(disk)) };
        match self {
            Self::Compress if writable => match CompressWrites::new(Arc::clone(&disk)) {
                Some(filtered) => Arc::new(filtered),
                None => plain(disk),
            },
            Self::CopyOnRead(layers) if writable => {
                plain(Arc::new(CopyOnRead::new(disk).from_layers(*layers)))
            }
            Self::Throttle(group) => Arc::new(ThrottledDisk::new(plain(disk), Arc::clone(group))),
            Self::BeforeWrite(rules) => Arc::new(CopyBeforeWrite::new(plain(disk), rules.clone())),
            _ => plain(disk),
        }
    }

    /// `storage`, which is `writable` or not, behind the filter, where no image is below that would have a
    /// disk of its own.
    pub(super) fn on_storage(
        &self,
        storage: Arc<dyn Storage>,
        writable: bool,
    ) -> Result<Arc<dyn Storage>, FailureKind> {
        Ok(match self {
            Self::Throttle(group) => Arc::new(ThrottledStorage::new(storage, Arc::clone(group))),
            Self::BeforeWrite(_) => {
                let disk = RawDisk::new(storage, writable)?;
                Arc::new(DiskStorage::new(self.on(Arc::new(disk), writable)))
            }
            _ => storage,
        })
    }
}

/// What `node` says of old content.
fn before_write(
    node: &Node,
    how: &OpenOptions,
    shown: Option<&dyn GuestDisk>,
    open: OpenTarget<'_>,
) -> Result<BeforeWrite, FailureKind> {
    let target = node.second().ok_or_else(|| FailureKind::Missing("target".to_owned()))?;
    let options = &node.options;
    let bitmap = match (options.text("bitmap.node"), options.text("bitmap.name")) {
        (Some(_), None) => return Err(FailureKind::Missing("bitmap.name".to_owned())),
        (None, Some(_)) => return Err(FailureKind::Missing("bitmap.node".to_owned())),
        (node, name) => node.zip(name),
    };
    let may_break = match options.text("on-cbw-error").as_deref() {
        None | Some("break-guest-write") => false,
        Some("break-snapshot") => true,
        Some(other) => {
            return Err(OptionError::new("on-cbw-error", other, OptionErrorKind::NotAChoice).into());
        }
    };
    check_timeout(options)?;
    let step =
        options.text("min-cluster-size").map(|text| read_size("min-cluster-size", &text)).transpose()?;
    let step = step.unwrap_or(0);
    if let Some(unknown) = node.unknown_option(node.driver(), false) {
        return Err(unknown);
    }
    if !how.writable {
        return Err(FailureKind::ReadOnlyNode);
    }
    let target = open(target)?;
    if step != 0 && !step.is_power_of_two() {
        return Err(FailureKind::UnevenClusters(step));
    }
    let mut rules = BeforeWrite::new(target);
    rules.only = match bitmap {
        None => None,
        Some((of, name)) => Some(marked(node, shown, &of, &name)?),
    };
    // More would be copied at once than memory should hold.
    (rules.min_cluster_size, rules.may_break) = (step.min(MAX_STEP), may_break);
    Ok(rules)
}

/// The guest bytes that bitmap `name` of the node called `of` marks; that is the one which `filter` shows.
fn marked(
    filter: &Node,
    shown: Option<&dyn GuestDisk>,
    of: &str,
    name: &str,
) -> Result<Vec<(u64, u64)>, FailureKind> {
    let child = filter.child().filter(|child| child.options.text("node-name").as_deref() == Some(of));
    let image = child.and(shown).and_then(|disk| disk.unfiltered().as_image());
    let image = image.ok_or_else(|| FailureKind::NoBitmapNode(of.to_owned()))?;
    let bytes = bytes_of(name);
    if image.bitmaps()?.iter().all(|bitmap| bitmap.name != *bytes) {
        return Err(FailureKind::NoBitmap(name.to_owned()));
    }
    Ok(image.bitmap_bits(&bytes)?.marked_runs().collect())
}

/// How many seconds keeping old content may take: known, and without effect, since nothing here gives up a
/// request that it has begun.
fn check_timeout(options: &Options) -> Result<(), OptionError> {
    let Some(text) = options.text("cbw-timeout") else { return Ok(()) };
    let wrong = |kind| Err(OptionError::new("cbw-timeout", &text, kind));
    match read_number("cbw-timeout", &text) {
        Err(_) => wrong(OptionErrorKind::NotAnInteger),
        Ok(seconds) if seconds > u64::from(u32::MAX) => wrong(OptionErrorKind::NotAU32),
        Ok(_) => Ok(()),
    }
}

/// The most bytes of old content that are copied at once. Origin: ours; QEMU stops at a bound of its own.
const MAX_STEP: u64 = 64 << 20;
