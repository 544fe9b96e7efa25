//! A disk whose layers can be exchanged between requests.
//!
//! A [`LiveDisk`] stands between whoever serves a disk and the disk itself. Requests pass through it in
//! parallel. [`LiveDisk::hold`] waits for the requests in flight and holds new ones back; meanwhile the
//! holder may put another disk in the place of the present one. The served disk keeps its name and its size.
//!
//! Below an overlay that is opened with [`OpenOptions::exchangeable`](crate::OpenOptions::exchangeable)
//! stands a `LiveDisk` too, so that layers further down can be exchanged: a base that is opened for writing,
//! a layer that was committed. Such a disk refuses changes.
//!
//! # Callers that move the bytes themselves
//!
//! A thread that holds a [`WriteTicket`](crate::WriteTicket) or a [`Pin`](crate::Pin) must not make another
//! request to the same [`Image`](crate::Image): if somebody waits to change the whole image (a snapshot, a
//! resize) the new request waits behind that change, the change waits for the ticket, and neither ever ends.
//! A `LiveDisk` has a way around that. The caller takes a [`Request`] first, and makes all its calls through
//! it as long as it holds any ticket. Whole-image changes go through [`LiveDisk::hold`], which waits for the
//! `Request` before it touches the image; so while a `Request` is held, nobody waits for the image's own
//! lock, and further tickets never block behind a change. Two rules remain, which debug builds check: a
//! thread that holds a `Request` neither takes another one of the same disk nor calls `hold`.

pub(crate) mod gate;

use crate::error::{Error, ErrorKind, Result};
use crate::merged::view::Watchers;
use crate::port::disk::{DiskExtent, ExtentState, GuestDisk};
use crate::port::storage::ZeroMode;
use crate::sync::RwLockReadGuard;
use crate::sync::atomic::{AtomicBool, Ordering};
use ::alloc::sync::Arc;
use core::any::Any;
use gate::{Closed, Gate};
use qcow2_format::{GuestOffset, GuestRange};

/// A disk whose layers can be exchanged while it is used.
///
/// To its users it is one layer: [`extent_at`](GuestDisk::extent_at) answers for the whole chain, and there
/// is no [`backing`](GuestDisk::backing). What only a qcow2 image can do goes through
/// [`request`](Self::request) or [`hold`](Self::hold).
pub struct LiveDisk {
    gate: Gate<Arc<dyn GuestDisk>>,
    /// True for a layer below an overlay.
    frozen: bool,
    /// True while a procedure changes the layers.
    changing: AtomicBool,
    observer: Option<Arc<dyn HoldObserver>>,
    /// The images above that have merged the layers from here on.
    watchers: Watchers,
}

/// Is told of each time that requests are held back, for statistics.
pub trait HoldObserver: Send + Sync {
    /// New requests are held back from now on.
    fn holding(&self) {}

    /// No request is in flight any more.
    fn quiet(&self) {}

    /// Requests go on.
    fn released(&self) {}
}

/// A request in flight: the disk that it uses stays the same until this is dropped. Not for keeping: an
/// exchange waits for it, and every later request waits for the exchange.
pub struct Request<'a> {
    disk: RwLockReadGuard<'a, Arc<dyn GuestDisk>>,
}

impl Request<'_> {
    /// The disk. All calls of this thread go through it while it holds the request.
    pub fn disk(&self) -> &dyn GuestDisk {
        &**self.disk
    }
}

/// Holds all requests back until it is dropped. None is in flight.
pub struct Hold<'a> {
    closed: Closed<'a, Arc<dyn GuestDisk>>,
    observer: Option<&'a dyn HoldObserver>,
    watchers: &'a Watchers,
}

impl Hold<'_> {
    /// The disk as it is now.
    pub fn disk(&self) -> &Arc<dyn GuestDisk> {
        self.closed.value()
    }

    /// Puts `new` in the place of the disk, which it returns. The caller sees to it that both read the same.
    pub fn exchange(&mut self, new: &Arc<dyn GuestDisk>) -> Arc<dyn GuestDisk> {
        self.closed.replace(new)
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        // Before requests go on: whoever merges layers from here on waits at the gate, and gets the new one.
        self.watchers.end_hold();
        if let Some(observer) = self.observer {
            observer.released();
        }
    }
}

