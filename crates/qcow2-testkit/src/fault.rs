//! A storage that injects errors: the n-th call of some kinds fails, once or from then on.

use qcow2_core::{HostOffset, Storage, StorageError, StorageErrorKind, ZeroMode, forward_storage};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The calls of a storage that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `read_at`.
    Read,
    /// `write_at`; `write_vectored_at` counts once, not per buffer.
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

/// Every kind of call.
pub const ALL_CALLS: [Call; 7] =
    [Call::Read, Call::Write, Call::WriteZeroes, Call::Discard, Call::Allocate, Call::SetLen, Call::Flush];

/// Every kind of call that changes the storage or makes it durable.
pub const CHANGING_CALLS: [Call; 6] =
    [Call::Write, Call::WriteZeroes, Call::Discard, Call::Allocate, Call::SetLen, Call::Flush];

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call does nothing and returns `Io` (EIO).
    Io,
    /// The call does nothing and returns `NoSpace` (ENOSPC).
    NoSpace,
    /// The first `bytes` of a write are written, then the call returns `NoSpace`. Other calls do nothing.
    Short {
        /// The most bytes that are written.
        bytes: u64,
    },
    /// The call does everything and returns `Io` nevertheless.
    LateIo,
    /// The first `bytes` of a write are written, and the call reports success. Other calls do nothing and
    /// report success.
    Torn {
        /// The most bytes that are written.
        bytes: u64,
    },
    /// A write goes to an offset `by` bytes too high and reports success. Other calls behave normally.
    Misdirected {
        /// Distance from the right offset, in bytes.
        by: u64,
    },
}

impl Fault {
    /// True if the caller gets an error.
    pub fn is_reported(self) -> bool {
        !matches!(self, Self::Torn { .. } | Self::Misdirected { .. })
    }
}

/// Which call fails, and how.
#[derive(Clone, Debug)]
pub struct FaultPlan {
    /// The kinds of calls that are counted and may fail.
    pub calls: Vec<Call>,
    /// Index of the failing call among these kinds, from 0 since the plan was set.
    pub nth: u64,
    /// Every later call of these kinds fails too.
    pub sticky: bool,
    /// How the call fails.
    pub fault: Fault,
}

#[derive(Debug, Default)]
struct FaultState {
    plan: Option<FaultPlan>,
    counted: u64,
    fired: u64,
}

/// A wrapper that forwards every call except those that its plan fails.
pub struct FaultStorage {
    inner: Arc<dyn Storage>,
    state: Mutex<FaultState>,
}

impl FaultStorage {
    /// Wraps `inner`; without a plan nothing fails.
    pub fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, state: Mutex::default() }
    }

    /// Sets the plan and resets the count.
    pub fn set_plan(&self, plan: Option<FaultPlan>) {
        *self.locked() = FaultState { plan, counted: 0, fired: 0 };
    }

    /// How many calls of the plan's kinds were made since it was set.
    pub fn counted(&self) -> u64 {
        self.locked().counted
    }

    /// How many of them failed.
    pub fn fired(&self) -> u64 {
        self.locked().fired
    }

    fn locked(&self) -> MutexGuard<'_, FaultState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call; returns its fault if it is to fail.
    fn count(&self, call: Call) -> Option<Fault> {
        let mut state = self.locked();
        let plan = state.plan.clone().filter(|plan| plan.calls.contains(&call))?;
        let number = state.counted;
        state.counted += 1;
        let hit = number == plan.nth || plan.sticky && number > plan.nth;
        if !hit {
            return None;
        }
        state.fired += 1;
        Some(plan.fault)
    }

    /// Runs a call other than a write, with its fault.
    fn run<R>(
        &self,
        call: Call,
        nothing: R,
        make: impl FnOnce() -> Result<R, StorageError>,
    ) -> Result<R, StorageError> {
        match self.count(call) {
            None | Some(Fault::Misdirected { .. }) => make(),
            Some(Fault::Torn { .. }) => Ok(nothing),
            Some(Fault::LateIo) => make().and_then(|_| Err(error(Fault::LateIo, call))),
            Some(fault) => Err(error(fault, call)),
        }
    }
}

fn error(fault: Fault, call: Call) -> StorageError {
    match fault {
        Fault::NoSpace | Fault::Short { .. } => {
            StorageError::new(StorageErrorKind::NoSpace, format!("injected: no space in {call:?}"))
                .with_os_code(28)
        }
        _ => StorageError::new(StorageErrorKind::Io, format!("injected: {call:?} failed")).with_os_code(5),
    }
}

