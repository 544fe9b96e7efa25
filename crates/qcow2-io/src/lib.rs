//! Storage adapters for qcow2 images: the only crate that touches files.
//!
//! | need | adapter |
//! |---|---|
//! | an image in a file or on a block device | [`OpenFile`], which makes a [`FileStorage`] |
//! | the file a user named, its format, and a way to the files it names | [`open_source`] |
//! | the files an image names, within a policy | [`FileResolver`] |
//! | to never write to a file that is read too | [`OpenFiles`] |
//! | an image in memory, for tests and tools | [`MemoryStorage`] |
//! | fewer or more flushes than the caller asks for | [`CacheMode`], [`NoFlush`], [`FlushEachWrite`] |
//! | to know which calls reach a storage | [`TraceStorage`] |
//! | a full disk to order | [`LimitStorage`] |
//! | calls that fail at chosen steps of the engine | [`BlkdebugStorage`] |
//! | a disk that keeps what it reads from the layers below | [`CopyOnRead`] |
//! | a guessed raw disk that nobody turns into another format | [`GuardedRaw`] |
//! | a part of a storage | [`WindowStorage`] |
//! | a disk that a server shows (NBD) | [`NbdStorage`] |
//! | a disk of nothing | [`NullStorage`] |
//! | to test an adapter of your own | `conformance` (a feature) |
#![deny(unsafe_code)]

#[cfg(feature = "conformance")]
pub mod conformance;
mod direct;
mod dirty;
mod error;
mod file;
mod layer;
mod lock;
mod memory;
mod nbd;
mod null;
mod open;
mod open_files;
mod probe;
mod resolve;
mod space;
mod sys;

pub use error::{OsError, os_error_text};
pub use file::FileStorage;
pub use layer::{
    BlkdebugStorage, CacheMode, CopyOnRead, DebugAction, DebugCall, DebugRule, Debugger, FlushEachWrite,
    GuardedRaw, Injection, LimitStorage, NoFlush, StopNews, StorageCall, StorageCounts, StorageEvent,
    TraceStorage, WindowStorage,
};
pub use lock::{LockConflict, Locking, Permission};
pub use memory::MemoryStorage;
pub use nbd::{NbdAddress, NbdError, NbdStorage};
pub use null::NullStorage;
pub use open::{Create, OpenError, OpenErrorKind, OpenFile};
pub use open_files::{HeldFile, OpenFiles, SameFile};
pub use probe::{format_from_name, probe_format};
pub use resolve::{FileResolver, Policy, SourceError, SourceOptions, open_source};
