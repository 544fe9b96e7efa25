//! Wrappers: around a storage that are a storage themselves, around a disk that are a disk themselves.

mod before_write;
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
mod shown;
mod throttle;
mod throttle_group;
mod throttled;
mod trace;
mod verify;
mod window;

pub use before_write::{BeforeWrite, CopyBeforeWrite};
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
pub use shown::ShownDisk;
pub use throttle::ThrottleStorage;
pub use throttle_group::{
    LimitError, Pace, Rate, Rates, RequestKind, SystemPace, ThrottleGroup, ThrottleLimits,
};
pub use throttled::{ThrottledDisk, ThrottledStorage};
pub use trace::{StorageCall, StorageCounts, StorageEvent, TraceStorage};
pub use verify::{Mismatch, MismatchKind, MismatchObserver, VerifyStorage};
pub use window::WindowStorage;
