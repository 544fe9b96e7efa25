//! The cache of table pages, set associative. A hit takes the read lock of one set, which is never held over
//! I/O.
//!
//! Invariant: a page is evicted only if it is clean and has no user, and a page is read from disk only while
//! no other copy of it can exist. So there is at most one copy of a page in memory, and no change is lost.

use super::page::{DirtyRun, Page};
use crate::error::Result;
use crate::port::storage::Storage;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Mutex, Rank, RwLock, lock, read, write};
use ::alloc::boxed::Box;
use ::alloc::sync::Arc;
use ::alloc::vec;
use ::alloc::vec::Vec;
use qcow2_format::HostOffset;

const WAYS: usize = 8;
const MAX_SETS: u64 = 1 << 16;

struct Set {
    pages: RwLock<Vec<Arc<Page>>>,
    loading: Mutex<()>,
}

/// A cache for the pages of one kind of table, by host offset.
pub(crate) struct PageCache {
    sets: Box<[Set]>,
    page_size: u64,
    set_bits: u32,
    ways: usize,
    dirty: Mutex<Vec<Arc<Page>>>,
    dirty_count: AtomicUsize,
    dirty_limit: usize,
}

impl PageCache {
    /// A cache of about `bytes` bytes, in pages of `page_size` bytes, a power of two of at least 512.
    /// `needed`: bytes of all tables of this kind; if they fit, changed pages never have to be written to
    /// make room.
    pub(crate) fn new(page_size: u64, bytes: u64, needed: u64) -> Self {
        assert!(page_size.is_power_of_two() && page_size >= 512, "pages of {page_size} bytes");
        let pages = (bytes / page_size).max(WAYS as u64);
        let set_count = (pages / WAYS as u64).clamp(1, MAX_SETS).next_power_of_two();
        let ways = pages.div_ceil(set_count).max(4) as usize;
        let set = || Set {
            pages: RwLock::new(Rank::CachePages, Vec::new()),
            loading: Mutex::new(Rank::CacheLoading, ()),
        };
        Self {
            sets: (0..set_count).map(|_| set()).collect(),
            page_size,
            set_bits: set_count.trailing_zeros(),
            ways,
            dirty: Mutex::new(Rank::CacheDirty, Vec::new()),
            dirty_count: AtomicUsize::new(0),
            // Dirty pages cannot be evicted, so a flush is due before they fill the cache.
            dirty_limit: if bytes >= needed { usize::MAX } else { (pages as usize * 3 / 4).max(4) },
        }
    }

    /// The page size in bytes.
    pub(crate) fn page_size(&self) -> u64 {
        self.page_size
    }

    /// The start of the page that holds `offset`, and the index of the word in it.
    pub(crate) fn locate(&self, offset: HostOffset) -> (HostOffset, usize) {
        let inside = offset.value() & (self.page_size - 1);
        (HostOffset::new(offset.value() - inside), (inside / 8) as usize)
    }

    fn set(&self, page: HostOffset) -> &Set {
        let number = page.value() / self.page_size;
        // Fibonacci hashing: tables often lie at regular distances, which must not meet in one set.
        let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let index = if self.set_bits == 0 { 0 } else { (hash >> (64 - self.set_bits)) as usize };
        &self.sets[index]
    }

    /// The page that starts at `page`, if it is cached. No I/O.
    pub(crate) fn cached(&self, page: HostOffset) -> Option<Arc<Page>> {
        let pages = read(&self.set(page).pages);
        let found = pages.iter().find(|p| p.offset() == page)?;
        found.touch();
        Some(Arc::clone(found))
    }

    /// The page that starts at `page`, read from `storage` if it is not cached; bytes past the end are
    /// zeroes.
    pub(crate) fn load(&self, storage: &dyn Storage, page: HostOffset) -> Result<Arc<Page>> {
        if let Some(found) = self.cached(page) {
            return Ok(found);
        }
        debug_assert!(page.value().is_multiple_of(self.page_size), "a page at {page}");
        let set = self.set(page);
        // Only one thread per set loads, and it holds the lock over its I/O: two threads that load the same
        // page would make two copies, and a change of one copy would be lost. Hits in the set do not wait.
        let _loading = lock(&set.loading);
        if let Some(found) = self.cached(page) {
            return Ok(found);
        }
        let mut bytes = vec![0; self.page_size as usize];
        storage.read_padded(page, &mut bytes)?;
        let loaded = Arc::new(Page::from_bytes(page, &bytes));
        self.insert(set, Arc::clone(&loaded));
        Ok(loaded)
    }

