//! A cached page of a metadata table: words that threads read without a lock, and a dirty mask of its
//! 512-byte sectors.
//!
//! Invariant: writeback never comes between a change and its dirty mark, because words change only while the
//! commit gate is open, and writeback copies them while it is closed.

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, Rank, lock};
use ::alloc::boxed::Box;
use ::alloc::vec::Vec;
use qcow2_format::HostOffset;
use qcow2_format::bytes::{table_bytes, words};

/// Bytes that the medium writes whole or not at all.
pub(crate) const SECTOR_SIZE: u64 = 512;
const SECTOR_WORDS: usize = 64;

/// A page of big-endian 64-bit words, kept in native order.
#[derive(Debug)]
pub(crate) struct Page {
    offset: HostOffset,
    words: Box<[AtomicU64]>,
    dirty: Box<[AtomicU64]>,
    queued: AtomicBool,
    used: AtomicBool,
    /// True if all words are equal; false once one of them has been changed.
    same: AtomicBool,
    /// Sequence lock for pairs of words: odd while a pair is being changed, so that readers get both words of
    /// one moment.
    version: AtomicU64,
    pair_writer: Mutex<()>,
}

/// A copy of consecutive changed sectors, for writeback.
pub(crate) struct DirtyRun {
    pub(crate) offset: HostOffset,
    pub(crate) bytes: Vec<u8>,
}

impl DirtyRun {
    /// The offset behind the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.offset.value() + self.bytes.len() as u64
    }
}

