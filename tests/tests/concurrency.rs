//! Sixteen threads on one image: overlapping and adjacent reads, writes, zeroes, discards, compressed writes
//! and flushes. Every read must return a content its sectors may have at that time; afterwards the file is
//! audited.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "figures of a run; setting up cannot fail")]
#![allow(clippy::field_reassign_with_default, reason = "option structs may grow")]

use qcow2_core::{
    CIPHER_SECTOR, ErrorKind, GuestOffset, GuestRange, Image, ImageFormat, NewSnapshot, NoResolver,
    OpenOptions, Reference, ResolveError, ResolvedSource, Resolver, SectorNumbering, Storage, ZeroMode,
    create,
};
use qcow2_io::MemoryStorage;
use qcow2_testkit::arbitrary::{BackingShape, DataFileShape, Shape, write_whole_or_in_parts};
use qcow2_testkit::audit::audit;
use qcow2_testkit::history::{self, History, ZEROES};
use qcow2_testkit::model::chain;
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::world::{create_options, keys};
use qcow2_tests::fixtures::codecs;
use qcow2_tests::jitter::JitterStorage;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

const THREADS: u64 = 16;
const SECTOR: u64 = 512;
/// Pattern seed of the backing file.
const BACKING: u64 = 1;
const BITMAP: &[u8] = b"changed";
/// Much longer than any run takes: a deadlock becomes a failure instead of a hang.
const PATIENCE: Duration = Duration::from_secs(240);

/// Workload parameters.
#[derive(Clone, Copy, Debug)]
struct Plan {
    seed: u64,
    rounds: u64,
    /// Operations per thread and round.
    operations: u64,
    /// Write and read everything once before the threads start.
    warm: bool,
    /// Size of the L2 cache in bytes; a small one evicts all the time.
    l2_cache: Option<u64>,
    /// Percentage of compressed writes.
    compressed: u64,
    /// Discard freed clusters in the storage.
    discard_freed: bool,
    /// Discarded guest clusters keep their host clusters.
    keep_places: bool,
    /// Take and delete snapshots meanwhile.
    snapshots: bool,
    /// A bitmap records the changes.
    bitmap: bool,
}

const PLAN: Plan = Plan {
    seed: 1,
    rounds: 3,
    operations: 150,
    warm: false,
    l2_cache: None,
    compressed: 4,
    discard_freed: false,
    keep_places: false,
    snapshots: false,
    bitmap: false,
};

/// Resolves the two names that an image under test may contain.
struct Neighbours {
    backing: Option<Arc<dyn Storage>>,
    data: Option<Arc<dyn Storage>>,
}

impl Resolver for Neighbours {
    fn resolve(&self, reference: Reference<'_>, _writable: bool) -> Result<ResolvedSource, ResolveError> {
        let storage = match reference {
            Reference::DataFile { .. } => self.data.clone(),
            _ => self.backing.clone(),
        };
        let storage = storage.ok_or_else(|| ResolveError::failed("no such file"))?;
        Ok(source(storage, ImageFormat::Raw, Arc::new(NoResolver)))
    }
}

fn source(storage: Arc<dyn Storage>, format: ImageFormat, resolver: Arc<dyn Resolver>) -> ResolvedSource {
    ResolvedSource { storage, format, name: "memory".into(), id: None, resolver }
}

/// The image under test and the contents it may have.
struct Bench {
    shape: Shape,
    plan: Plan,
    file: Arc<MemoryStorage>,
    data: Option<Arc<MemoryStorage>>,
    image: Arc<Image>,
    history: History,
    next_content: AtomicU64,
    resolver: Arc<Neighbours>,
    /// Snapshots that stay, with the disk's content when they were taken.
    kept: Mutex<Vec<(Vec<u8>, Vec<u8>)>>,
}

