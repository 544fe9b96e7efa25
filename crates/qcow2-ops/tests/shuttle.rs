//! Snapshots and commits of a disk that two threads use, under the shuttle scheduler, which explores thread
//! interleavings: no write is lost, and a frozen layer has what each thread had written at one moment.
#![allow(missing_docs, clippy::unwrap_used)]

use qcow2_core::{
    BackingName, CreateOptions, GuestDisk, GuestOffset, GuestRange, HostOffset, Image, ImageFormat, LiveDisk,
    OpenOptions, ResolvedSource, Storage, StorageError, ZeroMode, create, forward_storage,
};
use qcow2_ops::live::{LiveSnapshotOptions, MiddleLayer, commit_middle, commit_top, external_snapshot};
use qcow2_ops::{CallerError, NewStorage, Silent};
use qcow2_testkit::audit::audit;
use qcow2_testkit::world::Shelf;
use shuttle::rand::Rng;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, Runner};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const SECTOR: u64 = 512;
const THREADS: u64 = 2;
/// Sectors of each thread, one here and one there, so that threads share clusters and regions.
const OWN: u64 = 6;
/// From one sector of a thread to its next: three regions in all.
const STRIDE: u64 = 32 << 10;
const DISK: u64 = OWN * STRIDE;
/// Changes of each thread.
const STEPS: usize = 14;

/// A storage that yields to other threads before every call.
struct Yielding {
    inner: Arc<dyn Storage>,
}

impl Storage for Yielding {
    forward_storage!(inner: len discard allocate set_len extent_at limits used_bytes);

    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        shuttle::thread::yield_now();
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        shuttle::thread::yield_now();
        self.inner.write_at(offset, buf)
    }

    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        shuttle::thread::yield_now();
        self.inner.write_zeroes(offset, len, mode)
    }

    fn flush(&self) -> Result<(), StorageError> {
        shuttle::thread::yield_now();
        self.inner.flush()
    }
}

fn source(shelf: &Shelf, name: &str) -> ResolvedSource {
    let source = shelf.source(name, ImageFormat::Qcow2);
    ResolvedSource { storage: Arc::new(Yielding { inner: source.storage }), ..source }
}

struct NewFile<'a>(&'a Shelf, &'a str);

impl NewStorage for NewFile<'_> {
    fn make(&self) -> Result<Arc<dyn Storage>, CallerError> {
        Ok(source(self.0, self.1).storage)
    }

    fn discard(&self) {}
}

/// What the sectors of one thread are after each of its changes: a byte for each sector.
type States = Vec<[u8; OWN as usize]>;

/// The plan of a thread, and how far it is.
struct Plan {
    me: u64,
    states: States,
    /// Changes that have begun, and that have returned.
    begun: AtomicUsize,
    done: AtomicUsize,
}

impl Plan {
    fn draw(me: u64) -> Self {
        let mut rng = shuttle::rand::thread_rng();
        let mut states = vec![[0; OWN as usize]];
        for step in 1..=STEPS {
            let mut next = states[step - 1];
            next[rng.gen_range(0..OWN as usize)] = if rng.gen_range(0..4) == 0 { 0 } else { step as u8 };
            states.push(next);
        }
        let (begun, done) = Default::default();
        Self { me, states, begun, done }
    }

    fn place(&self, index: usize) -> GuestRange {
        let start = index as u64 * STRIDE + self.me * SECTOR;
        GuestRange::new(GuestOffset::new(start), SECTOR).unwrap()
    }

    /// Carries the plan out and reads back what it has written.
    fn run(&self, disk: &dyn GuestDisk) {
        let mut rng = shuttle::rand::thread_rng();
        for step in 1..=STEPS {
            let (before, after) = (&self.states[step - 1], &self.states[step]);
            self.begun.store(step, Ordering::SeqCst);
            for index in (0..OWN as usize).filter(|index| before[*index] != after[*index]) {
                let place = self.place(index);
                match after[index] {
                    0 => disk.write_zeroes(place, ZeroMode::MayUnmap).unwrap(),
                    byte => disk.write_at(place.start(), &[byte; SECTOR as usize]).unwrap(),
                }
            }
            self.done.store(step, Ordering::SeqCst);
            if rng.gen_range(0..6) == 0 {
                disk.flush().unwrap();
            }
            assert_eq!(self.seen(disk), *after, "thread {} after change {step}", self.me);
        }
    }

    /// The sectors of this thread on `disk`. Panics if one has bytes of two changes.
    fn seen(&self, disk: &dyn GuestDisk) -> [u8; OWN as usize] {
        let mut seen = [0xff; OWN as usize];
        for (index, byte) in seen.iter_mut().enumerate() {
            let mut bytes = [0xff; SECTOR as usize];
            disk.read_at(self.place(index).start(), &mut bytes).unwrap();
            assert!(bytes.iter().all(|other| *other == bytes[0]), "a torn sector: {bytes:?}");
            *byte = bytes[0];
        }
        seen
    }

    /// Panics unless `layer` has the state after one of the changes `from..=to`. Returns the state.
    fn check_layer(&self, layer: &dyn GuestDisk, from: usize, to: usize) -> [u8; OWN as usize] {
        let seen = self.seen(layer);
        let known = &self.states[from..=to];
        assert!(known.contains(&seen), "thread {} has {seen:?} in a layer, none of {known:?}", self.me);
        seen
    }
}

