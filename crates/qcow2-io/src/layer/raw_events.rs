//! A raw node above a debugger: its reads and writes are steps too.

use qcow2_core::{Event, Events, HostOffset, Storage, StorageError, forward_storage};
use std::sync::Arc;

/// Wraps a storage and reports [`Event::ReadAio`] and [`Event::WriteAio`] for each read and write, as a raw
/// format above it does.
pub struct RawEvents {
    inner: Arc<dyn Storage>,
    events: Arc<dyn Events>,
}

impl RawEvents {
    /// `inner`, wrapped if anybody observes it.
    pub fn wrap(inner: Arc<dyn Storage>) -> Arc<dyn Storage> {
        match inner.events() {
            Some(events) => Arc::new(Self { inner, events }),
            None => inner,
        }
    }
}

impl Storage for RawEvents {
    forward_storage!(inner: len write_zeroes discard allocate set_len flush extent_at status_at limits used_bytes);

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        self.events.event(Event::ReadAio);
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.events.event(Event::WriteAio);
        self.inner.write_at(offset, buf)
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        self.events.event(Event::WriteAio);
        self.inner.write_vectored_at(offset, bufs)
    }

    fn events(&self) -> Option<Arc<dyn Events>> {
        Some(Arc::clone(&self.events))
    }
}
