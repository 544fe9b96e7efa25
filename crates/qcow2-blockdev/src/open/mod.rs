//! From a name to an opened disk.
//!
//! [`bytes`] opens the nodes below the format, from the bottom; `layers` has the engine open the image in
//! them and its chain; `named` and `other` open what the image or the user names beside it, along a `trail`.

mod backing;
mod bytes;
mod chain;
mod chosen;
mod cut_short;
mod filter;
mod layers;
mod look;
mod named;
mod options;
mod policy;
mod record;
mod scratch;
mod trail;

pub use backing::{BackingFile, KeptBacking, open_backing};
pub use bytes::NodeFacts;
pub(crate) use bytes::check_device;
pub use chain::ChainFiles;
pub use layers::{
    OpenedBytes, OpenedDisk, open, open_below, open_bytes, open_existing, open_layers, open_on,
    open_snapshot, open_telling,
};
pub use look::{Tell, bitmaps_to_lose, warnings_of_change};
pub use named::{locate_backing, permit_backing};
pub use options::{OpenOptions, Sharing};
pub use policy::{Feature, Follow, Policy, PolicyError, Refusal};
pub use record::LayerFiles;
pub use scratch::open_scratch;
