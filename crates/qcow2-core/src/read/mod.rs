//! Guest reads: from a guest range to extents, from extents to bytes.

pub(crate) mod expanded;
pub(crate) mod fetch;
pub(crate) mod resolve;
