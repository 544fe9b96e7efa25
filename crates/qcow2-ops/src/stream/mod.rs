//! Images through pipes: written front to back in one pass, read front to back as far as the order of bytes
//! allows.
//!
//! Nothing is kept in a temporary file. A stream that is written knows its tables before its first byte: they
//! follow from what the source says of its ranges.

mod read;
mod write;

pub use read::{MAX_HELD, StreamedImage, stream_raw_in};
pub use write::{StreamOptions, stream_qcow2, stream_raw};
