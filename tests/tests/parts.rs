//! Many writes in one call (`GuestDisk::write_parts`): every part is written, however fragmented the free
//! space is, and a call never waits for its own claims.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a test may stop, and says what it did")]

use qcow2_core::{
    GuestOffset, GuestRange, Image, ImageFormat, NoResolver, OpenOptions, Reference, ResolveError,
    ResolvedSource, Resolver, Storage, ZeroMode, create,
};
use qcow2_testkit::arbitrary::{BackingShape, Shape};
use qcow2_testkit::audit::audit;
use qcow2_testkit::fault::{Call, Fault, FaultPlan, FaultStorage};
use qcow2_testkit::model::chain;
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::storage::PageStorage;
use qcow2_testkit::world::{Shelf, TOP, World, create_options, keys};
use qcow2_tests::fixtures::codecs;
use qcow2_tests::patience::within;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Much longer than any run takes: a call that waits for itself becomes a failure.
const PATIENCE: Duration = Duration::from_secs(30);
const SEEDS: u64 = 30;

/// An image and its expected content.
struct Bench {
    shape: Shape,
    world: World,
    content: Vec<u8>,
    /// Seed of the next content.
    next: u64,
}

impl Bench {
    fn new(shape: Shape, seed: u64) -> Self {
        let world = World::new(shape, codecs(), seed).unwrap();
        let content = world.model().bytes().to_vec();
        Self { shape, world, content, next: seed << 20 }
    }

    fn disk(&self) -> &Arc<Image> {
        self.world.image()
    }

    /// Writes these ranges in one call, each with its own content.
    #[track_caller]
    fn write(&mut self, ranges: &[Range<u64>]) {
        let mut bytes = Vec::new();
        for range in ranges {
            self.next += 1;
            bytes.push(pattern::bytes(self.next, range.start, (range.end - range.start) as usize));
        }
        let offsets = ranges.iter().map(|range| GuestOffset::new(range.start));
        let parts: Vec<_> = offsets.zip(bytes.iter().map(Vec::as_slice)).collect();
        self.disk().write_parts(&parts).unwrap_or_else(|error| panic!("{ranges:?}: {}", chain(&error)));
        for (range, bytes) in ranges.iter().zip(bytes) {
            self.content[range.start as usize..range.end as usize].copy_from_slice(&bytes);
        }
        self.check();
    }

    #[track_caller]
    fn check(&self) {
        let mut seen = vec![0x5a; self.content.len()];
        self.disk().read_at(GuestOffset::new(0), &mut seen).unwrap();
        let wrong = seen.iter().zip(&self.content).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "that byte differs");
    }

    fn zero(&mut self, range: Range<u64>, mode: ZeroMode) {
        let place = GuestRange::between(GuestOffset::new(range.start), GuestOffset::new(range.end));
        self.disk().write_zeroes(place, mode).unwrap();
        self.content[range.start as usize..range.end as usize].fill(0);
    }

    /// The file is sound, nothing is leaked, and the content is the same when reopened.
    fn finish(self) {
        let (content, image) = (self.content, Arc::clone(self.world.image()));
        image.close().unwrap();
        let shelf: &Shelf = self.world.shelf();
        let audit = audit(&shelf.file(TOP).bytes(), None);
        assert!(audit.is_sound() && audit.leaks == 0, "{audit:?}");
        let mut options = OpenOptions::default();
        (options.codecs, options.keys) = (codecs(), keys(&self.shape));
        let again = Image::open(shelf.source(TOP, ImageFormat::Qcow2), &options).unwrap();
        for image in [image, again] {
            let mut seen = vec![0x5a; content.len()];
            image.read_at(GuestOffset::new(0), &mut seen).unwrap();
            assert!(seen == content);
        }
    }
}

/// Runs `work` on an image of `shape`.
#[track_caller]
fn check(what: &str, shape: Shape, seed: u64, work: impl FnOnce(&mut Bench) + Send + 'static) {
    within(PATIENCE, what, move || {
        let mut bench = Bench::new(shape.legalized(), seed);
        work(&mut bench);
        bench.finish();
    });
}

const CLUSTER: u64 = 4096;

fn small(clusters: u64) -> Shape {
    Shape { cluster_bits: 12, ..Shape::plain(clusters * CLUSTER) }
}

fn clusters(range: Range<u64>) -> Range<u64> {
    range.start * CLUSTER..range.end * CLUSTER
}

