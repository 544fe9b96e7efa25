//! Changes during a flush: at each storage call of the flush in turn another thread makes a whole change, and
//! then the power is cut.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::{
    Codecs, CreateOptions, GuestOffset, GuestRange, HostOffset, Image, ImageFormat, Limits, NoResolver,
    OpenOptions, ResolvedSource, Storage, StorageError, StorageErrorKind, StorageExtent, ZeroMode, create,
};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::{CrashStorage, CrashWorld};
use qcow2_testkit::cut::CrashImage;
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::sim::RunCodec;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const CLUSTER: u64 = 512;
const SIZE: u64 = 64 * CLUSTER;
/// How long the flush waits for the other thread's change. A change that needs a lock of the flush finishes
/// after it.
const PATIENCE: Duration = Duration::from_millis(50);

/// What is done before the call, and the call's result unless that is fine.
type Meeting = Box<dyn FnOnce() -> Result<(), StorageError> + Send>;

/// A storage that runs a closure right before its n-th write, discard or flush from now on.
struct Door {
    inner: Arc<CrashStorage>,
    visit: Mutex<Option<(u64, Meeting)>>,
}

impl Door {
    fn knock(&self) -> Result<(), StorageError> {
        let mut visit = self.visit.lock().unwrap();
        let due = match &mut *visit {
            Some((0, _)) => visit.take(),
            Some((left, _)) => {
                *left -= 1;
                None
            }
            None => None,
        };
        // The closure uses this storage too.
        drop(visit);
        due.map_or(Ok(()), |(_, visit)| visit())
    }
}

impl Storage for Door {
    fn len(&self) -> Result<u64, StorageError> {
        self.inner.len()
    }
    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        self.inner.read_at(offset, buf)
    }
    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        self.knock()?;
        self.inner.write_at(offset, buf)
    }
    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        self.knock()?;
        self.inner.write_zeroes(offset, len, mode)
    }
    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.knock()?;
        self.inner.discard(offset, len)
    }
    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.inner.allocate(offset, len)
    }
    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        self.knock()?;
        self.inner.set_len(len)
    }
    fn flush(&self) -> Result<(), StorageError> {
        self.knock()?;
        self.inner.flush()
    }
    fn extent_at(&self, offset: HostOffset, len: u64) -> Result<StorageExtent, StorageError> {
        self.inner.extent_at(offset, len)
    }
    fn limits(&self) -> Limits {
        self.inner.limits()
    }
}

struct Bench {
    world: Arc<CrashWorld>,
    door: Arc<Door>,
    image: Arc<Image>,
}

fn open(storage: Arc<dyn Storage>, writable: bool) -> Arc<Image> {
    let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
    let source = ResolvedSource { storage, format, name: "image".into(), id: None, resolver };
    let mut options = OpenOptions::default();
    options.writable = writable;
    options.codecs = Codecs::new(Arc::new(RunCodec), Arc::new(RunCodec));
    Image::open(source, &options).unwrap()
}

/// Seeds of the bytes before and after a change. `OLD` gives a pattern that the codec compresses.
const OLD: u64 = 4;
const NEW: u64 = 5;

fn bytes(seed: u64, cluster: u64) -> Vec<u8> {
    pattern::bytes(seed, cluster * CLUSTER, CLUSTER as usize)
}

fn range(cluster: u64, count: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(cluster * CLUSTER), count * CLUSTER).unwrap()
}

impl Bench {
    /// An image with data in clusters 0 to 7 and compressed clusters 8 to 11, flushed; then a write to
    /// cluster 20.
    fn new() -> Self {
        let world = CrashWorld::new();
        let door = Arc::new(Door { inner: world.add(PageBytes::new()), visit: Mutex::default() });
        let storage: Arc<dyn Storage> = door.clone();
        let mut options = CreateOptions::new(SIZE);
        options.cluster_size = CLUSTER;
        create(&storage, None, &options).unwrap();
        let image = open(storage, true);
        let bench = Self { world, door, image };
        (0..8).for_each(|cluster| bench.write(OLD, cluster));
        for cluster in 8..12 {
            bench.image.write_compressed(range(cluster, 1).start(), &bytes(OLD, cluster)).unwrap();
        }
        bench.image.flush().unwrap();
        bench.write(OLD, 20);
        bench
    }

    fn write(&self, seed: u64, cluster: u64) {
        self.image.write_at(range(cluster, 1).start(), &bytes(seed, cluster)).unwrap();
    }

    /// Flushes; at the flush's storage call number `moment` another thread makes `change`. Returns `None` if
    /// the flush has fewer calls, else the receiver of the change's result.
    fn flush_and_meet<R: Send + 'static>(
        &self,
        moment: u64,
        change: impl FnOnce(&Bench) -> R + Send + 'static,
    ) -> Option<Receiver<R>> {
        let (done, told) = channel();
        let (begun, begins) = channel();
        let guest = Bench {
            world: Arc::clone(&self.world),
            door: Arc::clone(&self.door),
            image: Arc::clone(&self.image),
        };
        let visit = move || {
            let thread = std::thread::spawn(move || done.send(change(&guest)));
            let started = std::time::Instant::now();
            while !thread.is_finished() && started.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_micros(50));
            }
            begun.send(()).unwrap();
            Ok(())
        };
        *self.door.visit.lock().unwrap() = Some((moment, Box::new(visit)));
        self.image.flush().unwrap();
        if self.door.visit.lock().unwrap().take().is_some() {
            return None;
        }
        begins.recv().unwrap();
        Some(told)
    }

    /// Some of the states that a power cut now could leave.
    fn cuts(&self) -> Vec<CrashImage> {
        let mut rng = Rng::new(3);
        self.world.cut(|cut| {
            let mut images = vec![cut.nothing(), cut.everything()];
            images.extend((0..24).map(|_| cut.sample(&mut rng)));
            images
        })
    }
}

