//! From what people type to opened disks.
//!
//! | need | here |
//! |---|---|
//! | a number of bytes as people type it: `10G`, `0x200`, `1.5k` | [`parse_size`] |
#![forbid(unsafe_code)]

mod size;

pub use size::{SizeError, parse_size};