/// The right to change the layers; dropping it gives it back.
pub struct LayerChange<'a> {
    changing: &'a AtomicBool,
}

impl Drop for LayerChange<'_> {
    fn drop(&mut self) {
        self.changing.store(false, Ordering::Release);
    }
}

impl LiveDisk {
    /// A disk that is served, `disk` at first.
    pub fn new(disk: Arc<dyn GuestDisk>) -> Self {
        Self::made(&disk, false, None)
    }

    /// The same; `observer` is told of every pause.
    pub fn observed(disk: Arc<dyn GuestDisk>, observer: Arc<dyn HoldObserver>) -> Self {
        Self::made(&disk, false, Some(observer))
    }

    /// A layer below an overlay: refuses changes with `ReadOnly`, whatever `disk` itself allows.
    pub fn frozen(disk: Arc<dyn GuestDisk>) -> Self {
        Self::made(&disk, true, None)
    }

    fn made(disk: &Arc<dyn GuestDisk>, frozen: bool, observer: Option<Arc<dyn HoldObserver>>) -> Self {
        let (gate, changing, watchers) = (Gate::new(disk), AtomicBool::new(false), Watchers::new());
        Self { gate, frozen, changing, observer, watchers }
    }

    /// True for a layer below an overlay, which refuses changes.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Starts a request. Waits while requests are held back.
    pub fn request(&self) -> Request<'_> {
        Request { disk: self.gate.enter() }
    }

    /// Waits for the requests in flight and holds new ones back until the result is dropped. The thread must
    /// not use this disk meanwhile except through the result.
    pub fn hold(&self) -> Hold<'_> {
        let observer = self.observer.as_deref();
        if let Some(observer) = observer {
            observer.holding();
        }
        // Before the gate is closed: reads past this disk may wait for one that is further down.
        self.watchers.begin_hold();
        let closed = self.gate.close();
        if let Some(observer) = observer {
            observer.quiet();
        }
        Hold { closed, observer, watchers: &self.watchers }
    }

    pub(crate) fn watchers(&self) -> &Watchers {
        &self.watchers
    }

    /// The disk as it is now. Who keeps it sees nothing of an exchange: for procedures, which exclude each
    /// other by [`begin_change`](Self::begin_change).
    pub fn layer(&self) -> Arc<dyn GuestDisk> {
        Arc::clone(&self.gate.enter())
    }

    /// Excludes other changes of the layers and of the size until the result is dropped. Errors: `Busy` while
    /// there is one already.
    pub fn begin_change(&self) -> Result<LayerChange<'_>> {
        match self.changing.swap(true, Ordering::Acquire) {
            false => Ok(LayerChange { changing: &self.changing }),
            true => Err(Error::new(ErrorKind::Busy, "the layers of this disk are being changed already")),
        }
    }

    fn change(&self, make: impl FnOnce(&dyn GuestDisk) -> Result<()>) -> Result<()> {
        match self.frozen {
            false => make(self.request().disk()),
            true => Err(Error::new(ErrorKind::ReadOnly, "a layer below an overlay is for reading only")),
        }
    }
}

impl dyn GuestDisk + '_ {
    /// This disk as one whose layers can be exchanged, or `None` if it is of another kind.
    pub fn as_live(&self) -> Option<&LiveDisk> {
        self.as_any()?.downcast_ref()
    }
}

impl GuestDisk for LiveDisk {
    fn size(&self) -> u64 {
        self.request().disk().size()
    }

    fn read_at(&self, offset: GuestOffset, buf: &mut [u8]) -> Result<()> {
        self.request().disk().read_at(offset, buf)
    }

