//! Helpers for the test suites across the crates, which are in `tests/`.
#![forbid(unsafe_code)]

pub mod campaign;
pub mod copies;
pub mod fixtures;
pub mod fuzz;
pub mod hunt;
pub mod jitter;
pub mod nbd_server;
pub mod patience;
pub mod side_by_side;
pub mod start;
pub mod stop;
