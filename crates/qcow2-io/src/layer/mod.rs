//! Wrappers: around a storage that are a storage themselves, around a disk that are a disk themselves.

mod blkdebug;
mod cache_mode;
mod copy_on_read;
mod guarded_raw;
mod limit;
mod trace;
mod window;

pub use blkdebug::{BlkdebugStorage, DebugAction, DebugCall, DebugRule, Debugger, Injection, StopNews};
pub use cache_mode::{CacheMode, FlushEachWrite, NoFlush};
pub use copy_on_read::CopyOnRead;
pub use guarded_raw::GuardedRaw;
pub use limit::LimitStorage;
pub use trace::{StorageCall, StorageCounts, StorageEvent, TraceStorage};
pub use window::WindowStorage;

/// Writes the `Storage` methods named, each handing over to the field `inner`.
macro_rules! forward {
    ($($method:ident)*) => { $(forward!(@ $method);)* };
    (@ len) => {
        fn len(&self) -> Result<u64, StorageError> {
            self.inner.len()
        }
    };
    (@ read_at) => {
        fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
            self.inner.read_at(offset, buf)
        }
    };
    (@ write_at) => {
        fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
            self.inner.write_at(offset, buf)
        }
    };
    (@ write_vectored_at) => {
        fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
            self.inner.write_vectored_at(offset, bufs)
        }
    };
    (@ write_zeroes) => {
        fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
            self.inner.write_zeroes(offset, len, mode)
        }
    };
    (@ discard) => {
        fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
            self.inner.discard(offset, len)
        }
    };
    (@ allocate) => {
        fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
            self.inner.allocate(offset, len)
        }
    };
    (@ set_len) => {
        fn set_len(&self, len: u64) -> Result<(), StorageError> {
            self.inner.set_len(len)
        }
    };
    (@ flush) => {
        fn flush(&self) -> Result<(), StorageError> {
            self.inner.flush()
        }
    };
    (@ extent_at) => {
        fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
            self.inner.extent_at(offset, len)
        }
    };
    (@ limits) => {
        fn limits(&self) -> Limits {
            self.inner.limits()
        }
    };
    (@ events) => {
        fn events(&self) -> Option<std::sync::Arc<dyn qcow2_core::Events>> {
            self.inner.events()
        }
    };
    (@ copy_from) => {
        fn copy_from(
            &self,
            source: &dyn Storage,
            from: HostOffset,
            offset: HostOffset,
            len: u64,
        ) -> Result<(), StorageError> {
            self.inner.copy_from(source, from, offset, len)
        }
    };
    (@ copy_source) => {
        fn copy_source(&self) -> Option<&dyn std::any::Any> {
            self.inner.copy_source()
        }
    };
    (@ used_bytes) => {
        fn used_bytes(&self) -> Result<Option<u64>, StorageError> {
            self.inner.used_bytes()
        }
    };
}
use forward;
