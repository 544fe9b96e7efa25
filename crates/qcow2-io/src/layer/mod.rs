//! Wrappers: around a storage that are a storage themselves, around a disk that are a disk themselves.

mod blkdebug;
mod cache_mode;
mod compress;
mod copy_on_read;
mod debug_limits;
mod debug_requests;
mod disk;
mod filtered;
mod guarded_raw;
mod limit;
mod raw_events;
mod throttle;
mod trace;
mod window;

pub use blkdebug::{BlkdebugStorage, DebugAction, DebugCall, DebugRule, Debugger, Injection, StopNews};
pub use cache_mode::{CacheMode, FlushEachWrite, NoFlush};
pub use compress::CompressWrites;
pub use copy_on_read::CopyOnRead;
pub use debug_limits::DebugLimits;
pub use disk::DiskStorage;
pub use filtered::FilteredDisk;
pub use guarded_raw::GuardedRaw;
pub use limit::LimitStorage;
pub use raw_events::RawEvents;
pub use throttle::ThrottleStorage;
pub use trace::{StorageCall, StorageCounts, StorageEvent, TraceStorage};
pub use window::WindowStorage;
