//! Images through pipes: written in one pass, and read in one pass as far as the order of the clusters
//! allows.
//!
//! No temporary files are used. A written stream contains its tables before the data; they are computed from
//! the block status of the source.

mod read;
mod start;
mod write;

pub use read::{MAX_HELD, StreamedImage, stream_raw_in};
pub use start::{Begun, begin_stream};
pub use write::{StreamOptions, stream_qcow2, stream_raw};