/// Checks that the crash image is sound, and that every cluster has the bytes of one of the seeds that
/// `allowed` returns (`None`: zeroes).
#[track_caller]
fn judge(image: &CrashImage, allowed: impl Fn(u64) -> Vec<Option<u64>>, what: &str) {
    let found = audit(&image.disks[0], None);
    assert!(found.is_sound(), "{what}: {found:?}");
    let disk = open(image.storage(0), false);
    for cluster in 0..SIZE / CLUSTER {
        let mut seen = vec![0x5a; CLUSTER as usize];
        disk.read_at(range(cluster, 1).start(), &mut seen).unwrap();
        let holds = |seed: &Option<u64>| match seed {
            Some(seed) => seen == bytes(*seed, cluster),
            None => seen.iter().all(|&byte| byte == 0),
        };
        assert!(allowed(cluster).iter().any(holds), "{what}: cluster {cluster} holds {:x?}...", &seen[..8]);
    }
}

/// Runs `unlink`, which unlinks the host clusters of the guest clusters `gone`, during a flush.
#[track_caller]
fn check_unlinked(gone: std::ops::Range<u64>, unlink: impl Fn(&Bench) + Clone + Send + 'static) {
    let mut moments = 0;
    for moment in 0.. {
        let bench = Bench::new();
        let unlink = unlink.clone();
        let Some(told) = bench.flush_and_meet(moment, unlink) else { break };
        told.recv_timeout(Duration::from_secs(10)).unwrap();
        // Reuses every free cluster, without a flush.
        (40..60).for_each(|cluster| bench.write(NEW, cluster));
        for image in bench.cuts() {
            let allowed = |cluster: u64| match cluster {
                _ if gone.contains(&cluster) => vec![Some(OLD), Some(NEW), None],
                0..12 | 20 => vec![Some(OLD)],
                40..60 => vec![Some(NEW), None],
                _ => vec![None],
            };
            judge(&image, allowed, &format!("moment {moment}"));
        }
        moments += 1;
    }
    assert!(moments >= 4, "a flush has refcounts, a barrier, links and another barrier");
}

#[test]
fn a_cluster_unlinked_during_a_flush_is_not_reused_before_the_next_flush() {
    check_unlinked(2..5, |bench| bench.image.discard(range(2, 3)).unwrap());
    check_unlinked(2..5, |bench| bench.image.write_zeroes(range(2, 3), ZeroMode::MayUnmap).unwrap());
    check_unlinked(8..10, |bench| (8..10).for_each(|cluster| bench.write(NEW, cluster)));
}

#[test]
fn a_flush_covers_writes_made_during_an_earlier_flush() {
    for moment in 0.. {
        let bench = Bench::new();
        let change = |bench: &Bench| {
            bench.write(NEW, 2);
            bench.write(NEW, 30);
            bench.image.discard(range(5, 1)).unwrap();
            bench.image.flush().unwrap();
            bench.cuts()
        };
        let Some(told) = bench.flush_and_meet(moment, change) else { break };
        for image in told.recv_timeout(Duration::from_secs(10)).unwrap() {
            let allowed = |cluster: u64| match cluster {
                2 | 30 => vec![Some(NEW)],
                5 => vec![None],
                0..12 | 20 => vec![Some(OLD)],
                _ => vec![None],
            };
            judge(&image, allowed, &format!("moment {moment}"));
        }
    }
}

/// While a flush fails, another thread moves the refcount table. The header then leads to a table with blocks
/// that the flush was to write.
#[test]
fn a_refcount_table_that_moves_while_a_flush_fails_has_all_its_blocks() {
    let mut failed = 0;
    for moment in 0.. {
        let world = CrashWorld::new();
        let door = Arc::new(Door { inner: world.add(PageBytes::new()), visit: Mutex::default() });
        let storage: Arc<dyn Storage> = door.clone();
        let mut options = CreateOptions::new(8 << 20).with_cluster_size(CLUSTER);
        options.refcount_bits = 64;
        create(&storage, None, &options).unwrap();
        let image = open(storage, true);
        // A refcount table of one cluster counts 2 MiB.
        image.write_at(GuestOffset::new(0), &vec![1; 1800 << 10]).unwrap();
        image.flush().unwrap();
        image.write_at(GuestOffset::new(2 << 20), &[2; 100 << 10]).unwrap();
        let (guest, (done, told)) = (Arc::clone(&image), channel());
        let visit = move || {
            let write = move || guest.write_at(GuestOffset::new(4 << 20), &vec![3; 300 << 10]);
            let thread = std::thread::spawn(move || done.send(write()));
            let started = std::time::Instant::now();
            while !thread.is_finished() && started.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_micros(50));
            }
            Err(StorageError::new(StorageErrorKind::Io, "this call fails"))
        };
        *door.visit.lock().unwrap() = Some((moment, Box::new(visit)));
        let flushed = image.flush();
        if door.visit.lock().unwrap().take().is_some() {
            flushed.unwrap();
            break;
        }
        flushed.unwrap_err();
        failed += 1;
        let _ = told.recv_timeout(Duration::from_secs(10)).unwrap();
        let mut rng = Rng::new(moment);
        for _ in 0..2 {
            let cuts = world.cut(|cut| [cut.nothing(), cut.everything(), cut.sample(&mut rng)]);
            for cut in cuts {
                let found = audit(&cut.disks[0], None);
                assert!(found.is_sound(), "moment {moment}: {found:?}");
            }
            let _ = image.flush();
        }
    }
    assert!(failed > 4, "only {failed} calls of a flush");
}
