//! Test tools for the qcow2 crates: a model disk, an image builder, storages that lose power or fail, an
//! independent image checker, and simulations that combine them.
#![forbid(unsafe_code)]

pub mod arbitrary;
pub mod audit;
pub mod builder;
pub mod crash;
pub mod cut;
pub mod fault;
pub mod fuzz;
pub mod history;
pub mod locks;
pub mod model;
pub mod oracle;
pub mod pages;
pub mod pattern;
pub mod rng;
pub mod room;
pub mod semantic;
pub mod shaped;
pub mod sim;
pub mod storage;
pub mod tables;
pub mod toy;
pub mod world;
