//! A world for the tests of the qcow2 crates: storages that lose power or fail, and judges of what is left.

pub mod crash;
pub mod cut;
pub mod fault;
pub mod pages;
pub mod rng;
pub mod storage;
