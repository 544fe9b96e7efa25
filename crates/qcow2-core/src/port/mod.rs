//! The ports: traits through which the engine does I/O, and which it implements for its callers.

pub mod cipher;
pub mod codec;
pub mod disk;
pub mod event;
pub mod forward;
pub mod resolver;
pub mod storage;
