//! The files of an open image, and the state that all parts above share: writable, poisoned, ordering rules.
//!
//! Invariant I7: every change calls [`check_writable`](ImageFile::check_writable) first. After a failed
//! barrier, and a failed write of metadata that no later flush repeats, the image is poisoned: memory and
//! disk may differ, so changes are refused; reads go on.

use crate::error::{Error, ErrorKind, Result};
use crate::invariant;
use crate::open::OpenOptions;
use crate::port::event::{Event, Events};
use crate::port::storage::{Storage, StorageErrorKind};
use crate::rules::{OrderingRule, Rules};
use crate::sync::atomic::{AtomicBool, Ordering};
use ::alloc::sync::Arc;
use ::alloc::vec;
use ::alloc::vec::Vec;
use core::ops::Range;
use qcow2_format::l2::L2Format;
use qcow2_format::{Geometry, HostOffset};

/// Bytes of a table read at a time.
const TABLE_PIECE: u64 = 1 << 20;

/// The image file and the external data file, if there is one.
pub(crate) struct ImageFile {
    l2_format: L2Format,
    storage: Arc<dyn Storage>,
    /// The storage of guest data: the image file, or the external data file; `None` if that was not opened.
    data: Option<Arc<dyn Storage>>,
    writable: bool,
    /// True if opened for repair: damage is expected.
    for_repair: bool,
    poisoned: AtomicBool,
    /// True once the image was closed: all of it is on disk, and nothing changes any more.
    closed: AtomicBool,
    rules: Rules,
    events: Option<Arc<dyn Events>>,
}

impl ImageFile {
    /// `data`: the storage of guest data; the same as `storage` without an external data file.
    pub(crate) fn new(
        l2_format: L2Format,
        storage: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
        options: &OpenOptions,
    ) -> Self {
        Self {
            l2_format,
            data,
            writable: options.writable,
            for_repair: options.for_repair,
            poisoned: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            rules: rules(options),
            events: storage.events(),
            storage,
        }
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        &self.l2_format.geometry
    }

    pub(crate) fn l2_format(&self) -> &L2Format {
        &self.l2_format
    }

    /// The image file.
    pub(crate) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    /// The hole of the file from `at` on; what is past the end of the file is one too.
    pub(crate) fn hole_at(&self, at: u64) -> Option<Range<u64>> {
        let len = self.storage.len().ok()?;
        if at >= len {
            return Some(at..u64::MAX);
        }
        let extent = self.storage.extent_at(HostOffset::new(at), len - at).ok()?;
        let end = at.saturating_add(extent.len);
        (!extent.data).then_some(at..if end >= len { u64::MAX } else { end })
    }

