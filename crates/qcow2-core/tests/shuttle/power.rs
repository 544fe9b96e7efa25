//! Power cuts while several threads write, discard and flush: flushed data is there, no cluster has another
//! one's bytes, and the image is sound.

use super::{CLUSTER, Yielding, open_as};
use qcow2_core::{CreateOptions, GuestOffset, GuestRange, Image, OpenOptions, Storage, ZeroMode, create};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::{CrashWorld, Event, SECTOR};
use qcow2_testkit::cut::{CrashImage, Cut};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::rng::Rng as CutRng;
use qcow2_testkit::storage::PageStorage;
use shuttle::rand::Rng;
use std::sync::{Arc, Mutex};

const THREADS: u64 = 3;
/// Number of consecutive clusters that only one thread uses.
const OWN: u64 = 5;
const STEPS: u8 = 14;
/// Crash images that are checked in each run.
const IMAGES: usize = 12;

/// The bytes that each cluster of a thread may have after a power cut: those at the thread's last flush, and
/// all later ones. A cluster is one sector, filled with one byte.
#[derive(Clone, Debug)]
struct Book(Vec<Vec<u8>>);

impl Book {
    fn allow(&mut self, clusters: std::ops::Range<u64>, fill: u8) {
        self.0[clusters.start as usize..clusters.end as usize].iter_mut().for_each(|may| may.push(fill));
    }

    /// A flush of the thread has returned: only the last bytes of each cluster are allowed.
    fn flushed(&mut self) {
        self.0.iter_mut().for_each(|may| drop(may.drain(..may.len() - 1)));
    }

    /// Records what a discarded cluster reads as now: its old bytes or zeroes.
    fn settle(&mut self, cluster: u64, fill: u8) {
        self.0[cluster as usize].push(fill);
    }
}

type Books = Arc<Mutex<Vec<Book>>>;

fn work(image: &Image, books: &Books, me: u64) {
    let mut rng = shuttle::rand::thread_rng();
    let with_book = |change: &dyn Fn(&mut Book)| change(&mut books.lock().unwrap()[me as usize]);
    for step in 1..=STEPS {
        let first = rng.gen_range(0..OWN);
        let count = rng.gen_range(1..=OWN - first);
        let at = GuestOffset::new((me * OWN + first) * CLUSTER);
        let range = GuestRange::new(at, count * CLUSTER).unwrap();
        let fill = me as u8 * 64 + step;
        match rng.gen_range(0..8) {
            0..=2 => {
                with_book(&|book| book.allow(first..first + count, fill));
                image.write_at(at, &vec![fill; range.len() as usize]).unwrap();
            }
            3 => {
                with_book(&|book| book.allow(first..first + count, 0));
                image.write_zeroes(range, ZeroMode::MayUnmap).unwrap();
            }
            4 => {
                with_book(&|book| book.allow(first..first + count, 0));
                image.discard(range).unwrap();
                let mut seen = vec![0x5a; range.len() as usize];
                image.read_at(at, &mut seen).unwrap();
                for (cluster, bytes) in (first..).zip(seen.chunks(CLUSTER as usize)) {
                    with_book(&|book| book.settle(cluster, bytes[0]));
                }
            }
            5 | 6 => {
                image.flush().unwrap();
                with_book(&Book::flushed);
            }
            _ => {
                let mut seen = vec![0x5a; range.len() as usize];
                image.read_at(at, &mut seen).unwrap();
                let book = books.lock().unwrap()[me as usize].clone();
                for (cluster, bytes) in (first..).zip(seen.chunks(CLUSTER as usize)) {
                    let now = *book.0[cluster as usize].last().unwrap();
                    assert!(bytes.iter().all(|&byte| byte == now), "thread {me}, cluster {cluster}: {now}");
                }
            }
        }
    }
}

/// Crash images of one run, with the bytes that they may have. Checked at the end of the run, because the
/// hook of a cut must not call the engine.
#[derive(Default)]
struct Album {
    seen: u64,
    images: Vec<(CrashImage, Vec<Book>)>,
}

impl Album {
    /// Reservoir sampling: keeps some crash images, each moment with the same probability.
    fn look(&mut self, cut: &Cut<'_>, books: &[Book], rng: &mut CutRng) {
        self.seen += 1;
        let slot = if self.images.len() < IMAGES { self.images.len() as u64 } else { rng.below(self.seen) };
        if slot < IMAGES as u64 {
            let taken = (cut.sample(rng), books.to_vec());
            match self.images.get_mut(slot as usize) {
                Some(old) => *old = taken,
                None => self.images.push(taken),
            }
        }
    }
}

fn judge(image: &CrashImage, books: &[Book]) {
    let found = audit(&image.disks[0], None);
    assert!(found.is_sound(), "{found:?}");
    let disk = open_as(&(image.storage(0) as Arc<dyn Storage>), &OpenOptions::default());
    let mut seen = vec![0x5a; disk.size() as usize];
    disk.read_at(GuestOffset::new(0), &mut seen).unwrap();
    let allowed = books.iter().flat_map(|book| &book.0);
    for (cluster, (bytes, may)) in seen.chunks(CLUSTER as usize).zip(allowed).enumerate() {
        let is = |fill: &u8| bytes.iter().all(|byte| byte == fill);
        assert!(may.iter().any(is), "cluster {cluster} holds {}, allowed are {may:?}", bytes[0]);
    }
}

fn scenario() {
    const { assert!(CLUSTER == SECTOR) };
    let mut options = CreateOptions::new(THREADS * OWN * CLUSTER);
    options.cluster_size = CLUSTER;
    let made = Arc::new(PageStorage::new(PageBytes::new()));
    create(&(Arc::clone(&made) as Arc<dyn Storage>), None, &options).unwrap();
    let world = CrashWorld::new();
    let storage: Arc<dyn Storage> = Arc::new(Yielding(world.add(made.bytes())));
    let books: Books = Arc::new(Mutex::new(vec![Book(vec![vec![0]; OWN as usize]); THREADS as usize]));
    let album = Arc::new(Mutex::new(Album::default()));
    let (noted, kept) = (Arc::clone(&books), Arc::clone(&album));
    let rng = Mutex::new(CutRng::new(shuttle::rand::thread_rng().gen_range(0..u64::MAX)));
    world.set_hook(Some(Arc::new(move |event, cut: &Cut<'_>| {
        if event != Event::AfterFlush {
            kept.lock().unwrap().look(cut, &noted.lock().unwrap(), &mut rng.lock().unwrap());
        }
    })));
    let mut options = OpenOptions::default();
    options.writable = true;
    let image = open_as(&storage, &options);
    let workers: Vec<_> = (0..THREADS)
        .map(|me| {
            let (image, books) = (Arc::clone(&image), Arc::clone(&books));
            shuttle::thread::spawn(move || work(&image, &books, me))
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    image.close().unwrap();
    world.set_hook(None);
    books.lock().unwrap().iter_mut().for_each(Book::flushed);
    let end = (world.cut(|cut| cut.nothing()), books.lock().unwrap().clone());
    let images = std::mem::take(&mut album.lock().unwrap().images);
    images.iter().chain([&end]).for_each(|(image, books)| judge(image, books));
}

#[test]
fn a_power_cut_under_random_schedules_keeps_flushed_data() {
    shuttle::check_random(scenario, super::schedules());
}

#[test]
fn a_power_cut_under_rare_preemptions_keeps_flushed_data() {
    shuttle::check_pct(scenario, super::schedules(), 3);
}