/// If the next clusters are mapped differently, only the first piece of a part is prepared; the rest of the
/// part is claimed with it nevertheless.
#[test]
fn a_part_over_differently_mapped_clusters_is_written() {
    check("pieces of several kinds", small(64), 1, |bench| {
        // Clusters 2, 3 and 8 are allocated; the parts span them.
        bench.write(&[clusters(2..4), clusters(8..9)]);
        bench.write(&[clusters(0..6), clusters(6..7), clusters(7..12)]);
        bench.write(&[clusters(20..24), clusters(10..16), clusters(0..1)]);
    });
    check("free places of one cluster", small(64), 2, |bench| {
        let every: Vec<_> = (0..32).map(|n| clusters(n..n + 1)).collect();
        bench.write(&every);
        for n in (0..32).step_by(2) {
            bench.zero(clusters(n..n + 1), ZeroMode::MayUnmap);
        }
        // Freed clusters become available after the next flushes.
        (0..3).for_each(|_| bench.disk().flush().unwrap());
        bench.write(&[clusters(32..40), clusters(40..48), clusters(48..56)]);
    });
}

/// Parts that share clusters, in ascending and descending order, and the same part twice: the later one wins.
#[test]
fn of_overlapping_parts_the_later_one_wins() {
    for backing in [None, Some(BackingShape { size: 40 * CLUSTER, qcow2: false })] {
        check("neighbours in a cluster", Shape { backing, ..small(64) }, 3, |bench| {
            let thirds: Vec<_> = (0..48).map(|n| n * 1365..(n + 1) * 1365).collect();
            bench.write(&thirds);
            let back: Vec<_> = thirds.iter().rev().cloned().collect();
            bench.write(&back);
            bench.write(&[clusters(50..52), clusters(51..53), clusters(50..51), clusters(50..51)]);
            bench.write(&[clusters(60..61), clusters(60..60), clusters(60..61)]);
        });
    }
}

/// More parts than are prepared at once, with copy-on-write edges.
#[test]
fn more_parts_than_one_batch_are_written() {
    check("parts of one cluster", small(1000), 4, |bench| {
        let every: Vec<_> = (0..1000).map(|n| clusters(n..n + 1)).collect();
        bench.write(&every);
        bench.write(&every);
    });
    let backing = Some(BackingShape { size: 16 << 20, qcow2: false });
    check(
        "edges of large clusters",
        Shape { cluster_bits: 20, backing, ..Shape::plain(16 << 20) },
        5,
        |bench| {
            let every: Vec<_> = (0..16).map(|n| (n << 20) + 5000..(n << 20) + 5512).collect();
            bench.write(&every);
        },
    );
}

/// Every kind of change releases all its claims when the call returns.
#[test]
fn all_claims_are_released_after_the_call() {
    check("other changes", small(64), 6, |bench| {
        let every: Vec<_> = (0..64).map(|n| clusters(n..n + 1)).collect();
        bench.write(&every);
        bench.zero(clusters(0..64), ZeroMode::MayUnmap);
        bench.write(&every);
        bench.zero(clusters(0..64), ZeroMode::KeepAllocated);
        bench.write(&[clusters(0..64)]);
        bench
            .disk()
            .discard(GuestRange::between(GuestOffset::new(0), GuestOffset::new(64 * CLUSTER)))
            .unwrap();
        bench.content.fill(0);
        bench.check();
    });
}

/// Resolves the one backing file.
struct Below(Arc<dyn Storage>);

impl Resolver for Below {
    fn resolve(&self, _reference: Reference<'_>, _writable: bool) -> Result<ResolvedSource, ResolveError> {
        Ok(source(Arc::clone(&self.0), ImageFormat::Raw, Arc::new(NoResolver)))
    }
}

fn source(storage: Arc<dyn Storage>, format: ImageFormat, resolver: Arc<dyn Resolver>) -> ResolvedSource {
    ResolvedSource { storage, format, name: "memory".to_owned(), id: None, resolver }
}

