//! Where guest bytes are, and how they come from there.

pub(crate) mod expanded;
pub(crate) mod fetch;
pub(crate) mod resolve;
