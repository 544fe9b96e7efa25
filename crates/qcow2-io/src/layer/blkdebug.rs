//! Faults to order: a storage that fails chosen calls after chosen steps of the engine, and stops requests at
//! them.
//!
//! What fails is told by rules, as QEMU's `blkdebug` driver has them: a step of the engine makes a rule
//! active, and an active rule fails the calls that it fits until another step makes other rules active.

use super::debug_limits::DebugLimits;
use super::debug_requests::Changing;
use crate::error::Call;
use qcow2_core::{
    Event, Events, HostOffset, Storage, StorageError, StorageExtent, ZeroMode, forward_storage,
};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What a rule waits for, and what it does then.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DebugRule {
    /// The step.
    pub event: Event,
    /// The state that the storage must be in; 0: any.
    pub state: i64,
    /// What happens.
    pub action: DebugAction,
}

impl DebugRule {
    /// At `event`, in any state, `action`.
    pub fn new(event: Event, action: DebugAction) -> Self {
        Self { event, state: 0, action }
    }
}

/// What a rule does.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DebugAction {
    /// Calls fail from now on.
    Fail(Injection),
    /// The storage goes into this state.
    SetState(i64),
}

/// Which calls fail, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Injection {
    /// The operating system's error number; 0 lets the call pass (and uses the rule up, where it is for
    /// once).
    pub errno: i32,
    /// Only calls that touch this byte; `None`: all.
    pub offset: Option<u64>,
    /// Only calls of these kinds.
    pub calls: Vec<DebugCall>,
    /// Only the first such call.
    pub once: bool,
}

impl Default for Injection {
    /// Every call but questions for holes fails with an input/output error.
    fn default() -> Self {
        use DebugCall::{Discard, Flush, Read, Write, WriteZeroes};
        Self { errno: 5, offset: None, calls: vec![Read, Write, WriteZeroes, Discard, Flush], once: false }
    }
}

/// A kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DebugCall {
    /// `read_at`.
    Read,
    /// `write_at`, `write_vectored_at`.
    Write,
    /// `write_zeroes`.
    WriteZeroes,
    /// `discard`.
    Discard,
    /// `flush`.
    Flush,
    /// `extent_at`.
    Extent,
}

/// Wraps a storage and fails calls by [`DebugRule`]s; requests can be stopped at breakpoints, and are widened
/// and cut to [`DebugLimits`].
pub struct BlkdebugStorage {
    pub(super) inner: Arc<dyn Storage>,
    pub(super) debugger: Arc<Debugger>,
    pub(super) limits: DebugLimits,
    pub(super) changing: Changing,
    /// True if something was changed since the last flush. Without that a flush is no call that could fail.
    changed: AtomicBool,
}

impl BlkdebugStorage {
    /// Wraps `inner`. The step [`Event::None`] happens here.
    pub fn new(inner: Arc<dyn Storage>, rules: Vec<DebugRule>) -> Self {
        let rules = rules.into_iter().enumerate().collect();
        let debugger = Debugger {
            state: Mutex::new(State { number: 1, rules, ..State::default() }),
            changed: Condvar::new(),
        };
        debugger.event(Event::None);
        let (limits, changing) = (DebugLimits::default(), Changing::default());
        let changed = AtomicBool::new(false);
        Self { inner, debugger: Arc::new(debugger), limits, changing, changed }
    }

    /// The same with limits for requests, all of which can be met.
    pub fn with_limits(self, limits: DebugLimits) -> Self {
        debug_assert_eq!(limits.unmet(), None);
        Self { limits, ..self }
    }

    fn has_limits(&self) -> bool {
        self.limits != DebugLimits::default()
    }

    /// The way to breakpoints.
    pub fn debugger(&self) -> &Arc<Debugger> {
        &self.debugger
    }

    pub(super) fn check(&self, kind: DebugCall, call: Call) -> Result<(), StorageError> {
        let start = call.offset.value();
        let errno = self.debugger.state().errno_for(kind, start..start.saturating_add(call.len));
        match errno {
            0 => Ok(()),
            errno => Err(call.failed(io::Error::from_raw_os_error(errno))),
        }
    }

    /// Reports `event`, and that `write` is done, also if it fails.
    pub(super) fn writing(
        &self,
        event: Event,
        write: impl FnOnce() -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        self.debugger.event(event);
        let written = write();
        if written.is_ok() {
            self.changed.store(true, Ordering::SeqCst);
        }
        self.debugger.event(Event::PwritevDone);
        written
    }
}

