//! The ports: what the engine asks of the world, and what it offers to it.

pub mod cipher;
pub mod codec;
pub mod disk;
pub mod event;
pub mod forward;
pub mod resolver;
pub mod storage;
