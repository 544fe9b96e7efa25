//! Which contents a read may return while many threads change a disk: records when each change began and
//! ended.
//!
//! A read may return the content of any change that began before the read ended, unless another change lies
//! entirely in between: it began after the first one ended, and ended before the read began. Each content
//! names the change that wrote it and its sector, so misplaced bytes are always detected.

use crate::crash::SECTOR;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The content of zeroes.
pub const ZEROES: u64 = 0;

/// Fills whole sectors, starting with sector number `first`, with content `id`. Content differs for every
/// `id` (but [`ZEROES`]) and every sector.
pub fn fill(id: u64, first: u64, bytes: &mut [u8]) {
    if id == ZEROES {
        return bytes.fill(0);
    }
    for (sector, chunk) in (first..).zip(bytes.chunks_mut(SECTOR as usize)) {
        for (index, word) in chunk.chunks_mut(8).enumerate() {
            word.copy_from_slice(&content_word(id, sector, index as u64).to_le_bytes());
        }
    }
}

fn content_word(id: u64, sector: u64, index: u64) -> u64 {
    match index {
        0 => id,
        1 => sector,
        // The same value for eight words, so that it compresses.
        _ => (id ^ sector.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index / 8),
    }
}

/// The content id of one sector, or what is wrong with it.
fn identify(sector: u64, bytes: &[u8]) -> Result<u64, String> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(ZEROES);
    }
    let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
    let id = words[0];
    let wrong = (0..).zip(&words).find(|&(index, &word)| word != content_word(id, sector, index));
    match wrong {
        None => Ok(id),
        Some((1, other)) => Err(format!("content {id:#x} of sector {other}")),
        Some((index, _)) => Err(format!("content {id:#x} up to word {index}, then something else")),
    }
}

#[derive(Clone, Copy, Debug)]
struct Change {
    id: u64,
    begun: u64,
    /// `u64::MAX` while the change is in flight.
    ended: u64,
    /// The change may leave the sector as it was (a discard).
    optional: bool,
}

/// A change in flight.
#[derive(Clone, Debug)]
pub struct Begun {
    sectors: Range<u64>,
    at: u64,
}

/// The changes of every sector of a disk.
#[derive(Debug)]
pub struct History {
    clock: AtomicU64,
    sectors: Vec<Mutex<Vec<Change>>>,
}

impl History {
    /// A disk of `sectors` sectors, each with the initial content `id(sector)`.
    pub fn new(sectors: u64, id: impl Fn(u64) -> u64) -> Self {
        let first = |sector| Change { id: id(sector), begun: 0, ended: 0, optional: false };
        Self {
            clock: AtomicU64::new(1),
            sectors: (0..sectors).map(|sector| Mutex::new(vec![first(sector)])).collect(),
        }
    }

    /// How many sectors there are.
    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// A timestamp, later than every one before.
    pub fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// Records that a change to content `id` begins. `optional`: it may also do nothing (a discard).
    pub fn begin(&self, sectors: Range<u64>, id: u64, optional: bool) -> Begun {
        let at = self.now();
        for sector in sectors.clone() {
            self.changes(sector).push(Change { id, begun: at, ended: u64::MAX, optional });
        }
        Begun { sectors, at }
    }

    /// Records that the change has returned.
    pub fn end(&self, change: Begun) {
        let now = self.now();
        for sector in change.sectors {
            if let Some(found) = self.changes(sector).iter_mut().find(|c| c.begun == change.at) {
                found.ended = now;
            }
        }
    }

    /// Records that the change has returned and did nothing.
    pub fn cancel(&self, change: Begun) {
        for sector in change.sectors {
            self.changes(sector).retain(|c| c.begun != change.at);
        }
    }

    /// Checks the sectors that a read returned: it began at `begun`, ends now, and starts at sector number
    /// `first`.
    pub fn check(&self, first: u64, seen: &[u8], begun: u64) -> Result<(), String> {
        for (sector, bytes) in (first..).zip(seen.chunks(SECTOR as usize)) {
            let id = identify(sector, bytes);
            let changes = self.changes(sector);
            let describe = |what: &str| {
                let recent: Vec<_> = changes.iter().rev().take(6).collect();
                format!("sector {sector} holds {what}; read began at {begun}, latest changes {recent:x?}")
            };
            let id = id.map_err(|what| describe(&what))?;
            let before = changes.iter().filter(|c| c.ended < begun && !c.optional);
            let horizon = before.map(|c| c.begun).max().unwrap_or(0);
            if !changes.iter().any(|c| c.id == id && c.ended >= horizon) {
                return Err(describe(&format!("content {id:#x}, which is outdated or was never written")));
            }
        }
        Ok(())
    }

    /// Makes `seen`, read while nothing changed, the only allowed content; it must have been allowed.
    pub fn settle(&self, seen: &[u8]) -> Result<(), String> {
        let now = self.now();
        self.check(0, seen, now)?;
        for (sector, bytes) in (0..).zip(seen.chunks(SECTOR as usize)) {
            let id = identify(sector, bytes)?;
            *self.changes(sector) = vec![Change { id, begun: now, ended: now, optional: false }];
        }
        Ok(())
    }

    fn changes(&self, sector: u64) -> MutexGuard<'_, Vec<Change>> {
        self.sectors[sector as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(id: u64, sector: u64) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR as usize];
        fill(id, sector, &mut bytes);
        bytes
    }

    fn check(history: &History, begun: u64, id: u64, fine: bool) {
        let result = history.check(0, &content(id, 0), begun);
        assert_eq!(result.is_ok(), fine, "content {id}: {result:?}");
    }

    #[test]
    fn overlapping_changes_leave_either_content() {
        let history = History::new(1, |_| 7);
        let a = history.begin(0..1, 8, false);
        let b = history.begin(0..1, 9, false);
        let read = history.now();
        [7, 8, 9].into_iter().for_each(|id| check(&history, read, id, true));
        history.end(a);
        let read = history.now();
        // The first content is outdated; the second change is still in flight.
        [8, 9].into_iter().for_each(|id| check(&history, read, id, true));
        check(&history, read, 7, false);
        history.end(b);
        let read = history.now();
        [8, 9].into_iter().for_each(|id| check(&history, read, id, true));
        let c = history.begin(0..1, 10, false);
        history.end(c);
        // A read that began earlier may see any of them, a later one only the last.
        [8, 9, 10].into_iter().for_each(|id| check(&history, read, id, true));
        let read = history.now();
        [8, 9, ZEROES].into_iter().for_each(|id| check(&history, read, id, false));
        check(&history, read, 10, true);
    }

    #[test]
    fn a_discard_may_do_nothing() {
        let history = History::new(1, |_| 7);
        let discard = history.begin(0..1, ZEROES, true);
        history.end(discard);
        let read = history.now();
        [7, ZEROES].into_iter().for_each(|id| check(&history, read, id, true));
        history.settle(&content(ZEROES, 0)).unwrap();
        let read = history.now();
        check(&history, read, 7, false);
    }

    #[test]
    fn misplaced_and_torn_contents_are_reported() {
        let history = History::new(2, |_| 7);
        let begun = history.now();
        let error = history.check(0, &content(7, 1), begun).unwrap_err();
        assert!(error.contains("content 0x7 of sector 1"), "{error}");
        let mut torn = content(7, 0);
        torn[256..].fill(0);
        let error = history.check(0, &torn, begun).unwrap_err();
        assert!(error.contains("content 0x7 up to word 32"), "{error}");
        let cancelled = history.begin(0..2, 9, false);
        history.cancel(cancelled);
        check(&history, begun, 9, false);
    }
}