struct Bench {
    shelf: Shelf,
    live: LiveDisk,
    plans: Vec<Plan>,
}

impl Bench {
    fn new() -> Self {
        let shelf = Shelf::default();
        let storage: Arc<dyn Storage> = shelf.file("0");
        create(&storage, None, &CreateOptions::new(DISK).with_cluster_size(4096)).unwrap();
        let image =
            Image::open(source(&shelf, "0"), &OpenOptions::writable().with_exchangeable(true)).unwrap();
        Self { shelf, live: LiveDisk::new(image), plans: (0..THREADS).map(Plan::draw).collect() }
    }

    fn open(
        &self,
        name: &str,
        below: Option<&Arc<dyn GuestDisk>>,
    ) -> Result<Arc<dyn GuestDisk>, CallerError> {
        let options = OpenOptions::writable();
        Ok(match below {
            Some(below) => Image::open_on(&source(&self.shelf, name), &options, Arc::clone(below))?,
            None => Image::open(source(&self.shelf, name), &options)?,
        })
    }

    /// `new` becomes the top. The old one is as it was at one moment between the call and the return.
    fn snapshot(&self, old: &str, new: &str) {
        let from: Vec<usize> = self.plans.iter().map(|plan| plan.done.load(Ordering::SeqCst)).collect();
        let mut options = LiveSnapshotOptions::new(old, "qcow2");
        options.overlay.cluster_size = 4096;
        options.open = options.open.with_exchangeable(true);
        let taken = external_snapshot(&self.live, &NewFile(&self.shelf, new), &|| Ok(()), &options).unwrap();
        assert!(taken.unclean.is_none());
        let frozen: Vec<_> = (self.plans.iter().zip(from))
            .map(|(plan, from)| plan.check_layer(&*taken.old, from, plan.begun.load(Ordering::SeqCst)))
            .collect();
        shuttle::thread::yield_now();
        // And it stays so, whatever the threads do meanwhile.
        let later: Vec<_> = self.plans.iter().map(|plan| plan.seen(&*taken.old)).collect();
        assert_eq!(frozen, later);
    }

    fn commit_top(&self, base: &str) {
        let base = |below: Option<&_>| self.open(base, below);
        let report = commit_top(&self.live, &base, &|| Ok(()), &Silent).unwrap();
        assert!(report.unclean.is_none());
    }

    fn commit_middle(&self, depth: usize, base: &str, overlay: &str) {
        let layer = MiddleLayer {
            depth,
            link: BackingName { name: base.to_owned(), format: Some("qcow2".to_owned()) },
            base: &|below: Option<&_>| self.open(base, below),
            overlay: &|below: Option<&_>| self.open(overlay, below),
        };
        assert!(commit_middle(&self.live, &layer, &Silent).unwrap().unclean.is_none());
    }

    /// The end: all that was written is on the disk, and in the file that is the top now.
    fn check_end(&self, top: &str) {
        let is_there = |disk: &dyn GuestDisk| {
            self.plans.iter().for_each(|plan| assert_eq!(plan.seen(disk), plan.states[STEPS]));
        };
        is_there(&self.live);
        qcow2_ops::live::on_image(&self.live, |image| Ok(image.close().unwrap())).unwrap();
        is_there(&*Image::open(source(&self.shelf, top), &OpenOptions::read_only()).unwrap());
        let audit = audit(&self.shelf.file(top).bytes(), None);
        assert!(audit.is_sound() && audit.leaks == 0, "{audit:?}");
    }
}

/// Runs `change` while the threads work; `top` is the file of the top afterwards.
fn check(change: fn(&Bench), top: &'static str) -> impl Fn() + Send + Sync + 'static {
    move || {
        let bench = Arc::new(Bench::new());
        let workers: Vec<_> = (0..THREADS as usize)
            .map(|me| {
                let bench = Arc::clone(&bench);
                shuttle::thread::spawn(move || bench.plans[me].run(&bench.live))
            })
            .collect();
        change(&bench);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        bench.check_end(top);
    }
}

/// How many schedules to try; more with `SHUTTLE_SCHEDULES`.
fn schedules() -> usize {
    std::env::var("SHUTTLE_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(300)
}

fn both(change: fn(&Bench), top: &'static str) {
    // Without optimization a call through all layers needs more than the 32 KiB of the default.
    let mut config = Config::new();
    config.stack_size = 1 << 20;
    Runner::new(RandomScheduler::new(schedules()), config.clone()).run(check(change, top));
    Runner::new(PctScheduler::new(3, schedules()), config).run(check(change, top));
}

#[test]
fn snapshots_freeze_one_moment() {
    both(
        |bench| {
            bench.snapshot("0", "1");
            bench.snapshot("1", "2");
        },
        "2",
    );
}

#[test]
fn a_commit_of_the_top_loses_no_write() {
    both(
        |bench| {
            bench.snapshot("0", "1");
            bench.commit_top("0");
        },
        "0",
    );
}

#[test]
fn a_commit_of_a_middle_layer_loses_no_write() {
    both(
        |bench| {
            bench.snapshot("0", "1");
            bench.snapshot("1", "2");
            bench.commit_middle(1, "0", "2");
            bench.commit_top("0");
        },
        "0",
    );
}
