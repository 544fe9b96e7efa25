//! Counts the calls that reach a storage, and writes them down where asked: how many barriers did that cost?

use qcow2_core::{HostOffset, Storage, StorageError, ZeroMode, forward_storage};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which call it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StorageCall {
    /// `read_at`.
    Read,
    /// `write_at` or `write_vectored_at`.
    Write,
    /// `write_zeroes`.
    WriteZeroes,
    /// `discard`.
    Discard,
    /// `allocate`.
    Allocate,
    /// `set_len`.
    SetLen,
    /// `flush`.
    Flush,
}

/// One call, as it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StorageEvent {
    /// Which call.
    pub call: StorageCall,
    /// From which byte on; 0 for `set_len` and `flush`.
    pub offset: HostOffset,
    /// How many bytes; the new length for `set_len`, 0 for `flush`.
    pub len: u64,
}

/// How many calls there were, failed ones included, and how many bytes they asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StorageCounts {
    /// Calls of `read_at`.
    pub reads: u64,
    /// Bytes asked of `read_at`.
    pub read_bytes: u64,
    /// Calls of `write_at` and `write_vectored_at`.
    pub writes: u64,
    /// Bytes given to them.
    pub write_bytes: u64,
    /// Calls of `write_zeroes`.
    pub write_zeroes: u64,
    /// Calls of `discard`.
    pub discards: u64,
    /// Calls of `allocate`.
    pub allocates: u64,
    /// Calls of `set_len`.
    pub set_lens: u64,
    /// Calls of `flush`: the barriers.
    pub flushes: u64,
}

/// Wraps a storage and counts what reaches it.
///
/// ```
/// use qcow2_core::{HostOffset, Storage};
/// use qcow2_io::{MemoryStorage, TraceStorage};
/// use std::sync::Arc;
///
/// let trace = TraceStorage::new(Arc::new(MemoryStorage::new()));
/// trace.write_at(HostOffset::new(0), b"hello")?;
/// trace.flush()?;
/// assert_eq!((trace.counts().writes, trace.counts().flushes), (1, 1));
/// # Ok::<(), qcow2_core::StorageError>(())
/// ```
pub struct TraceStorage {
    inner: Arc<dyn Storage>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    counts: StorageCounts,
    log: VecDeque<StorageEvent>,
    /// How many events the log keeps; older ones go.
    max_events: usize,
}

impl TraceStorage {
    /// Wraps `inner`; counts only.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self::with_log(inner, 0)
    }

    /// Wraps `inner`; counts, and keeps the last `max_events` calls.
    pub fn with_log(inner: Arc<dyn Storage>, max_events: usize) -> Self {
        Self { inner, state: Mutex::new(State { max_events, ..State::default() }) }
    }

    /// The counts so far.
    pub fn counts(&self) -> StorageCounts {
        self.state().counts
    }

    /// Sets all counts to 0 and returns what they were.
    pub fn reset(&self) -> StorageCounts {
        std::mem::take(&mut self.state().counts)
    }

    /// Empties the log and returns it, oldest call first.
    pub fn take_log(&self) -> Vec<StorageEvent> {
        std::mem::take(&mut self.state().log).into()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, call: StorageCall, offset: HostOffset, len: u64) {
        let mut state = self.state();
        let counts = &mut state.counts;
        match call {
            StorageCall::Read => {
                counts.reads += 1;
                counts.read_bytes += len;
            }
            StorageCall::Write => {
                counts.writes += 1;
                counts.write_bytes += len;
            }
            StorageCall::WriteZeroes => counts.write_zeroes += 1,
            StorageCall::Discard => counts.discards += 1,
            StorageCall::Allocate => counts.allocates += 1,
            StorageCall::SetLen => counts.set_lens += 1,
            StorageCall::Flush => counts.flushes += 1,
        }
        if state.max_events > 0 {
            if state.log.len() == state.max_events {
                state.log.pop_front();
            }
            state.log.push_back(StorageEvent { call, offset, len });
        }
    }
}

impl Storage for TraceStorage {
    forward_storage!(inner: len extent_at status_at limits used_bytes);

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        self.note(StorageCall::Read, offset, buf.len() as u64);
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.note(StorageCall::Write, offset, buf.len() as u64);
        self.inner.write_at(offset, buf)
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        self.note(StorageCall::Write, offset, bufs.iter().map(|buf| buf.len() as u64).sum());
        self.inner.write_vectored_at(offset, bufs)
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        self.note(StorageCall::WriteZeroes, offset, len);
        self.inner.write_zeroes(offset, len, mode)
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.note(StorageCall::Discard, offset, len);
        self.inner.discard(offset, len)
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.note(StorageCall::Allocate, offset, len);
        self.inner.allocate(offset, len)
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        self.note(StorageCall::SetLen, HostOffset::new(0), len);
        self.inner.set_len(len)
    }

    fn flush(&self) -> Result<(), StorageError> {
        self.note(StorageCall::Flush, HostOffset::new(0), 0);
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStorage;

    #[test]
    fn counts_and_log_tell_what_happened() {
        let trace = TraceStorage::with_log(Arc::new(MemoryStorage::new()), 2);
        trace.write_at(HostOffset::new(7), b"abc").unwrap();
        trace.write_vectored_at(HostOffset::new(0), &[b"a", b"bc"]).unwrap();
        trace.read_at(HostOffset::new(1), &mut [0; 4]).unwrap();
        trace.flush().unwrap();
        let counts = trace.counts();
        assert_eq!((counts.writes, counts.write_bytes), (2, 6));
        assert_eq!((counts.reads, counts.read_bytes, counts.flushes), (1, 4, 1));
        let event = |call, offset, len| StorageEvent { call, offset: HostOffset::new(offset), len };
        assert_eq!(trace.take_log(), [event(StorageCall::Read, 1, 4), event(StorageCall::Flush, 0, 0)]);
        assert_eq!(trace.reset(), counts);
        assert_eq!(trace.counts(), StorageCounts::default());
    }
}