impl Storage for FaultStorage {
    forward_storage!(inner: len extent_at limits used_bytes);

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        match self.count(Call::Read) {
            // A read cannot be torn silently, so it is made normally.
            None | Some(Fault::Torn { .. } | Fault::Misdirected { .. }) => self.inner.read_at(offset, buf),
            Some(fault) => Err(error(fault, Call::Read)),
        }
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        let front = |bytes: u64| &buf[..bytes.min(buf.len() as u64) as usize];
        match self.count(Call::Write) {
            None => self.inner.write_at(offset, buf),
            Some(Fault::Misdirected { by }) => {
                self.inner.write_at(HostOffset::new(offset.value().wrapping_add(by)), buf)
            }
            Some(Fault::Torn { bytes }) => self.inner.write_at(offset, front(bytes)),
            Some(fault) => {
                match fault {
                    Fault::Short { bytes } => self.inner.write_at(offset, front(bytes))?,
                    Fault::LateIo => self.inner.write_at(offset, buf)?,
                    _ => {}
                }
                Err(error(fault, Call::Write))
            }
        }
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        self.write_at(offset, &bufs.concat())
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        self.run(Call::WriteZeroes, (), || self.inner.write_zeroes(offset, len, mode))
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.run(Call::Discard, (), || self.inner.discard(offset, len))
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.run(Call::Allocate, (), || self.inner.allocate(offset, len))
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        self.run(Call::SetLen, (), || self.inner.set_len(len))
    }

    fn flush(&self) -> Result<(), StorageError> {
        self.run(Call::Flush, (), || self.inner.flush())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PageBytes;
    use crate::storage::PageStorage;

    fn storage(plan: FaultPlan) -> FaultStorage {
        let storage = FaultStorage::new(Arc::new(PageStorage::new(PageBytes::from_bytes(&[b'.'; 8]))));
        storage.set_plan(Some(plan));
        storage
    }

    fn text(storage: &FaultStorage) -> String {
        storage.set_plan(None);
        let mut buf = [0; 32];
        let n = storage.read_at(HostOffset::new(0), &mut buf).unwrap();
        String::from_utf8_lossy(&buf[..n]).replace('\0', "0")
    }

    /// Writes "ab" at 1 with `fault` and compares the result and the content.
    fn check(fault: Fault, said: Result<(), StorageErrorKind>, landed: &str) {
        let storage = storage(FaultPlan { calls: ALL_CALLS.to_vec(), nth: 0, sticky: false, fault });
        let result = storage.write_vectored_at(HostOffset::new(1), &[b"a", b"b"]);
        assert_eq!(result.map_err(|e| e.kind()), said, "{fault:?}");
        assert_eq!((storage.counted(), storage.fired()), (1, 1));
        assert_eq!(said.is_err(), fault.is_reported());
        assert_eq!(text(&storage), landed, "{fault:?}");
    }

    #[test]
    fn every_fault_has_its_documented_effect_on_a_write() {
        check(Fault::Io, Err(StorageErrorKind::Io), "........");
        check(Fault::NoSpace, Err(StorageErrorKind::NoSpace), "........");
        check(Fault::Short { bytes: 1 }, Err(StorageErrorKind::NoSpace), ".a......");
        check(Fault::LateIo, Err(StorageErrorKind::Io), ".ab.....");
        check(Fault::Torn { bytes: 1 }, Ok(()), ".a......");
        check(Fault::Misdirected { by: 3 }, Ok(()), "....ab..");
    }

    fn ok_pattern(nth: u64, sticky: bool, calls: &[Call]) -> String {
        let storage = storage(FaultPlan { calls: calls.to_vec(), nth, sticky, fault: Fault::Io });
        let mut pattern = String::new();
        for _ in 0..3 {
            for ok in [
                storage.write_at(HostOffset::new(0), b"x").is_ok(),
                storage.read_at(HostOffset::new(0), &mut [0]).is_ok(),
                storage.flush().is_ok(),
            ] {
                pattern.push(if ok { 'o' } else { 'X' });
            }
        }
        pattern
    }

    #[test]
    fn only_the_nth_call_of_the_given_kinds_fails() {
        assert_eq!(ok_pattern(4, false, &ALL_CALLS), "ooooXoooo");
        assert_eq!(ok_pattern(4, true, &ALL_CALLS), "ooooXXXXX");
        assert_eq!(ok_pattern(1, false, &[Call::Flush]), "oooooXooo");
        assert_eq!(ok_pattern(1, true, &[Call::Write]), "oooXooXoo");
        assert_eq!(ok_pattern(9, true, &ALL_CALLS), "ooooooooo");
    }

    #[test]
    fn calls_that_are_not_writes_fail_too() {
        for call in [Call::WriteZeroes, Call::Discard, Call::Allocate, Call::SetLen, Call::Flush] {
            let storage =
                storage(FaultPlan { calls: vec![call], nth: 0, sticky: true, fault: Fault::NoSpace });
            let results = [
                storage.write_zeroes(HostOffset::new(0), 4, ZeroMode::MayUnmap).is_err(),
                storage.discard(HostOffset::new(4), 2).is_err(),
                storage.allocate(HostOffset::new(0), 9).is_err(),
                storage.set_len(10).is_err(),
                storage.flush().is_err(),
            ];
            assert_eq!(results.iter().filter(|&&failed| failed).count(), 1, "{call:?}");
            assert_eq!(storage.fired(), 1);
        }
    }
}
