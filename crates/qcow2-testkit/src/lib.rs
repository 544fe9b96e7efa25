//! A world for the tests of the qcow2 crates: disks to compare with, images made by hand, storages that lose
//! power or fail, and judges of what is left.
#![forbid(unsafe_code)]

pub mod arbitrary;
pub mod audit;
pub mod builder;
pub mod crash;
pub mod cut;
pub mod fault;
pub mod fuzz;
pub mod history;
pub mod model;
pub mod oracle;
pub mod pages;
pub mod pattern;
pub mod rng;
pub mod room;
pub mod sim;
pub mod storage;
pub mod toy;
pub mod world;