impl Bench {
    fn new(shape: Shape, plan: Plan) -> Self {
        let file = Arc::new(MemoryStorage::new());
        let data = shape.data_file.map(|_| Arc::new(MemoryStorage::new()));
        let jitter = |inner: Arc<MemoryStorage>| Arc::new(JitterStorage::new(inner)) as Arc<dyn Storage>;
        let backing = shape.backing.map(|backing| {
            let mut bytes = vec![0; backing.size as usize];
            history::fill(BACKING, 0, &mut bytes);
            let storage = Arc::new(MemoryStorage::new());
            storage.write_at(qcow2_core::HostOffset::new(0), &bytes).unwrap();
            jitter(storage)
        });
        let data_storage = data.clone().map(jitter);
        let storage = jitter(Arc::clone(&file));
        create(&storage, data_storage.as_ref(), &create_options(&shape)).unwrap();
        let resolver = Arc::new(Neighbours { backing, data: data_storage });
        let mut options = OpenOptions::default();
        options.writable = true;
        options.codecs = codecs();
        options.l2_cache_size = plan.l2_cache;
        options.refcount_cache_size = plan.l2_cache;
        options.discard_freed = plan.discard_freed;
        options.discard_no_unref = plan.keep_places;
        options.keys = keys(&shape);
        let image = Image::open(source(storage, ImageFormat::Qcow2, resolver.clone()), &options).unwrap();
        if plan.bitmap {
            image.add_bitmap(BITMAP, 9).unwrap();
        }
        let backed = shape.backing.map_or(0, |backing| backing.size / SECTOR);
        let history =
            History::new(shape.size / SECTOR, |sector| if sector < backed { BACKING } else { ZEROES });
        let (next_content, kept) = (AtomicU64::new(4), Mutex::default());
        Self { shape, plan, file, data, image, history, next_content, resolver, kept }
    }

