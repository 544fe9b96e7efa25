//! A storage that simulates power cuts: it keeps the durable content and every change since the last flush.
//!
//! The medium writes one 512-byte sector atomically and nothing more. Until a flush returns, each changed
//! sector may hold any version since the last flush, or the durable one, independently of all other sectors;
//! the length may be any length since the last flush. A [`Cut`] draws images under these rules.
//!
//! Several storages (an image and its data file) form one [`CrashWorld`]: each has its own flushes, but all
//! lose power at the same moment.

use crate::cut::Cut;
use crate::pages::{MAX_LEN, PageBytes};
use qcow2_core::{HostOffset, Limits, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode};
use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes that the medium writes atomically.
pub const SECTOR: u64 = 512;

/// The moment at which the hook is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Before a write, write of zeroes, discard, allocation or change of length.
    BeforeChange,
    /// Before a flush.
    BeforeFlush,
    /// A flush has made everything durable and is about to return.
    AfterFlush,
}

/// Called at every [`Event`] of any storage of a world, with the world locked: the hook must not call into
/// the world.
pub type Hook = Arc<dyn Fn(Event, &Cut<'_>) + Send + Sync>;

/// One version of a sector since the last flush.
#[derive(Clone, Debug)]
pub(crate) struct Version {
    /// Number of the change that made it; numbers ascend over all storages of the world.
    pub(crate) change: u64,
    /// Content of the sector; `None` is all zeroes.
    pub(crate) data: Option<Arc<[u8; SECTOR as usize]>>,
}

/// One length of a storage since the last flush.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Length {
    pub(crate) change: u64,
    pub(crate) len: u64,
    /// True if this change truncated the storage, so that no older byte from `len` on can reappear.
    pub(crate) cut: bool,
}

/// One storage of a world.
#[derive(Debug)]
pub(crate) struct DiskState {
    pub(crate) durable: PageBytes,
    pub(crate) live: PageBytes,
    /// Versions of each sector since the last flush, oldest first.
    pub(crate) unflushed: BTreeMap<u64, Vec<Version>>,
    /// Lengths since the last flush, oldest first; the first one is the durable length.
    pub(crate) lengths: Vec<Length>,
    capacity: u64,
    limits: Limits,
    flushes: u64,
}

/// The state of a world, locked during a cut.
#[derive(Debug, Default)]
pub(crate) struct WorldState {
    pub(crate) disks: Vec<DiskState>,
    /// Number of the latest change.
    pub(crate) change: u64,
}

/// Storages that lose power together.
#[derive(Default)]
pub struct CrashWorld {
    state: Mutex<WorldState>,
    hook: Mutex<Option<Hook>>,
}

/// One storage of a [`CrashWorld`]; reads see every change immediately.
pub struct CrashStorage {
    world: Arc<CrashWorld>,
    index: usize,
}

impl CrashWorld {
    /// A world without storages.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Adds a storage with the durable content `content`. Cuts list storages in the order they were added.
    pub fn add(self: &Arc<Self>, content: PageBytes) -> Arc<CrashStorage> {
        self.add_with(content, MAX_LEN, Limits::default())
    }

    /// Adds a storage with these `limits` and `capacity` bytes; growing past the capacity fails with
    /// `NoSpace`.
    pub fn add_with(
        self: &Arc<Self>,
        content: PageBytes,
        capacity: u64,
        limits: Limits,
    ) -> Arc<CrashStorage> {
        let mut state = self.locked();
        let index = state.disks.len();
        state.disks.push(DiskState::new(content, capacity.min(MAX_LEN), limits));
        Arc::new(CrashStorage { world: Arc::clone(self), index })
    }

    /// Sets the hook that is called at every event from now on; `None` removes it.
    pub fn set_hook(&self, hook: Option<Hook>) {
        *self.hook.lock().unwrap_or_else(PoisonError::into_inner) = hook;
    }

    /// Lets `look` draw crash images as of this moment.
    pub fn cut<R>(&self, look: impl FnOnce(&Cut<'_>) -> R) -> R {
        look(&Cut::new(&self.locked()))
    }

    fn locked(&self) -> MutexGuard<'_, WorldState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call_hook(&self, event: Event, state: &WorldState) {
        let hook = self.hook.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(hook) = hook {
            hook(event, &Cut::new(state));
        }
    }

    fn change<R>(&self, index: usize, change: impl FnOnce(&mut DiskState, u64) -> R) -> R {
        let mut state = self.locked();
        self.call_hook(Event::BeforeChange, &state);
        state.change += 1;
        let number = state.change;
        change(&mut state.disks[index], number)
    }
}

