//! A macro for storages that wrap another one.

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