    /// Runs all threads, round after round; between rounds no operation is in flight and everything is
    /// checked.
    fn run(&self) -> Result<u64, String> {
        if self.plan.warm {
            self.write(0..self.history.sectors())?;
            self.look()?;
        }
        for round in 0..self.plan.rounds {
            let results: Vec<Result<(), String>> = std::thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..THREADS).map(|thread| scope.spawn(move || self.thread(round, thread))).collect();
                threads.into_iter().map(|thread| thread.join().map_err(|_| "panic".to_owned())?).collect()
            });
            results.into_iter().collect::<Result<(), String>>().map_err(|e| format!("round {round}: {e}"))?;
            self.look().map_err(|e| format!("after round {round}: {e}"))?;
        }
        self.finish()?;
        Ok(self.plan.rounds * self.plan.operations * THREADS)
    }

    fn thread(&self, round: u64, thread: u64) -> Result<(), String> {
        let mut rng = Rng::new(self.plan.seed << 20 | round << 10 | thread);
        for number in 0..self.plan.operations {
            let sectors = self.draw_range(&mut rng);
            let kind = rng.below(100);
            let result = match kind {
                _ if rng.below(100) < self.plan.compressed => self.compress(&sectors),
                _ if self.plan.snapshots && rng.one_in(150) => self.change_snapshots(&mut rng),
                0..30 => self.read(sectors.clone()),
                30..70 => self.write(sectors.clone()),
                70..78 => self.zero(sectors.clone(), ZeroMode::MayUnmap),
                78..84 => self.zero(sectors.clone(), ZeroMode::KeepAllocated),
                84..94 => self.discard(sectors.clone()),
                _ => self.image.flush().map_err(|e| chain(&e)),
            };
            result
                .map_err(|e| format!("thread {thread}, operation {number} ({kind}) on {sectors:?}: {e}"))?;
        }
        Ok(())
    }

    /// Usually within a few hot clusters, so that threads collide; sometimes long, sometimes anywhere.
    fn draw_range(&self, rng: &mut Rng) -> Range<u64> {
        let sectors = self.history.sectors();
        let per_cluster = self.shape.cluster_size() / SECTOR;
        let clusters = sectors.div_ceil(per_cluster);
        let hot = (self.plan.seed % 7 * 13) % clusters;
        let cluster = if rng.one_in(3) { rng.below(clusters) } else { (hot + rng.below(6)) % clusters };
        let start =
            (cluster * per_cluster + rng.pick(&[0, 0, per_cluster / 3, per_cluster / 2])).min(sectors - 1);
        let longest = rng.pick(&[1, 2, per_cluster, per_cluster, 3 * per_cluster]);
        let end = (start + rng.between(1, longest.max(1))).min(sectors);
        start..end
    }

    fn read(&self, sectors: Range<u64>) -> Result<(), String> {
        let begun = self.history.now();
        let mut seen = pattern::unread((sectors.end - sectors.start) as usize * SECTOR as usize);
        self.image.read_at(GuestOffset::new(sectors.start * SECTOR), &mut seen).map_err(|e| chain(&e))?;
        self.history.check(sectors.start, &seen, begun)
    }

    fn write(&self, sectors: Range<u64>) -> Result<(), String> {
        let content = self.next_content.fetch_add(1, Ordering::Relaxed);
        let mut bytes = vec![0; (sectors.end - sectors.start) as usize * SECTOR as usize];
        history::fill(content, sectors.start, &mut bytes);
        let begun = self.history.begin(sectors.clone(), content, false);
        let offset = GuestOffset::new(sectors.start * SECTOR);
        let result = write_whole_or_in_parts(&*self.image, offset, &bytes, content);
        self.history.end(begun);
        result.map_err(|e| chain(&e))
    }

    fn zero(&self, sectors: Range<u64>, mode: ZeroMode) -> Result<(), String> {
        let begun = self.history.begin(sectors.clone(), ZEROES, false);
        let result = self.image.write_zeroes(guest_range(&sectors), mode);
        self.history.end(begun);
        result.map_err(|e| chain(&e))
    }

    fn discard(&self, sectors: Range<u64>) -> Result<(), String> {
        let begun = self.history.begin(sectors.clone(), ZEROES, true);
        let result = self.image.discard(guest_range(&sectors));
        self.history.end(begun);
        result.map_err(|e| chain(&e))
    }

    /// A compressed write of the cluster in which the range begins; the engine accepts it only if the cluster
    /// is unallocated.
    fn compress(&self, sectors: &Range<u64>) -> Result<(), String> {
        let per_cluster = self.shape.cluster_size() / SECTOR;
        let start = sectors.start / per_cluster * per_cluster;
        let sectors = start..(start + per_cluster).min(self.history.sectors());
        let content = self.next_content.fetch_add(1, Ordering::Relaxed);
        let mut bytes = vec![0; (sectors.end - sectors.start) as usize * SECTOR as usize];
        history::fill(content, sectors.start, &mut bytes);
        let begun = self.history.begin(sectors.clone(), content, false);
        match self.image.write_compressed(GuestOffset::new(sectors.start * SECTOR), &bytes) {
            Err(error) if error.kind() == ErrorKind::Unsupported => self.history.cancel(begun),
            Err(error) => return Err(chain(&error)),
            Ok(()) => self.history.end(begun),
        }
        Ok(())
    }

    /// Takes a snapshot, or deletes one, while other threads read and write.
    fn change_snapshots(&self, rng: &mut Rng) -> Result<(), String> {
        let there = self.image.snapshots().map_err(|e| chain(&e))?;
        let going: Vec<_> = there.iter().filter(|snapshot| snapshot.name == b"going").collect();
        if going.len() < 3 {
            return self.take_snapshot(b"going").map(|_| ());
        }
        match self.image.delete_snapshot(going[rng.below(going.len() as u64) as usize]) {
            // Another thread deleted it first.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result.map_err(|e| chain(&e)),
        }
    }

    fn take_snapshot(&self, name: &[u8]) -> Result<Vec<u8>, String> {
        let mut new = NewSnapshot::default();
        new.name = name.to_vec();
        self.image.create_snapshot(&new).map(|snapshot| snapshot.id).map_err(|e| chain(&e))
    }

    /// Snapshots that stay must keep their content.
    fn check_kept(&self) -> Result<(), String> {
        let kept = self.kept.lock().unwrap();
        for (id, content) in kept.iter() {
            let file = Arc::clone(&self.file) as Arc<dyn Storage>;
            let source = source(file, ImageFormat::Qcow2, self.resolver.clone());
            let mut options = OpenOptions::default();
            (options.codecs, options.keys) = (codecs(), keys(&self.shape));
            let disk = Image::open_snapshot(source, &options, |all| all.iter().position(|s| s.id == *id))
                .map_err(|e| chain(&e))?;
            let mut seen = pattern::unread(content.len());
            disk.read_at(GuestOffset::new(0), &mut seen).map_err(|e| chain(&e))?;
            if seen != *content {
                return Err(format!("snapshot {:?} has changed", String::from_utf8_lossy(id)));
            }
        }
        Ok(())
    }

    /// Every sector that differs from the start must be marked.
    fn check_bitmap(&self) -> Result<(), String> {
        let source =
            source(Arc::clone(&self.file) as Arc<dyn Storage>, ImageFormat::Qcow2, self.resolver.clone());
        let mut options = OpenOptions::default();
        (options.codecs, options.keys) = (codecs(), keys(&self.shape));
        let image = Image::open(source, &options).map_err(|e| chain(&e))?;
        let bits = image.bitmap_bits(BITMAP).map_err(|e| chain(&e))?;
        let mut seen = vec![0x5a; self.shape.size as usize];
        image.read_at(GuestOffset::new(0), &mut seen).map_err(|e| chain(&e))?;
        let backed = self.shape.backing.map_or(0, |backing| backing.size / SECTOR);
        for (sector, bytes) in (0..).zip(seen.chunks(SECTOR as usize)) {
            let mut start = [0; SECTOR as usize];
            if sector < backed {
                history::fill(BACKING, sector, &mut start);
            }
            if bytes != start && !bits.is_marked(sector * SECTOR) {
                return Err(format!("sector {sector} has changed and is not marked"));
            }
        }
        Ok(())
    }

    /// No operation in flight: the disk has an allowed content, and a flush leaves a sound file.
    fn look(&self) -> Result<(), String> {
        let mut seen = pattern::unread(self.shape.size as usize);
        self.image.read_at(GuestOffset::new(0), &mut seen).map_err(|e| chain(&e))?;
        self.history.settle(&seen)?;
        self.image.flush().map_err(|e| chain(&e))?;
        if self.plan.snapshots {
            self.check_kept()?;
            let id = self.take_snapshot(b"kept")?;
            self.kept.lock().unwrap().push((id, seen));
        }
        let found = self.audit();
        if found.is_sound() { Ok(()) } else { Err(format!("{found:?}")) }
    }

    /// After close nothing may be leaked.
    fn finish(&self) -> Result<(), String> {
        self.image.close().map_err(|e| chain(&e))?;
        self.check_kept()?;
        if self.plan.bitmap {
            self.check_bitmap()?;
        }
        let found = self.audit();
        let fine = found.is_sound() && found.leaks == 0 && !found.dirty;
        if fine { Ok(()) } else { Err(format!("after close: {found:?}")) }
    }

    fn audit(&self) -> qcow2_testkit::audit::Audit {
        let data_len = self.data.as_ref().map(|data| data.len().unwrap());
        audit(&PageBytes::from_bytes(&self.file.to_vec()), data_len)
    }
}