    fn insert(&self, set: &Set, page: Arc<Page>) {
        let mut pages = write(&set.pages);
        debug_assert!(pages.iter().all(|other| other.offset() != page.offset()), "a second copy of a page");
        // Two passes: the first one clears the used marks, so that the second one finds a victim. If all
        // pages are dirty or in use, the set gets larger than `ways` for a while.
        let mut tries = pages.len() * 2;
        let mut at = 0;
        while pages.len() >= self.ways && tries > 0 {
            tries -= 1;
            at %= pages.len();
            let victim = &pages[at];
            if Arc::strong_count(victim) == 1 && !victim.is_dirty() && !victim.take_used() {
                pages.swap_remove(at);
            } else {
                at += 1;
            }
        }
        pages.push(page);
    }

    /// Drops every cached page of the table of `len` bytes at `table`, changes included: the table was freed,
    /// or its clusters are going to be used for another table.
    pub(crate) fn forget(&self, table: HostOffset, len: u64) {
        debug_assert!(
            table.value().is_multiple_of(self.page_size),
            "a table at {table} starts inside a page"
        );
        // A damaged entry may lead to the last cluster that a number names.
        let (mut at, end) = (table.value(), table.value().saturating_add(len));
        while at < end {
            let set = self.set(HostOffset::new(at));
            let _loading = lock(&set.loading);
            write(&set.pages).retain(|page| {
                let keep = page.offset().value() != at;
                if !keep {
                    page.forget_changes();
                }
                keep
            });
            at = at.saturating_add(self.page_size);
        }
    }

    /// Drops every cached page. The caller makes sure that no page is dirty or in use.
    pub(crate) fn clear(&self) {
        for set in &self.sets {
            let _loading = lock(&set.loading);
            write(&set.pages).clear();
        }
    }

    /// Queues a changed page for writeback. The caller keeps the commit gate open.
    pub(crate) fn note_dirty(&self, page: &Arc<Page>) {
        if page.queue() {
            lock(&self.dirty).push(Arc::clone(page));
            self.dirty_count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// True if so many pages are queued that a flush is due.
    pub(crate) fn is_pressed(&self) -> bool {
        self.dirty_count.load(Ordering::Relaxed) >= self.dirty_limit
    }

    /// Takes copies of all changed sectors for writeback, in host order, and marks the pages clean. The
    /// caller has closed the commit gate, and keeps the pages until the sectors are written: a page evicted
    /// before that would be read back from disk without its changes.
    pub(crate) fn take_dirty(&self) -> (Vec<Arc<Page>>, Vec<DirtyRun>) {
        let mut pages = core::mem::take(&mut *lock(&self.dirty));
        self.dirty_count.store(0, Ordering::Relaxed);
        pages.sort_by_key(|p| p.offset());
        let mut runs = Vec::new();
        for page in &pages {
            page.take_dirty(&mut runs);
        }
        (pages, join_runs(runs))
    }

    /// Queues again what [`take_dirty`](Self::take_dirty) has returned, because it could not be written. The
    /// caller keeps the commit gate open, or keeps others from taking changes in another way.
    pub(crate) fn put_back(&self, pages: &[Arc<Page>], runs: &[DirtyRun]) {
        for page in pages {
            let set = self.set(page.offset());
            let _loading = lock(&set.loading);
            // A table that was freed meanwhile must not be written any more.
            if !read(&set.pages).iter().any(|cached| Arc::ptr_eq(cached, page)) {
                continue;
            }
            let first = runs.partition_point(|run| run.end() <= page.offset().value());
            let end = page.offset().value() + self.page_size;
            runs[first..]
                .iter()
                .take_while(|run| run.offset.value() < end)
                .for_each(|run| page.put_back(run));
            self.note_dirty(page);
        }
    }
}

/// Joins adjacent runs, so that adjacent tables go out in one write.
pub(crate) fn join_runs(runs: Vec<DirtyRun>) -> Vec<DirtyRun> {
    let mut joined: Vec<DirtyRun> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut() {
            Some(last) if last.end() == run.offset.value() => {
                last.bytes.extend_from_slice(&run.bytes);
            }
            _ => joined.push(run),
        }
    }
    debug_assert!(
        joined.windows(2).all(|pair| pair[0].end() < pair[1].offset.value()),
        "a sector of a table is written twice in one round"
    );
    joined
}