    fn write_at(&self, offset: GuestOffset, buf: &[u8]) -> Result<()> {
        self.change(|disk| disk.write_at(offset, buf))
    }

    fn write_parts(&self, parts: &[(GuestOffset, &[u8])]) -> Result<()> {
        self.change(|disk| disk.write_parts(parts))
    }

    fn write_zeroes(&self, range: GuestRange, mode: ZeroMode) -> Result<()> {
        self.change(|disk| disk.write_zeroes(range, mode))
    }

    fn discard(&self, range: GuestRange) -> Result<()> {
        self.change(|disk| disk.discard(range))
    }

    fn flush(&self) -> Result<()> {
        match self.frozen {
            false => self.request().disk().flush(),
            true => Ok(()),
        }
    }

    fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
        chain_extent(self.request().disk(), range)
    }

    fn cluster_size(&self) -> u64 {
        self.request().disk().cluster_size()
    }

    fn zero_granularity(&self) -> u64 {
        self.request().disk().zero_granularity()
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    /// Holds requests back meanwhile. Errors: `Busy` while a procedure changes the layers.
    fn resize(&self, size: u64) -> Result<()> {
        let _change = self.begin_change()?;
        match self.frozen {
            false => self.hold().disk().resize(size),
            true => Err(Error::new(ErrorKind::ReadOnly, "a layer below an overlay is for reading only")),
        }
    }
}