impl DiskState {
    fn new(content: PageBytes, capacity: u64, limits: Limits) -> Self {
        let len = content.len();
        Self {
            durable: content.clone(),
            live: content,
            unflushed: BTreeMap::new(),
            lengths: vec![Length { change: 0, len, cut: false }],
            capacity,
            limits,
            flushes: 0,
        }
    }

    fn check_end(&self, offset: HostOffset, len: u64) -> Result<u64, StorageError> {
        let end = offset.value().checked_add(len).filter(|&end| end <= i64::MAX as u64);
        let end = end.ok_or_else(|| {
            StorageError::new(
                StorageErrorKind::OutOfRange,
                format!("{len} bytes at {offset} end past 2^63 - 1"),
            )
        })?;
        if end <= self.live.len() {
            return Ok(end);
        }
        if !self.limits.growable() {
            return Err(StorageError::new(
                StorageErrorKind::OutOfRange,
                format!("{len} bytes at {offset} end past the fixed size {:#x}", self.live.len()),
            ));
        }
        if end > self.capacity {
            return Err(StorageError::new(
                StorageErrorKind::NoSpace,
                format!("{len} bytes at {offset} end past the capacity {:#x}", self.capacity),
            )
            .with_os_code(28));
        }
        Ok(end)
    }

    fn write(&mut self, change: u64, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let from = (at % SECTOR) as usize;
            let n = (SECTOR as usize - from).min(bytes.len() - done);
            let mut data = [0; SECTOR as usize];
            self.live.read(at / SECTOR * SECTOR, &mut data);
            if data[from..from + n] != bytes[done..done + n] {
                data[from..from + n].copy_from_slice(&bytes[done..done + n]);
                let versions = self.unflushed.entry(at / SECTOR).or_default();
                versions.push(Version { change, data: Some(Arc::new(data)) });
            }
            done += n;
        }
        self.live.write(offset, bytes);
        self.note_length(change, false);
    }

    fn zero(&mut self, change: u64, offset: u64, len: u64) {
        self.note_zeroes(change, offset, len);
        self.live.zero(offset, len);
        self.note_length(change, false);
    }

    fn set_len(&mut self, change: u64, len: u64) {
        let old = self.live.len();
        if len < old {
            self.note_zeroes(change, len, old - len);
        }
        self.live.set_len(len);
        self.note_length(change, len < old);
    }

    /// Adds a zero version to every sector in the range; sectors covered in part keep their other bytes.
    fn note_zeroes(&mut self, change: u64, offset: u64, len: u64) {
        let end = (offset + len).min(self.live.len());
        let mut at = offset;
        while at < end {
            let (run, used) = self.live.run_at(at, end - at);
            if !used {
                at += run;
                continue;
            }
            let start = at / SECTOR * SECTOR;
            let (from, to) = ((at - start) as usize, (end - start).min(SECTOR) as usize);
            let mut data = [0; SECTOR as usize];
            self.live.read(start, &mut data);
            if data[from..to].iter().any(|&b| b != 0) {
                data[from..to].fill(0);
                let left = data.iter().any(|&b| b != 0).then(|| Arc::new(data));
                self.unflushed.entry(start / SECTOR).or_default().push(Version { change, data: left });
            }
            at = start + SECTOR;
        }
    }

    fn note_length(&mut self, change: u64, cut: bool) {
        let len = self.live.len();
        if self.lengths.last().is_none_or(|last| last.len != len) {
            self.lengths.push(Length { change, len, cut });
        }
    }

    fn flush(&mut self) {
        self.flushes += 1;
        self.durable = self.live.clone();
        self.unflushed.clear();
        self.lengths = vec![Length { change: 0, len: self.live.len(), cut: false }];
    }
}

impl CrashStorage {
    /// How many flushes were made so far.
    pub fn flushes(&self) -> u64 {
        self.look(|disk| disk.flushes)
    }

    /// The content as a reader sees it now, unflushed changes included.
    pub fn live(&self) -> PageBytes {
        self.look(|disk| disk.live.clone())
    }

    fn look<R>(&self, look: impl FnOnce(&DiskState) -> R) -> R {
        look(&self.world.locked().disks[self.index])
    }
}