impl Storage for BlkdebugStorage {
    forward_storage!(inner: len status_at limits);

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.changed.store(true, Ordering::SeqCst);
        self.inner.allocate(offset, len)
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        self.changed.store(true, Ordering::SeqCst);
        self.inner.set_len(len)
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        if self.has_limits() {
            return self.read_within(offset, buf);
        }
        self.check(DebugCall::Read, Call::new("read", offset, buf.len() as u64))?;
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        if self.has_limits() {
            return self.write_within(offset, buf);
        }
        self.writing(Event::Pwritev, || {
            self.check(DebugCall::Write, Call::new("write", offset, buf.len() as u64))?;
            self.inner.write_at(offset, buf)
        })
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        let len = bufs.iter().fold(0u64, |sum, buf| sum.saturating_add(buf.len() as u64));
        if self.has_limits() {
            return self.write_within(offset, &bufs.concat());
        }
        self.writing(Event::Pwritev, || {
            self.check(DebugCall::Write, Call::new("write", offset, len))?;
            self.inner.write_vectored_at(offset, bufs)
        })
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        if self.has_limits() {
            return self.zero_within(offset, len, mode);
        }
        self.writing(Event::PwritevZero, || {
            self.check(DebugCall::WriteZeroes, Call::new("zero", offset, len))?;
            self.inner.write_zeroes(offset, len, mode)
        })
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        if self.has_limits() {
            self.changed.store(true, Ordering::SeqCst);
            return self.discard_within(offset, len);
        }
        self.check(DebugCall::Discard, Call::new("discard", offset, len))?;
        self.changed.store(true, Ordering::SeqCst);
        self.inner.discard(offset, len)
    }

    fn flush(&self) -> Result<(), StorageError> {
        if !self.changed.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let flushed = self.check(DebugCall::Flush, Call::new("flush", HostOffset::new(0), 0));
        flushed.and_then(|()| self.inner.flush()).inspect_err(|_| self.changed.store(true, Ordering::SeqCst))
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        self.check(DebugCall::Extent, Call::new("map", offset, len))?;
        self.inner.extent_at(offset, len)
    }

    fn events(&self) -> Option<Arc<dyn Events>> {
        Some(Arc::clone(&self.debugger) as Arc<dyn Events>)
    }
}

/// The rules and breakpoints of one storage; any thread may use it.
pub struct Debugger {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What rules call the state.
    number: i64,
    /// Each with a number of its own.
    rules: Vec<(usize, DebugRule)>,
    /// The rules that fail calls now, with their numbers.
    active: Vec<(usize, Injection)>,
    breakpoints: Vec<(Event, String)>,
    /// Stopped requests, the longest stopped first: a number of its own, and the tag.
    stopped: Vec<(u64, String)>,
    next_stop: u64,
    news: Vec<StopNews>,
}

/// What happened to a request at a breakpoint; the tag is the breakpoint's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopNews {
    /// It stopped there.
    Stopped(String),
    /// It goes on.
    Resumed(String),
}

impl State {
    /// The error for a call of `kind` on `range`; 0: none.
    fn errno_for(&mut self, kind: DebugCall, range: Range<u64>) -> i32 {
        let fits = |rule: &Injection| {
            rule.calls.contains(&kind) && rule.offset.is_none_or(|offset| range.contains(&offset))
        };
        let Some(index) = self.active.iter().position(|(_, rule)| fits(rule)) else { return 0 };
        let (number, rule) = &self.active[index];
        let (number, once, errno) = (*number, rule.once, rule.errno);
        if once {
            self.active.remove(index);
            self.rules.retain(|(other, _)| *other != number);
        }
        errno
    }

    /// Applies the rules of `event`; the numbers of the stops that the request now waits in.
    fn happen(&mut self, event: Event) -> Vec<u64> {
        let state = self.number;
        let (mut fresh, mut next) = (Vec::new(), state);
        for (number, rule) in
            self.rules.iter().filter(|(_, r)| r.event == event && (r.state == 0 || r.state == state))
        {
            match &rule.action {
                DebugAction::Fail(injection) => fresh.insert(0, (*number, injection.clone())),
                DebugAction::SetState(number) => next = *number,
            }
        }
        self.number = next;
        if !fresh.is_empty() {
            self.active = fresh;
        }
        let mut stops = Vec::new();
        let hit: Vec<String> =
            self.breakpoints.extract_if(.., |(at, _)| *at == event).map(|(_, tag)| tag).collect();
        for tag in hit {
            stops.push(self.next_stop);
            self.news.push(StopNews::Stopped(tag.clone()));
            self.stopped.push((self.next_stop, tag));
            self.next_stop += 1;
        }
        stops
    }
}

impl Debugger {
    /// Stops the next request that reaches `event`; `tag` names the stop.
    pub fn set_breakpoint(&self, event: Event, tag: &str) {
        self.state().breakpoints.push((event, tag.to_owned()));
    }

    /// Removes the breakpoints called `tag`, and lets the requests go on that have stopped there. Whether
    /// there was a breakpoint: one at which a request has stopped is none any more.
    pub fn remove_breakpoint(&self, tag: &str) -> bool {
        let mut state = self.state();
        let before = state.breakpoints.len();
        state.breakpoints.retain(|(_, name)| name != tag);
        let resumed = state.stopped.extract_if(.., |(_, name)| name == tag).count();
        state.news.extend((0..resumed).map(|_| StopNews::Resumed(tag.to_owned())));
        let found = before != state.breakpoints.len();
        self.changed.notify_all();
        found
    }

