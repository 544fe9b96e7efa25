//! Suites across the crates stand in `tests/`; here is what they share.
#![forbid(unsafe_code)]

pub mod copies;
pub mod fixtures;
pub mod fuzz;
pub mod jitter;
pub mod patience;
pub mod side_by_side;
