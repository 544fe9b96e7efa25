//! Filters: nodes that show the disk below them, and treat requests to it in a way of their own.

use crate::driver::{Driver, preallocation};
use crate::failure::FailureKind;
use crate::tree::Node;
use qcow2_core::GuestDisk;
use qcow2_io::{CompressWrites, CopyOnRead, FilteredDisk};
use std::sync::Arc;

/// What a filter does to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    /// Nothing that is seen in the disk.
    Nothing,
    /// What is written is compressed.
    Compress,
    /// What is read from backing files is kept.
    CopyOnRead,
}

impl Filter {
    /// The filter that `node` is. Errors: what it stands on, or its options, do not allow it.
    pub(super) fn of(node: &Node, writable: bool) -> Result<Self, FailureKind> {
        match node.driver() {
            Driver::Compress => match node.child().map_or(Driver::File, Node::driver) {
                Driver::Qcow2 => Ok(Self::Compress),
                other => Err(FailureKind::NoCompression(other)),
            },
            Driver::CopyOnRead if !writable => Err(FailureKind::ReadOnlyNode),
            Driver::CopyOnRead => Ok(Self::CopyOnRead),
            Driver::Preallocate => preallocation(&node.options).map(|()| Self::Nothing),
            Driver::Throttle => Err(FailureKind::NoThrottleGroup(node.options.text("throttle-group"))),
            Driver::CopyBeforeWrite => Err(FailureKind::NoTarget),
            _ => Ok(Self::Nothing),
        }
    }

    /// `disk`, which is `writable` or not, behind the filter.
    pub(super) fn on(self, disk: Arc<dyn GuestDisk>, writable: bool) -> Arc<dyn GuestDisk> {
        match self {
            Self::Compress if writable => match CompressWrites::new(Arc::clone(&disk)) {
                Some(filtered) => Arc::new(filtered),
                None => Arc::new(FilteredDisk::new(disk)),
            },
            Self::CopyOnRead if writable => Arc::new(FilteredDisk::new(Arc::new(CopyOnRead::new(disk)))),
            _ => Arc::new(FilteredDisk::new(disk)),
        }
    }
}