fn guest_range(sectors: &Range<u64>) -> GuestRange {
    GuestRange::between(GuestOffset::new(sectors.start * SECTOR), GuestOffset::new(sectors.end * SECTOR))
}

/// Runs the plan on `shape` with seeds 1 to `seeds`; `QCOW2_CONCURRENCY_SEEDS` raises the number.
fn check(shape: Shape, plan: Plan, seeds: u64) {
    let asked = std::env::var("QCOW2_CONCURRENCY_SEEDS").ok().and_then(|text| text.parse().ok());
    let seeds = asked.unwrap_or(seeds);
    let started = Instant::now();
    let mut operations = 0;
    for seed in 1..=seeds {
        let (sender, receiver) = mpsc::channel();
        let plan = Plan { seed, ..plan };
        std::thread::spawn(move || sender.send(Bench::new(shape.legalized(), plan).run()));
        match receiver.recv_timeout(PATIENCE) {
            Ok(Ok(count)) => operations += count,
            Ok(Err(what)) => panic!("{plan:?} {shape:?}: {what}"),
            Err(_) => panic!("{plan:?} {shape:?}: no end after {PATIENCE:?}, or a panic"),
        }
    }
    println!("{operations} operations of {THREADS} threads in {:?}", started.elapsed());
}

fn overlay(size: u64) -> Option<BackingShape> {
    Some(BackingShape { size, qcow2: false })
}

const MIB: u64 = 1 << 20;

#[test]
fn fresh_image_of_small_clusters() {
    let shape = Shape { cluster_bits: 9, ..Shape::plain(MIB / 4) };
    check(shape, PLAN, 3);
}

#[test]
fn fresh_image_of_default_clusters() {
    check(Shape::plain(2 * MIB - 512), PLAN, 3);
}

#[test]
fn cold_overlay() {
    let shape = Shape { cluster_bits: 12, backing: overlay(MIB), ..Shape::plain(MIB) };
    check(shape, PLAN, 3);
}

#[test]
fn warm_overlay() {
    let shape = Shape { backing: overlay(2 * MIB), ..Shape::plain(2 * MIB) };
    check(shape, Plan { warm: true, ..PLAN }, 2);
}

#[test]
fn warm_overlay_with_a_tiny_cache() {
    let shape =
        Shape { cluster_bits: 9, refcount_order: 6, backing: overlay(MIB / 2), ..Shape::plain(MIB / 2) };
    check(shape, Plan { warm: true, l2_cache: Some(2048), ..PLAN }, 3);
}

#[test]
fn subclusters_over_a_backing_file() {
    let shape =
        Shape { cluster_bits: 14, extended_l2: true, backing: overlay(MIB / 2), ..Shape::plain(MIB / 2) };
    check(shape, PLAN, 3);
}