    /// The image file, for callers that keep a reference.
    pub(crate) fn shared_storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The storage of guest data. Errors: `Resolve` if the external data file was not opened.
    pub(crate) fn data(&self) -> Result<&Arc<dyn Storage>> {
        self.data
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::Resolve, "the external data file was not opened"))
    }

    /// The storage of guest data; `None` if the external data file was not opened.
    pub(crate) fn opened_data(&self) -> Option<&Arc<dyn Storage>> {
        self.data.as_ref()
    }

    /// True if the image has an external data file.
    pub(crate) fn has_data_file(&self) -> bool {
        self.l2_format.external_data
    }

    /// The external data file, if there is one and it was opened.
    pub(crate) fn data_file(&self) -> Option<&Arc<dyn Storage>> {
        self.data.as_ref().filter(|_| self.has_data_file())
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    pub(crate) fn is_for_repair(&self) -> bool {
        self.for_repair
    }

    /// Fails with `ReadOnly` if the image was opened for reading, with `Poisoned` after a failed metadata
    /// write or a close.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if !self.writable {
            return Err(Error::new(ErrorKind::ReadOnly, "image is opened for reading only"));
        }
        if self.is_poisoned() {
            return Err(Error::new(
                ErrorKind::Poisoned,
                "an earlier metadata write failed; the image takes no changes until it is reopened",
            ));
        }
        Ok(())
    }

    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    /// Poisons the image: every change fails from now on.
    pub(crate) fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    /// Notes that everything is on disk, and refuses changes from now on. The caller holds the structure lock
    /// for writing: no request is running.
    pub(crate) fn close(&self) {
        self.poison();
        self.closed.store(true, Ordering::Release);
    }

    /// True if nothing changes the image any more: it was opened for reading, or has been closed.
    #[inline]
    pub(crate) fn is_settled(&self) -> bool {
        !self.writable || self.closed.load(Ordering::Acquire)
    }

    /// True if an observer is told of the steps on this file.
    pub(crate) fn is_observed(&self) -> bool {
        self.events.is_some()
    }

    /// Returns `result`, and poisons the image if it is an error.
    pub(crate) fn poison_on_error<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.poison();
        }
        result
    }

    /// Reports a step to the storage's observer, right before the step's storage call.
    pub(crate) fn event(&self, event: Event) {
        if let Some(events) = &self.events {
            events.event(event);
        }
    }

    /// True if `rule` is kept: always, except in tests that switch it off.
    pub(crate) fn keeps(&self, rule: OrderingRule) -> bool {
        self.rules.keep(rule)
    }

    /// A barrier: makes everything durable that was written to the image file.
    pub(crate) fn flush(&self) -> Result<()> {
        Ok(self.storage.flush()?)
    }

    /// Reserves space for tables of `len` bytes, if the storage can. Errors: `NoSpace`, `Storage`.
    pub(crate) fn reserve_space(&self, tables: HostOffset, len: u64) -> Result<()> {
        invariant::may_write(self.writable);
        match self.storage.allocate(tables, len) {
            Err(error) if error.kind() != StorageErrorKind::Unsupported => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Pads the image file to a whole (sub)cluster, or to a whole sector of `sector` bytes if the last
    /// cluster holds compressed streams (`packed`: host offset behind the last stream). Some other readers
    /// treat a short read of the last cluster as an error.
    pub(crate) fn pad_end(&self, packed: Option<u64>, sector: u64) -> Result<()> {
        let (geometry, len) = (self.geometry(), self.storage.len()?);
        let packed = packed.is_some_and(|start| geometry.align_down(start) == geometry.align_down(len));
        let unit = if packed { sector } else { geometry.subcluster_size() };
        if !len.is_multiple_of(unit) && self.storage.limits().growable() {
            invariant::may_write(self.writable);
            self.storage.set_len(len.next_multiple_of(unit))?;
        }
        Ok(())
    }
}

#[cfg(feature = "unstable-mutants")]
fn rules(options: &OpenOptions) -> Rules {
    Rules { broken: options.broken_rule }
}

#[cfg(not(feature = "unstable-mutants"))]
fn rules(_options: &OpenOptions) -> Rules {
    Rules::default()
}

/// Reads `count` big-endian words at `offset`; words past the end of the file are zero. The caller has
/// checked `count` against a limit.
pub(crate) fn read_words(storage: &dyn Storage, offset: HostOffset, count: u64) -> Result<Vec<u64>> {
    // Zeroed memory that is not touched is not in use: a large table in a hole costs nothing.
    let mut words = vec![0; count as usize];
    read_pieces(storage, offset, count, &mut |start, piece| {
        let read = qcow2_format::bytes::words(piece);
        words[start as usize..].iter_mut().zip(read).for_each(|(word, read)| *word = read);
    })?;
    Ok(words)
}

/// Reads `count` words at `offset` piece by piece, so that a table of up to 32 MiB is not in memory twice:
/// calls `take` with the index of the first word of each piece, and its bytes. Leaves out holes of large
/// tables, which are zeroes.
pub(crate) fn read_pieces(
    storage: &dyn Storage,
    offset: HostOffset,
    count: u64,
    take: &mut dyn FnMut(u64, &[u8]),
) -> Result<()> {
    let mut piece = vec![0; (count * 8).min(TABLE_PIECE) as usize];
    let mut done = 0;
    while done < count {
        let at = offset.checked_add(done * 8).ok_or_else(|| Error::corrupt("a table passes 2^64"))?;
        let len = (count - done) * 8;
        let hole = if len > TABLE_PIECE { hole_at(storage, at, len) / 8 } else { 0 };
        if hole == 0 {
            let bytes = &mut piece[..len.min(TABLE_PIECE) as usize];
            storage.read_padded(at, bytes)?;
            take(done, bytes);
            done += bytes.len() as u64 / 8;
        }
        done += hole;
    }
    Ok(())
}

/// Bytes of the hole at `at`, at most `len`; 0 if there is none or the storage does not tell.
fn hole_at(storage: &dyn Storage, at: HostOffset, len: u64) -> u64 {
    let inside = storage.len().map_or(len, |end| end.saturating_sub(at.value()).min(len));
    if inside == 0 {
        return len;
    }
    storage.extent_at(at, inside).ok().filter(|extent| !extent.data).map_or(0, |extent| extent.len.min(len))
}