/// How the chain of `disk` stores the bytes at `range.start()`. There are no host offsets: the extent does
/// not say in which layer they would be.
pub(crate) fn chain_extent(disk: &dyn GuestDisk, range: GuestRange) -> Result<DiskExtent> {
    if let Some(image) = disk.as_image()
        && disk.filtered().is_none()
        && let Some(extent) = image.merged_extent(range)
    {
        return extent;
    }
    let extent = disk.extent_at(range)?;
    let state = match extent.state {
        ExtentState::Zero { .. } => ExtentState::Zero { host: None },
        ExtentState::Data { .. } => ExtentState::Data { host: None },
        ExtentState::Compressed => ExtentState::Compressed,
        ExtentState::Unallocated => {
            let Some(below) = disk.backing() else { return Ok(extent) };
            let there = below.size().saturating_sub(range.start().value()).min(extent.len);
            if there == 0 {
                ExtentState::Zero { host: None }
            } else {
                let end = GuestOffset::new(range.start().value() + there);
                return chain_extent(&**below, GuestRange::between(range.start(), end));
            }
        }
    };
    Ok(DiskExtent { len: extent.len, state })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::atomic::AtomicU64;
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};

    /// A disk of one and the same byte.
    struct Plain(u8, AtomicU64);

    impl GuestDisk for Plain {
        fn size(&self) -> u64 {
            self.1.load(Ordering::SeqCst)
        }

        fn read_at(&self, _: GuestOffset, buf: &mut [u8]) -> Result<()> {
            buf.fill(self.0);
            Ok(())
        }

        fn write_at(&self, _: GuestOffset, _: &[u8]) -> Result<()> {
            Ok(())
        }

        fn write_zeroes(&self, _: GuestRange, _: ZeroMode) -> Result<()> {
            Ok(())
        }

        fn discard(&self, _: GuestRange) -> Result<()> {
            Ok(())
        }

        fn flush(&self) -> Result<()> {
            Ok(())
        }

        fn extent_at(&self, range: GuestRange) -> Result<DiskExtent> {
            Ok(DiskExtent { len: range.len(), state: ExtentState::Data { host: None } })
        }

        fn resize(&self, size: u64) -> Result<()> {
            self.1.store(size, Ordering::SeqCst);
            Ok(())
        }
    }

    fn disk(byte: u8) -> Arc<dyn GuestDisk> {
        Arc::new(Plain(byte, AtomicU64::new(512)))
    }

    fn first_byte(disk: &dyn GuestDisk) -> u8 {
        let mut byte = [0xff];
        disk.read_at(GuestOffset::new(0), &mut byte).unwrap();
        byte[0]
    }

    /// Notes every moment of a pause, and tells when it begins.
    struct Log {
        lines: Mutex<Vec<&'static str>>,
        begun: Mutex<Sender<()>>,
    }

    impl Log {
        fn note(&self, line: &'static str) {
            self.lines.lock().unwrap().push(line);
        }
    }

    impl HoldObserver for Log {
        fn holding(&self) {
            self.note("holding");
            self.begun.lock().unwrap().send(()).unwrap();
        }

        fn quiet(&self) {
            self.note("quiet");
        }

        fn released(&self) {
            self.note("released");
        }
    }

    #[test]
    fn an_exchange_waits_for_the_request_in_flight_and_requests_wait_for_it() {
        let (begun, begins) = channel();
        let log = Arc::new(Log { lines: Mutex::default(), begun: Mutex::new(begun) });
        let live = LiveDisk::observed(disk(1), log.clone());
        std::thread::scope(|scope| {
            let request = live.request();
            scope.spawn(|| {
                let mut hold = live.hold();
                assert_eq!(first_byte(&*hold.exchange(&disk(2))), 1);
                log.note("exchanged");
            });
            begins.recv().unwrap();
            // However far the other thread is: the disk in the request is the old one.
            assert_eq!(first_byte(request.disk()), 1);
            log.note("request ends");
            drop(request);
            // Waits, if it comes during the exchange.
            while first_byte(&live) == 1 {
                std::thread::yield_now();
            }
        });
        let lines = log.lines.lock().unwrap().join(", ");
        assert_eq!(lines, "holding, request ends, quiet, exchanged, released");
        assert_eq!(first_byte(&live), 2);
    }

    #[test]
    fn requests_of_many_threads_see_the_old_disk_or_the_new_one() {
        let live = LiveDisk::new(disk(0));
        std::thread::scope(|scope| {
            for _ in 0..2 * 16 + 1 {
                scope.spawn(|| {
                    let mut last = 0;
                    while last < 50 {
                        let now = first_byte(&live);
                        assert!(now >= last, "{now} after {last}");
                        last = now;
                        std::thread::yield_now();
                    }
                });
            }
            for byte in 1..=50 {
                let old = live.hold().exchange(&disk(byte));
                assert_eq!((first_byte(&*old), first_byte(&*live.layer())), (byte - 1, byte));
            }
        });
    }

    /// Whoever holds a request would wait for himself: the check of the lock order says so instead.
    #[test]
    #[cfg(all(debug_assertions, not(feature = "unstable-shuttle")))]
    fn a_second_request_or_an_exchange_inside_a_request_is_found() {
        let live = LiveDisk::new(disk(1));
        let inside = |act: &dyn Fn()| {
            let _request = live.request();
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)).is_err()
        };
        assert!(inside(&|| drop(live.request())));
        assert!(inside(&|| drop(live.hold())));
        assert!(!inside(&|| drop(LiveDisk::new(disk(2)).hold())), "another disk has an order of its own");
        let _hold = live.hold();
        let again = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(live.request())));
        assert!(again.is_err(), "a request while the same thread holds requests back");
    }

    #[test]
    fn one_change_at_a_time_and_none_of_a_layer_below() {
        let live = LiveDisk::new(disk(1));
        let change = live.begin_change().unwrap();
        assert_eq!(live.begin_change().err().map(|e| e.kind()), Some(ErrorKind::Busy));
        assert_eq!(live.resize(1024).unwrap_err().kind(), ErrorKind::Busy);
        drop(change);
        live.resize(1024).unwrap();
        assert_eq!(live.size(), 1024);
        let below = LiveDisk::frozen(disk(1));
        let range = GuestRange::between(GuestOffset::new(0), GuestOffset::new(512));
        for refused in [
            below.write_at(range.start(), &[7]),
            below.write_zeroes(range, ZeroMode::MayUnmap),
            below.discard(range),
            below.resize(1024),
        ] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnly);
        }
        assert_eq!((first_byte(&below), below.size()), (1, 512));
    }
}