    /// Lets the request go on that stopped first at `tag`. Whether there was one.
    pub fn resume(&self, tag: &str) -> bool {
        let mut state = self.state();
        let found = state.stopped.iter().position(|(_, name)| name == tag);
        if let Some(index) = found {
            state.stopped.remove(index);
            state.news.push(StopNews::Resumed(tag.to_owned()));
        }
        self.changed.notify_all();
        found.is_some()
    }

    /// Waits until a request has stopped at `tag`.
    pub fn wait_stopped(&self, tag: &str) {
        let stopped = |state: &mut State| !state.stopped.iter().any(|(_, name)| name == tag);
        let _state = self.changed.wait_while(self.state(), stopped).unwrap_or_else(PoisonError::into_inner);
    }

    /// What has happened at breakpoints since the last call.
    pub fn take_news(&self) -> Vec<StopNews> {
        std::mem::take(&mut self.state().news)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Events for Debugger {
    fn event(&self, event: Event) {
        let mut state = self.state();
        let stops = state.happen(event);
        if stops.is_empty() {
            return;
        }
        self.changed.notify_all();
        let waits = |state: &mut State| state.stopped.iter().any(|(number, _)| stops.contains(number));
        let _state = self.changed.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStorage;
    use std::thread;

    fn storage(rules: Vec<DebugRule>) -> BlkdebugStorage {
        BlkdebugStorage::new(Arc::new(MemoryStorage::from(vec![0; 8192])), rules)
    }

    fn fail(event: Event, injection: Injection) -> DebugRule {
        DebugRule::new(event, DebugAction::Fail(injection))
    }

    fn read(storage: &BlkdebugStorage, offset: u64) -> Option<i32> {
        storage.read_at(HostOffset::new(offset), &mut [0; 512]).err().map(|e| e.os_code().unwrap_or(0))
    }

    #[test]
    fn a_step_makes_calls_fail() {
        let disk =
            storage(vec![fail(Event::L2Load, Injection { errno: 28, once: true, ..Injection::default() })]);
        assert_eq!(read(&disk, 0), None);
        disk.debugger().event(Event::L2Load);
        assert_eq!(read(&disk, 0), Some(28));
        assert_eq!(read(&disk, 0), None);
        disk.debugger().event(Event::L2Load);
        assert_eq!(read(&disk, 0), None);
    }

    #[test]
    fn only_the_byte_and_the_calls_named() {
        let wanted = Injection {
            offset: Some(1024),
            calls: vec![DebugCall::Read, DebugCall::Flush],
            ..Injection::default()
        };
        let disk = storage(vec![fail(Event::None, wanted)]);
        assert_eq!([read(&disk, 512), read(&disk, 1024), read(&disk, 1025)], [None, Some(5), None]);
        assert!(disk.write_at(HostOffset::new(1024), &[1]).is_ok());
        // A flush touches no byte.
        assert!(disk.flush().is_ok());
        assert!(disk.extent_at(HostOffset::new(1024), 512).is_ok());
    }

    #[test]
    fn states_choose_between_rules() {
        let rules = vec![
            DebugRule { state: 1, ..DebugRule::new(Event::ReadAio, DebugAction::SetState(2)) },
            DebugRule { state: 2, ..fail(Event::WriteAio, Injection::default()) },
        ];
        let disk = storage(rules);
        disk.debugger().event(Event::WriteAio);
        assert_eq!(read(&disk, 0), None);
        disk.debugger().event(Event::ReadAio);
        disk.debugger().event(Event::WriteAio);
        assert_eq!([read(&disk, 0), read(&disk, 0)], [Some(5), Some(5)]);
    }

    #[test]
    fn breakpoints_stop_and_resume() {
        let disk = storage(Vec::new());
        let debugger = disk.debugger();
        debugger.set_breakpoint(Event::Pwritev, "a");
        assert!(!debugger.resume("a"));
        thread::scope(|scope| {
            let write = scope.spawn(|| disk.write_at(HostOffset::new(0), &[7]));
            debugger.wait_stopped("a");
            let mut byte = [9];
            disk.read_at(HostOffset::new(0), &mut byte).unwrap();
            assert_eq!(byte, [0]);
            assert!(debugger.resume("a"));
            write.join().unwrap().unwrap();
            disk.read_at(HostOffset::new(0), &mut byte).unwrap();
            assert_eq!(byte, [7]);
        });
        assert!(!debugger.remove_breakpoint("a"));
        debugger.set_breakpoint(Event::Pwritev, "b");
        assert!(debugger.remove_breakpoint("b"));
        disk.write_at(HostOffset::new(0), &[1]).unwrap();
    }
}