#[test]
fn freed_clusters_are_discarded_in_the_storage() {
    let shape = Shape { cluster_bits: 10, ..Shape::plain(MIB / 8) };
    check(shape, Plan { discard_freed: true, ..PLAN }, 4);
}

#[test]
fn discarded_clusters_keep_their_host_clusters() {
    let shape = Shape { cluster_bits: 10, backing: overlay(MIB / 16), ..Shape::plain(MIB / 8) };
    check(shape, Plan { discard_freed: true, keep_places: true, ..PLAN }, 3);
}

#[test]
fn snapshots_come_and_go() {
    let shape = Shape { cluster_bits: 10, ..Shape::plain(MIB / 4) };
    check(shape, Plan { snapshots: true, discard_freed: true, ..PLAN }, 3);
    let shape = Shape { backing: overlay(MIB), ..Shape::plain(MIB) };
    check(shape, Plan { snapshots: true, warm: true, ..PLAN }, 2);
    let shape =
        Shape { cluster_bits: 14, extended_l2: true, backing: overlay(MIB / 2), ..Shape::plain(MIB / 2) };
    check(shape, Plan { snapshots: true, l2_cache: Some(2048), ..PLAN }, 2);
}

#[test]
fn compressed_streams_share_clusters() {
    let shape = Shape { cluster_bits: 12, ..Shape::plain(MIB / 4) };
    check(shape, Plan { compressed: 40, ..PLAN }, 4);
    check(shape, Plan { compressed: 40, discard_freed: true, ..PLAN }, 4);
}

#[test]
fn narrow_refcounts() {
    let shape = Shape { cluster_bits: 12, refcount_order: 1, ..Shape::plain(MIB / 2) };
    check(shape, PLAN, 2);
}

#[test]
fn external_data_file() {
    for raw in [false, true] {
        let shape =
            Shape { cluster_bits: 12, data_file: Some(DataFileShape { raw }), ..Shape::plain(MIB / 2) };
        check(shape, PLAN, 2);
    }
}

#[test]
fn version_2_overlay() {
    let shape =
        Shape { version3: false, cluster_bits: 12, backing: overlay(MIB / 4), ..Shape::plain(MIB / 2) };
    check(shape, PLAN, 2);
}

const ENCRYPTIONS: [SectorNumbering; 2] = [SectorNumbering::Guest, SectorNumbering::Host];

#[test]
fn encrypted_image() {
    for encryption in ENCRYPTIONS {
        let shape = Shape {
            cluster_bits: 12,
            encryption: Some(encryption),
            backing: overlay(MIB / 4),
            ..Shape::plain(MIB / 2)
        };
        check(shape, Plan { discard_freed: true, compressed: 0, ..PLAN }, 2);
    }
}

#[test]
fn a_bitmap_records_the_changes_of_all_threads() {
    let shape = Shape { cluster_bits: 12, backing: overlay(MIB / 4), ..Shape::plain(MIB / 2) };
    check(shape, Plan { bitmap: true, ..PLAN }, 2);
    let shape = Shape { encryption: Some(SectorNumbering::Host), ..shape };
    check(shape, Plan { bitmap: true, compressed: 0, ..PLAN }, 1);
}

/// Each thread owns some bytes of every sector. A sector is encrypted as a whole, so a write of one part
/// rewrites the other threads' parts.
#[test]
fn parts_of_sectors_written_by_other_threads_are_kept() {
    const PART: u64 = CIPHER_SECTOR / THREADS;
    const SECTORS: u64 = 12;
    for encryption in [None, Some(SectorNumbering::Guest), Some(SectorNumbering::Host)] {
        let shape = Shape { cluster_bits: 10, encryption, ..Shape::plain(SECTORS * SECTOR) };
        let bench = Bench::new(shape.legalized(), PLAN);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let image = &bench.image;
                scope.spawn(move || {
                    let (mut rng, mut own) = (Rng::new(thread), vec![[0; PART as usize]; SECTORS as usize]);
                    for round in 0..200 {
                        let sector = rng.below(SECTORS);
                        let at = GuestOffset::new(sector * SECTOR + thread * PART);
                        let known = &mut own[sector as usize];
                        let mut seen = [0x5a; PART as usize];
                        image.read_at(at, &mut seen).unwrap();
                        assert_eq!(seen, *known, "{encryption:?}: thread {thread}, round {round}, byte {at}");
                        rng.fill(known);
                        image.write_at(at, known).unwrap();
                    }
                });
            }
        });
        bench.image.close().unwrap();
        let found = bench.audit();
        assert!(found.is_sound() && found.leaks == 0, "{found:?}");
    }
}
