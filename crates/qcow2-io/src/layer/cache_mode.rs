//! Cache modes as QEMU names them, and the two wrappers that make up the unusual ones.

use qcow2_core::{HostOffset, Storage, StorageError, ZeroMode, forward_storage};
use std::sync::Arc;

/// What happens between a write and the medium.
///
/// | mode | page cache | flush |
/// |---|---|---|
/// | `writeback` | used | when asked |
/// | `none` | bypassed | when asked |
/// | `writethrough` | used | after every change |
/// | `directsync` | bypassed | after every change |
/// | `unsafe` | used | never: a crash of the host may lose anything |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheMode {
    /// Through the page cache; durable when flushed.
    #[default]
    Writeback,
    /// Around the page cache; durable when flushed.
    None,
    /// Through the page cache; every change is durable when its call returns.
    Writethrough,
    /// Around the page cache; every change is durable when its call returns.
    Directsync,
    /// Through the page cache; flushes do nothing.
    Unsafe,
}

impl CacheMode {
    /// The mode that QEMU's tools call `name` (`off` is `none` too); `None` for an unknown name.
    ///
    /// ```
    /// use qcow2_io::CacheMode;
    /// assert_eq!(CacheMode::parse("off"), Some(CacheMode::None));
    /// assert_eq!(CacheMode::parse("foo"), None);
    /// ```
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "writeback" => Self::Writeback,
            "none" | "off" => Self::None,
            "writethrough" => Self::Writethrough,
            "directsync" => Self::Directsync,
            "unsafe" => Self::Unsafe,
            _ => return None,
        })
    }

    /// Whether the page cache is bypassed.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    /// Whether every change is durable when its call returns.
    pub fn is_writethrough(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }

    /// The mode with single properties changed: whether the page cache is passed by, and whether flushes are
    /// dropped. Whether each write is durable when it returns stays as it is.
    #[must_use]
    pub fn with_flags(self, direct: Option<bool>, no_flush: Option<bool>) -> Self {
        let direct = direct.unwrap_or_else(|| self.is_direct());
        let no_flush = no_flush.unwrap_or(self == Self::Unsafe);
        match (direct, no_flush, self.is_writethrough()) {
            (_, true, _) => Self::Unsafe,
            (true, false, true) => Self::Directsync,
            (true, false, false) => Self::None,
            (false, false, true) => Self::Writethrough,
            (false, false, false) => Self::Writeback,
        }
    }

    /// `storage` with this mode's way to flush. Bypassing the page cache is not done here: that is a matter
    /// of how the file was opened.
    pub fn wrap(self, storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
        match self {
            Self::Writeback | Self::None => storage,
            Self::Writethrough | Self::Directsync => Arc::new(FlushEachWrite::new(storage)),
            Self::Unsafe => Arc::new(NoFlush::new(storage)),
        }
    }
}

/// A storage that does not flush: for scratch images, whose loss in a crash of the host does no harm.
pub struct NoFlush {
    inner: Arc<dyn Storage>,
}

impl NoFlush {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner }
    }
}

impl Storage for NoFlush {
    forward_storage!(inner:
        len read_at write_at write_vectored_at write_zeroes discard allocate set_len extent_at status_at
        limits used_bytes events guest_disk copy_from copy_source
    );

    fn flush(&self) -> Result<(), StorageError> {
        Ok(())
    }
}

/// A storage whose every change is durable when its call returns. Discards are hints and not flushed.
pub struct FlushEachWrite {
    inner: Arc<dyn Storage>,
}

impl FlushEachWrite {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner }
    }

    fn durable(&self, result: Result<(), StorageError>) -> Result<(), StorageError> {
        result.and_then(|()| self.inner.flush())
    }
}

impl Storage for FlushEachWrite {
    forward_storage!(inner:
        len read_at discard flush extent_at status_at limits used_bytes events guest_disk copy_source
    );

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.durable(self.inner.write_at(offset, buf))
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        self.durable(self.inner.write_vectored_at(offset, bufs))
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        self.durable(self.inner.write_zeroes(offset, len, mode))
    }

    fn copy_from(
        &self,
        source: &dyn Storage,
        from: HostOffset,
        offset: HostOffset,
        len: u64,
    ) -> Result<(), StorageError> {
        self.durable(self.inner.copy_from(source, from, offset, len))
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.durable(self.inner.allocate(offset, len))
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        self.durable(self.inner.set_len(len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MemoryStorage, TraceStorage};

    fn flushes_after_changes(mode: CacheMode) -> u64 {
        let trace = Arc::new(TraceStorage::new(Arc::new(MemoryStorage::new())));
        let storage = mode.wrap(trace.clone());
        let at = HostOffset::new(0);
        storage.write_at(at, b"x").unwrap();
        storage.write_vectored_at(at, &[b"x", b"y"]).unwrap();
        storage.write_zeroes(at, 100, ZeroMode::MayUnmap).unwrap();
        storage.set_len(50).unwrap();
        storage.allocate(at, 60).unwrap();
        storage.discard(at, 10).unwrap();
        storage.flush().unwrap();
        trace.counts().flushes
    }

    #[test]
    fn each_mode_flushes_as_often_as_it_says() {
        assert_eq!(flushes_after_changes(CacheMode::Writeback), 1);
        assert_eq!(flushes_after_changes(CacheMode::None), 1);
        assert_eq!(flushes_after_changes(CacheMode::Writethrough), 6);
        assert_eq!(flushes_after_changes(CacheMode::Directsync), 6);
        assert_eq!(flushes_after_changes(CacheMode::Unsafe), 0);
    }

    #[test]
    fn names_are_those_of_qemu() {
        for (name, direct, writethrough) in [
            ("none", true, false),
            ("off", true, false),
            ("directsync", true, true),
            ("writethrough", false, true),
            ("writeback", false, false),
            ("unsafe", false, false),
        ] {
            let mode = CacheMode::parse(name).unwrap();
            assert_eq!((mode.is_direct(), mode.is_writethrough()), (direct, writethrough), "{name}");
        }
    }
}
