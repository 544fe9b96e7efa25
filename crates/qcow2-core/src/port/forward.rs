//! Macros for storages and disks that wrap another one.

#[doc(hidden)]
pub use alloc::sync::Arc;

/// Implements the named [`Storage`](crate::Storage) methods by calling the same method of a field. For
/// storages that wrap another one and change some of its calls.
///
/// The wrapper lists the methods to forward, not the exceptions: a wrapper that observes, limits or delays
/// all I/O must not forward a method that is added to the trait later. A method that is neither forwarded nor
/// written has the trait's default body, which may be slower and is never wrong.
///
/// ```
/// use qcow2_core::{HostOffset, Storage, StorageError, StorageErrorKind, ZeroMode, forward_storage};
/// use std::sync::Arc;
///
/// /// Refuses all changes.
/// struct ReadOnly {
///     inner: Arc<dyn Storage>,
/// }
///
/// fn refused() -> Result<(), StorageError> {
///     Err(StorageError::new(StorageErrorKind::ReadOnly, "opened for reading only"))
/// }
///
/// impl Storage for ReadOnly {
///     forward_storage!(inner: len read_at flush extent_at limits used_bytes copy_source);
///
///     fn write_at(&self, _: HostOffset, _: &[u8]) -> Result<(), StorageError> {
///         refused()
///     }
///
///     fn write_zeroes(&self, _: HostOffset, _: u64, _: ZeroMode) -> Result<(), StorageError> {
///         refused()
///     }
///
///     fn discard(&self, _: HostOffset, _: u64) -> Result<(), StorageError> {
///         refused()
///     }
///
///     fn allocate(&self, _: HostOffset, _: u64) -> Result<(), StorageError> {
///         refused()
///     }
///
///     fn set_len(&self, _: u64) -> Result<(), StorageError> {
///         refused()
///     }
/// }
/// ```
#[macro_export]
macro_rules! forward_storage {
    ($inner:ident: $($method:ident)*) => { $($crate::forward_storage!(@ $inner $method);)* };
    (@ $inner:ident fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty) => {
        fn $name(&self, $($arg: $type),*) -> $result {
            self.$inner.$name($($arg),*)
        }
    };
    (@ $inner:ident len) => {
        $crate::forward_storage!(@ $inner fn len() -> Result<u64, $crate::StorageError>);
    };
    (@ $inner:ident read_at) => {
        $crate::forward_storage!(@ $inner fn read_at(offset: $crate::HostOffset, buf: &mut [u8])
            -> Result<usize, $crate::StorageError>);
    };
    (@ $inner:ident write_at) => {
        $crate::forward_storage!(@ $inner fn write_at(offset: $crate::HostOffset, buf: &[u8])
            -> Result<(), $crate::StorageError>);
    };
    (@ $inner:ident write_vectored_at) => {
        $crate::forward_storage!(@ $inner fn write_vectored_at(offset: $crate::HostOffset, bufs: &[&[u8]])
            -> Result<(), $crate::StorageError>);
    };
    (@ $inner:ident write_zeroes) => {
        $crate::forward_storage!(@ $inner fn write_zeroes(
            offset: $crate::HostOffset, len: u64,
            mode: $crate::ZeroMode
        ) -> Result<(), $crate::StorageError>);
    };
    (@ $inner:ident discard) => {
        $crate::forward_storage!(@ $inner fn discard(offset: $crate::HostOffset, len: u64)
            -> Result<(), $crate::StorageError>);
    };
    (@ $inner:ident allocate) => {
        $crate::forward_storage!(@ $inner fn allocate(offset: $crate::HostOffset, len: u64)
            -> Result<(), $crate::StorageError>);
    };
    (@ $inner:ident set_len) => {
        $crate::forward_storage!(@ $inner fn set_len(len: u64) -> Result<(), $crate::StorageError>);
    };
    (@ $inner:ident flush) => {
        $crate::forward_storage!(@ $inner fn flush() -> Result<(), $crate::StorageError>);
    };
    (@ $inner:ident extent_at) => {
        $crate::forward_storage!(@ $inner fn extent_at(offset: $crate::HostOffset, len: u64)
            -> Result<$crate::StorageExtent, $crate::StorageError>);
    };
    (@ $inner:ident status_at) => {
        $crate::forward_storage!(@ $inner fn status_at(offset: $crate::HostOffset, len: u64)
            -> Result<Option<$crate::StorageStatus>, $crate::StorageError>);
    };
    (@ $inner:ident limits) => {
        $crate::forward_storage!(@ $inner fn limits() -> $crate::Limits);
    };
    (@ $inner:ident used_bytes) => {
        $crate::forward_storage!(@ $inner fn used_bytes() -> Result<Option<u64>, $crate::StorageError>);
    };
    (@ $inner:ident events) => {
        $crate::forward_storage!(@ $inner fn events()
            -> Option<$crate::port::forward::Arc<dyn $crate::Events>>);
    };
    (@ $inner:ident guest_disk) => {
        $crate::forward_storage!(@ $inner fn guest_disk()
            -> Option<(&dyn ::core::any::Any, $crate::GuestOffset)>);
    };
    (@ $inner:ident copy_from) => {
        $crate::forward_storage!(@ $inner fn copy_from(
            source: &dyn $crate::Storage, from: $crate::HostOffset,
            offset: $crate::HostOffset, len: u64
        ) -> Result<(), $crate::StorageError>);
    };
    (@ $inner:ident copy_source) => {
        $crate::forward_storage!(@ $inner fn copy_source() -> Option<&dyn ::core::any::Any>);
    };
}