/// Reading the copy-on-write edges of a part fails: the call returns the error, every part is written or not,
/// and all claims and reserved clusters are released.
#[test]
fn a_failed_edge_read_releases_claims_and_clusters() {
    for nth in 0..12 {
        within(PATIENCE, &format!("read {nth} fails"), move || {
            let below = pattern::bytes(1, 0, 16 * CLUSTER as usize);
            let base = Arc::new(FaultStorage::new(Arc::new(PageStorage::new(PageBytes::from_bytes(&below)))));
            let file = Arc::new(PageStorage::default());
            let storage = Arc::clone(&file) as Arc<dyn Storage>;
            let shape =
                Shape { backing: Some(BackingShape { size: 16 * CLUSTER, qcow2: false }), ..small(16) };
            create(&storage, None, &create_options(&shape)).unwrap();
            let mut options = OpenOptions::default();
            options.writable = true;
            let resolver = Arc::new(Below(Arc::clone(&base) as Arc<dyn Storage>));
            let disk = Image::open(source(storage, ImageFormat::Qcow2, resolver), &options).unwrap();
            let new = pattern::bytes(2, 0, below.len());
            let places = (0..16).map(|n| (n * CLUSTER + 700) as usize..(n * CLUSTER + 1300) as usize);
            let parts: Vec<_> =
                places.clone().map(|place| (GuestOffset::new(place.start as u64), &new[place])).collect();
            let (calls, fault) = (vec![Call::Read], Fault::Io);
            base.set_plan(Some(FaultPlan { calls, nth, sticky: false, fault }));
            let written = disk.write_parts(&parts);
            assert_eq!(base.fired(), 1, "the backing file is read less often");
            assert!(written.is_err(), "an error was lost");
            let mut seen = pattern::unread(below.len());
            disk.read_at(GuestOffset::new(0), &mut seen).unwrap();
            let mut expected = below;
            for place in places.clone() {
                if seen[place.clone()] == new[place.clone()] {
                    expected[place.clone()].copy_from_slice(&new[place]);
                }
            }
            assert!(seen == expected, "a part is neither old nor new");
            disk.write_parts(&parts).unwrap();
            for place in places {
                expected[place.clone()].copy_from_slice(&new[place]);
            }
            disk.read_at(GuestOffset::new(0), &mut seen).unwrap();
            assert!(seen == expected);
            disk.close().unwrap();
            let audit = audit(&file.bytes(), None);
            assert!(audit.is_sound() && audit.leaks == 0, "{audit:?}");
        });
    }
}

fn draw_range(rng: &mut Rng, size: u64, cluster: u64, from: u64) -> Range<u64> {
    let start = from.min(size - 1);
    let len = match rng.below(4) {
        0 => cluster,
        1 => rng.between(1, cluster),
        2 => cluster * rng.between(1, 6),
        _ => 512 * rng.between(1, 4),
    };
    start..(start + len).min(size)
}

/// Random parts: mostly ascending, some overlapping, some descending, over the results of earlier calls,
/// zeroes and discards.
#[test]
fn random_parts_read_back() {
    let mut parts = 0;
    for seed in 0..SEEDS {
        let mut rng = Rng::new(seed);
        let mut shape = Shape::random(&mut rng);
        (shape.data_file, shape.cluster_bits) = (None, shape.cluster_bits.min(16));
        let shape = shape.legalized();
        let cluster = shape.cluster_size();
        let calls: Vec<Vec<Range<u64>>> = (0..12)
            .map(|_| {
                let (mut ranges, mut at) = (Vec::new(), rng.below(shape.size / 2));
                for _ in 0..rng.pick(&[2, 5, 20, 200]) {
                    let range = draw_range(&mut rng, shape.size, cluster, at);
                    at = match rng.below(12) {
                        0 => rng.below(shape.size),
                        1 => range.start,
                        2..6 => range.end.next_multiple_of(cluster),
                        _ => range.end,
                    };
                    at = if at >= shape.size { rng.below(shape.size) } else { at };
                    ranges.push(range);
                }
                ranges
            })
            .collect();
        parts += calls.iter().map(Vec::len).sum::<usize>();
        let what = format!("seed {seed}, {shape:?}");
        check(&what, shape, seed, move |bench| {
            for call in calls {
                bench.write(&call);
                let range = draw_range(&mut rng, shape.size, cluster, call[0].start);
                match rng.below(4) {
                    0 => bench.zero(range, ZeroMode::MayUnmap),
                    1 => bench.zero(range, ZeroMode::KeepAllocated),
                    2 => bench.disk().flush().unwrap(),
                    _ => {}
                }
            }
        });
    }
    println!("{parts} parts");
}