impl Storage for CrashStorage {
    fn len(&self) -> Result<u64, StorageError> {
        Ok(self.look(|disk| disk.live.len()))
    }

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        Ok(self.look(|disk| disk.live.read(offset.value(), buf)))
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.world.change(self.index, |disk, change| {
            disk.check_end(offset, buf.len() as u64)?;
            disk.write(change, offset.value(), buf);
            Ok(())
        })
    }

    fn write_vectored_at(&self, offset: HostOffset, bufs: &[&[u8]]) -> Result<(), StorageError> {
        self.write_at(offset, &bufs.concat())
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, _mode: ZeroMode) -> Result<(), StorageError> {
        self.world.change(self.index, |disk, change| {
            disk.check_end(offset, len)?;
            disk.zero(change, offset.value(), len);
            Ok(())
        })
    }

    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.world.change(self.index, |disk, change| {
            let at = offset.value();
            let len = len.min(disk.live.len().saturating_sub(at));
            if len > 0 {
                disk.zero(change, at, len);
            }
            Ok(())
        })
    }

    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.world.change(self.index, |disk, change| {
            let end = disk.check_end(offset, len)?;
            if end > disk.live.len() {
                disk.set_len(change, end);
            }
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        self.world.change(self.index, |disk, change| {
            if !disk.limits.growable() && len != disk.live.len() {
                let kind = StorageErrorKind::FixedLength(disk.limits.length);
                return Err(StorageError::new(kind, "storage has a fixed size"));
            }
            disk.check_end(HostOffset::new(len), 0)?;
            disk.set_len(change, len);
            Ok(())
        })
    }

    fn flush(&self) -> Result<(), StorageError> {
        let mut state = self.world.locked();
        self.world.call_hook(Event::BeforeFlush, &state);
        state.disks[self.index].flush();
        self.world.call_hook(Event::AfterFlush, &state);
        Ok(())
    }

    /// Copies between two storages of the same world; counts as one change.
    fn copy_from(
        &self,
        source: &dyn Storage,
        from: HostOffset,
        offset: HostOffset,
        len: u64,
    ) -> Result<(), StorageError> {
        let source = source.copy_source().and_then(|source| source.downcast_ref::<Self>());
        let Some(source) = source.filter(|source| Arc::ptr_eq(&source.world, &self.world)) else {
            return Err(StorageError::new(
                StorageErrorKind::Unsupported,
                "the source is not a storage of this world",
            ));
        };
        let mut bytes = vec![0; len as usize];
        if source.read_at(from, &mut bytes)? < bytes.len() {
            return Err(StorageError::new(
                StorageErrorKind::OutOfRange,
                "the source ends before the end of the range",
            ));
        }
        self.write_at(offset, &bytes)
    }

    fn copy_source(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        let (len, data) = self.look(|disk| disk.live.run_at(offset.value(), len));
        Ok(StorageExtent { len, data })
    }

    fn limits(&self) -> Limits {
        self.look(|disk| disk.limits)
    }

    fn used_bytes(&self) -> Result<Option<u64>, StorageError> {
        Ok(Some(self.look(|disk| disk.live.used())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;
    use std::collections::BTreeSet;

    fn at(sector: u64) -> HostOffset {
        HostOffset::new(sector * SECTOR)
    }

    /// The image as text: the first byte of each sector.
    fn letters(bytes: &PageBytes) -> String {
        bytes.to_vec().chunks(SECTOR as usize).map(|s| if s[0] == 0 { '.' } else { s[0] as char }).collect()
    }

    fn put(storage: &CrashStorage, sector: u64, text: &str) {
        let bytes: Vec<u8> = text.bytes().flat_map(|b| [b; SECTOR as usize]).collect();
        storage.write_at(at(sector), &bytes).unwrap();
    }

    fn all(world: &CrashWorld) -> BTreeSet<String> {
        world.cut(|cut| (0..cut.combinations()).map(|n| letters(&cut.image(n).disks[0])).collect())
    }

    fn sampled(world: &CrashWorld, count: usize) -> BTreeSet<String> {
        let mut rng = Rng::new(5);
        world.cut(|cut| (0..count).map(|_| letters(&cut.sample(&mut rng).disks[0])).collect())
    }

    /// A world with one storage whose durable content is `text`.
    fn world(text: &str) -> (Arc<CrashWorld>, Arc<CrashStorage>) {
        let world = CrashWorld::new();
        let storage = world.add(PageBytes::new());
        put(&storage, 0, text);
        storage.flush().unwrap();
        (world, storage)
    }

    fn check(world: &CrashWorld, expected: &[&str]) {
        let expected: BTreeSet<String> = expected.iter().map(|s| s.to_string()).collect();
        assert_eq!(all(world), expected);
        assert_eq!(sampled(world, 4000), expected);
    }

    #[test]
    fn each_unflushed_sector_may_hold_any_version() {
        let (world, storage) = world("ab");
        put(&storage, 0, "c");
        put(&storage, 0, "de");
        check(&world, &["ab", "cb", "db", "ae", "ce", "de"]);
        assert_eq!(letters(&storage.live()), "de");
        storage.flush().unwrap();
        check(&world, &["de"]);
    }

    #[test]
    fn writes_tear_at_sector_boundaries_only() {
        let (world, storage) = world("aaa");
        storage.write_at(HostOffset::new(256), &[b'x'; 1024]).unwrap();
        let images: BTreeSet<Vec<u8>> =
            world.cut(|cut| (0..cut.combinations()).map(|n| cut.image(n).disks[0].to_vec()).collect());
        assert_eq!(images.len(), 8);
        for image in images {
            let half = |n: usize| image[n * 256];
            assert!(half(0) == b'a' && half(5) == b'a', "bytes beside the write changed");
            assert!(half(2) == half(3), "a sector tore");
        }
    }

    #[test]
    fn unflushed_zeroes_and_discards_may_be_lost() {
        let (world, storage) = world("abc");
        storage.write_zeroes(at(0), SECTOR, ZeroMode::MayUnmap).unwrap();
        storage.discard(at(2), 5 * SECTOR).unwrap();
        check(&world, &["abc", ".bc", "ab.", ".b."]);
        assert_eq!(storage.len().unwrap(), 3 * SECTOR);
    }

    #[test]
    fn lost_growth_loses_the_data_past_the_old_end() {
        let (world, storage) = world("a");
        put(&storage, 2, "c");
        let expected = ["a", "a..", "a.c"].map(String::from);
        assert_eq!(all(&world), expected.clone().into());
        // A growth may also arrive in part.
        let mut torn = BTreeSet::from(expected);
        torn.insert("a.".into());
        assert_eq!(sampled(&world, 3000), torn);
    }

    #[test]
    fn truncated_bytes_never_reappear() {
        let (world, storage) = world("abc");
        storage.set_len(SECTOR).unwrap();
        storage.set_len(3 * SECTOR).unwrap();
        put(&storage, 2, "x");
        let images = all(&world);
        let mut torn = images.clone();
        torn.insert("a.".into());
        assert_eq!(sampled(&world, 4000), torn);
        // Before the truncation arrived: old or new content, sector by sector. After it: nothing of "bc".
        assert!(images.contains("abc") && images.contains("a") && images.contains("a.x"));
        let regrown: BTreeSet<_> = world.cut(|cut| {
            let with_last_length = (0..cut.combinations()).filter(|n| n % 3 == 2);
            with_last_length.map(|n| letters(&cut.image(n).disks[0])).collect()
        });
        assert_eq!(regrown, ["a..", "a.x"].map(String::from).into());
    }

    #[test]
    fn storages_flush_separately_and_lose_power_together() {
        let world = CrashWorld::new();
        let image = world.add(PageBytes::new());
        let data = world.add(PageBytes::new());
        put(&image, 0, "a");
        put(&data, 0, "b");
        data.flush().unwrap();
        let both: BTreeSet<_> = world.cut(|cut| {
            let draw = |n| cut.image(n).disks.iter().map(letters).collect::<Vec<_>>();
            (0..cut.combinations()).map(draw).collect()
        });
        let expected = [["", "b"], [".", "b"], ["a", "b"]].map(|pair| pair.map(String::from).to_vec());
        assert_eq!(both, expected.into());
    }

    #[test]
    fn the_hook_is_called_at_every_event() {
        let (world, storage) = world("a");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        world.set_hook(Some(Arc::new(move |event, cut: &Cut<'_>| {
            log.lock().unwrap().push((event, letters(&cut.everything().disks[0]), cut.unflushed_sectors()));
        })));
        put(&storage, 0, "b");
        storage.discard(at(0), SECTOR).unwrap();
        storage.flush().unwrap();
        let expected = [
            (Event::BeforeChange, "a".to_string(), 0),
            (Event::BeforeChange, "b".to_string(), 1),
            (Event::BeforeFlush, ".".to_string(), 1),
            (Event::AfterFlush, ".".to_string(), 0),
        ];
        assert_eq!(*seen.lock().unwrap(), expected);
    }

    /// The simulation must be able to fail: it finds a pointer that was written without a barrier after its
    /// target, and accepts one that was written after a barrier.
    #[test]
    fn a_missing_barrier_is_found() {
        for barrier in [true, false] {
            let (world, storage) = world("...");
            put(&storage, 1, "t");
            if barrier {
                storage.flush().unwrap();
            }
            put(&storage, 0, "p");
            let dangling = |images: BTreeSet<String>| images.iter().any(|s| s.starts_with("p."));
            assert_eq!(dangling(all(&world)), !barrier);
            assert_eq!(dangling(sampled(&world, 200)), !barrier);
        }
    }

    #[test]
    fn growth_past_capacity_or_fixed_size_is_refused() {
        let world = CrashWorld::new();
        let small = world.add_with(PageBytes::new(), 1024, Limits::default());
        let error = small.write_at(at(1), &[1; 513]).unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::NoSpace);
        assert_eq!(small.len().unwrap(), 0);
        let error = small.write_at(HostOffset::new(u64::MAX), &[1; 2]).unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::OutOfRange);
    }
}