/// Implements the named [`GuestDisk`](crate::GuestDisk) methods by calling the same method of a field. For
/// disks that wrap another one and change some of its calls. As with
/// [`forward_storage`](crate::forward_storage) the wrapper lists the methods to forward; `backing`,
/// `cluster_size`, `zero_granularity`, `write_parts` and `as_any` have default bodies, all others must be
/// forwarded or written.
///
/// ```
/// use qcow2_core::{GuestDisk, GuestOffset, Result, forward_guest_disk};
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// /// Counts the bytes that are read.
/// struct Counted {
///     inner: Arc<dyn GuestDisk>,
///     bytes: AtomicU64,
/// }
///
/// impl GuestDisk for Counted {
///     forward_guest_disk!(inner:
///         size write_at write_parts write_zeroes discard flush extent_at backing cluster_size
///         zero_granularity resize
///     );
///
///     fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
///         self.bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
///         self.inner.read_at(offset, buf)
///     }
/// }
/// ```
#[macro_export]
macro_rules! forward_guest_disk {
    ($inner:ident: $($method:ident)*) => { $($crate::forward_guest_disk!(@ $inner $method);)* };
    (@ $inner:ident fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty) => {
        fn $name(&self, $($arg: $type),*) -> $result {
            self.$inner.$name($($arg),*)
        }
    };
    (@ $inner:ident size) => {
        $crate::forward_guest_disk!(@ $inner fn size() -> u64);
    };
    (@ $inner:ident read_at) => {
        $crate::forward_guest_disk!(@ $inner fn read_at(offset: $crate::GuestOffset, buf: &mut [u8])
            -> $crate::Result<()>);
    };
    (@ $inner:ident write_at) => {
        $crate::forward_guest_disk!(@ $inner fn write_at(offset: $crate::GuestOffset, buf: &[u8])
            -> $crate::Result<()>);
    };
    (@ $inner:ident write_parts) => {
        $crate::forward_guest_disk!(@ $inner fn write_parts(parts: &[($crate::GuestOffset, &[u8])])
            -> $crate::Result<()>);
    };
    (@ $inner:ident write_zeroes) => {
        $crate::forward_guest_disk!(@ $inner fn write_zeroes(
            range: $crate::GuestRange, mode: $crate::ZeroMode
        ) -> $crate::Result<()>);
    };
    (@ $inner:ident discard) => {
        $crate::forward_guest_disk!(@ $inner fn discard(range: $crate::GuestRange) -> $crate::Result<()>);
    };
    (@ $inner:ident flush) => {
        $crate::forward_guest_disk!(@ $inner fn flush() -> $crate::Result<()>);
    };
    (@ $inner:ident extent_at) => {
        $crate::forward_guest_disk!(@ $inner fn extent_at(range: $crate::GuestRange)
            -> $crate::Result<$crate::DiskExtent>);
    };
    (@ $inner:ident backing) => {
        $crate::forward_guest_disk!(@ $inner fn backing()
            -> Option<&$crate::port::forward::Arc<dyn $crate::GuestDisk>>);
    };
    (@ $inner:ident cluster_size) => {
        $crate::forward_guest_disk!(@ $inner fn cluster_size() -> u64);
    };
    (@ $inner:ident zero_granularity) => {
        $crate::forward_guest_disk!(@ $inner fn zero_granularity() -> u64);
    };
    (@ $inner:ident as_any) => {
        $crate::forward_guest_disk!(@ $inner fn as_any() -> Option<&dyn ::core::any::Any>);
    };
    (@ $inner:ident resize) => {
        $crate::forward_guest_disk!(@ $inner fn resize(size: u64) -> $crate::Result<()>);
    };
}