impl Page {
    /// A clean page at `offset` with the bytes on disk. The length of `bytes` is a multiple of 512.
    pub(crate) fn from_bytes(offset: HostOffset, bytes: &[u8]) -> Self {
        debug_assert!(bytes.len().is_multiple_of(SECTOR_SIZE as usize), "a page of {} bytes", bytes.len());
        let same = bytes.len() >= 8 && bytes[8..] == bytes[..bytes.len() - 8];
        let words = words(bytes).map(AtomicU64::new).collect::<Box<[_]>>();
        let sectors = words.len().div_ceil(SECTOR_WORDS);
        let dirty = (0..sectors.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self {
            offset,
            words,
            dirty,
            queued: AtomicBool::new(false),
            used: AtomicBool::new(true),
            same: AtomicBool::new(same),
            version: AtomicU64::new(0),
            pair_writer: Mutex::new(Rank::WordPair, ()),
        }
    }

    /// The page's offset in the image file.
    pub(crate) fn offset(&self) -> HostOffset {
        self.offset
    }

    /// How many words the page has.
    pub(crate) fn len(&self) -> usize {
        self.words.len()
    }

    /// The word at `index`, which must be below [`len`](Self::len).
    pub(crate) fn word(&self, index: usize) -> u64 {
        self.words[index].load(Ordering::Acquire)
    }

    /// The word that the page has everywhere, if it is known to have only one.
    pub(crate) fn same_words(&self) -> Option<u64> {
        if !self.same.load(Ordering::Relaxed) {
            return None;
        }
        // The word first: a change clears the mark before it changes a word.
        let word = self.words[0].load(Ordering::SeqCst);
        self.same.load(Ordering::SeqCst).then_some(word)
    }

    /// Changes a word and marks its sector dirty. The caller keeps the commit gate open until it has queued
    /// the page.
    pub(crate) fn set_word(&self, index: usize, value: u64) {
        // Before the word: whoever sees the new word does not take the others for equal to it.
        if self.same.load(Ordering::Relaxed) {
            self.same.store(false, Ordering::SeqCst);
        }
        // The word before its mark: writeback that saw only the mark would copy the old word and clear the
        // mark. (With the gate closed it sees both or none.)
        self.words[index].store(value, Ordering::SeqCst);
        self.mark(index / SECTOR_WORDS);
    }

    /// The words at `index` and `index + 1`, as they were at one moment.
    pub(crate) fn pair(&self, index: usize) -> (u64, u64) {
        // No lock: there are many readers and few changes, so a reader retries if the pair has changed
        // meanwhile.
        loop {
            let before = self.version.load(Ordering::SeqCst);
            if before & 1 == 0 {
                let first = self.words[index].load(Ordering::SeqCst);
                let second = self.words[index + 1].load(Ordering::SeqCst);
                if self.version.load(Ordering::SeqCst) == before {
                    return (first, second);
                }
            }
            crate::sync::spin();
        }
    }

    /// Changes the words at `index` and `index + 1` together; otherwise like [`set_word`](Self::set_word).
    pub(crate) fn set_pair(&self, index: usize, first: u64, second: u64) {
        let _writer = lock(&self.pair_writer);
        let before = self.version.fetch_add(1, Ordering::SeqCst);
        debug_assert!(before & 1 == 0, "two threads change pairs of a page at once");
        self.set_word(index, first);
        self.set_word(index + 1, second);
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// Marks the page as queued for writeback. Returns true if it was not queued yet.
    pub(crate) fn queue(&self) -> bool {
        !self.queued.swap(true, Ordering::AcqRel)
    }

    /// True if the page is queued for writeback.
    pub(crate) fn is_queued(&self) -> bool {
        self.queued.load(Ordering::Acquire)
    }

    /// Records a use, for eviction.
    pub(crate) fn touch(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// True if the page was used since the last call.
    pub(crate) fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// True if the page is queued or a sector differs from the disk.
    pub(crate) fn is_dirty(&self) -> bool {
        self.queued.load(Ordering::Acquire) || self.dirty.iter().any(|d| d.load(Ordering::Acquire) != 0)
    }

    /// Drops all dirty marks: the table is no longer part of the image.
    pub(crate) fn forget_changes(&self) {
        for mask in &self.dirty {
            mask.store(0, Ordering::Release);
        }
    }

    fn mark(&self, sector: usize) {
        self.dirty[sector / 64].fetch_or(1 << (sector % 64), Ordering::AcqRel);
    }

    /// Marks the sectors dirty again that `run` has a copy of: they could not be written.
    pub(crate) fn put_back(&self, run: &DirtyRun) {
        let (start, end) = (self.offset.value(), self.offset.value() + self.words.len() as u64 * 8);
        let (first, last) = (run.offset.value().max(start), run.end().min(end));
        for at in (first..last).step_by(SECTOR_SIZE as usize) {
            self.mark(((at - start) / SECTOR_SIZE) as usize);
        }
    }

    /// Appends copies of the dirty sectors to `runs` and marks them clean. The caller has closed the commit
    /// gate.
    pub(crate) fn take_dirty(&self, runs: &mut Vec<DirtyRun>) {
        self.queued.store(false, Ordering::Release);
        let sectors = self.words.len().div_ceil(SECTOR_WORDS);
        let masks: Vec<u64> = self.dirty.iter().map(|d| d.swap(0, Ordering::AcqRel)).collect();
        let is_dirty = |s: usize| masks[s / 64] >> (s % 64) & 1 == 1;
        let mut sector = 0;
        while sector < sectors {
            if !is_dirty(sector) {
                sector += 1;
                continue;
            }
            let end = (sector..sectors).find(|&s| !is_dirty(s)).unwrap_or(sectors);
            runs.push(self.copy_sectors(sector, end));
            sector = end;
        }
    }

    fn copy_sectors(&self, first: usize, end: usize) -> DirtyRun {
        debug_assert!(first < end, "sectors {first} to {end} of a page");
        let words = &self.words[first * SECTOR_WORDS..(end * SECTOR_WORDS).min(self.words.len())];
        let bytes = table_bytes(words.iter().map(|word| word.load(Ordering::Acquire)));
        let offset = HostOffset::new(self.offset.value() + first as u64 * SECTOR_SIZE);
        DirtyRun { offset, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dirty_sectors_are_written_back() {
        let page = Page::from_bytes(HostOffset::new(0x10000), &[0; 4096]);
        page.set_word(0, 1);
        page.set_word(65, 2);
        page.set_word(64 * 7, 3);
        let mut runs = Vec::new();
        page.take_dirty(&mut runs);
        let places: Vec<_> = runs.iter().map(|r| (r.offset.value(), r.bytes.len())).collect();
        assert_eq!(places, [(0x10000, 1024), (0x10e00, 512)]);
        assert_eq!(runs[0].bytes[..8], [0, 0, 0, 0, 0, 0, 0, 1]);
        assert!(!page.is_dirty());
    }

    #[test]
    fn a_changed_word_marks_its_own_sector_only() {
        let page = Page::from_bytes(HostOffset::new(0), &[0; 64 << 10]);
        for sector in 0..128 {
            page.set_word(sector * SECTOR_WORDS + sector % SECTOR_WORDS, 1);
            let mut runs = Vec::new();
            page.take_dirty(&mut runs);
            let places: Vec<_> = runs.iter().map(|r| (r.offset.value(), r.bytes.len())).collect();
            assert_eq!(places, [(sector as u64 * SECTOR_SIZE, 512)]);
        }
    }
}
