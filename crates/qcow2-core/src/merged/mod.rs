//! What an image and the layers below it answer together, for images that nobody changes any more: a read
//! that falls through many layers costs what a read of one layer costs.
//!
//! Invariant: an answer that is kept stays true as long as it can be found. Only layers are merged that take
//! no changes: opened for reading, or closed. A layer that may change, and everything below it, is asked at
//! each read. Where layers can be exchanged, an exchange drops the answers of every image above it first, see
//! [`view::Watchers`].

mod extent;
mod fill;
mod index;
mod merge;
mod read;
pub(crate) mod view;
