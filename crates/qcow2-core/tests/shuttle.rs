//! The engine under the shuttle scheduler, which explores thread interleavings: allocator, cache, claims,
//! flush and delayed reuse together, on an image so small that threads always collide.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

#[path = "shuttle/merged.rs"]
mod merged;
#[path = "shuttle/power.rs"]
mod power;

use qcow2_core::StorageError;
use qcow2_core::{
    CreateOptions, GuestOffset, GuestRange, HostOffset, Image, ImageFormat, NoResolver, OpenOptions,
    ResolvedSource, Storage, ZeroMode, create,
};
use qcow2_io::MemoryStorage;
use qcow2_testkit::pattern;
use shuttle::rand::Rng;
use std::sync::Arc;

const CLUSTER: u64 = 512;
const THREADS: u64 = 3;
const DISK: u64 = CLUSTER * 12;

fn open(storage: &Arc<dyn Storage>) -> Arc<Image> {
    let mut options = OpenOptions::default();
    options.writable = true;
    options.discard_freed = true;
    open_as(storage, &options)
}

fn open_as(storage: &Arc<dyn Storage>, options: &OpenOptions) -> Arc<Image> {
    let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
    let source =
        ResolvedSource { storage: Arc::clone(storage), format, name: "memory".into(), id: None, resolver };
    Image::open(source, options).unwrap()
}

/// A storage that yields to other threads before every call.
struct Yielding<S>(S);

impl<S: std::ops::Deref<Target: Storage> + Send + Sync> Storage for Yielding<S> {
    fn len(&self) -> Result<u64, StorageError> {
        self.0.len()
    }
    /// Yields more than once, so that a cluster can be freed and reused before its old bytes are read.
    fn read_at(&self, offset: HostOffset, buf: &mut [u8]) -> Result<usize, StorageError> {
        for _ in 0..100 {
            shuttle::thread::yield_now();
        }
        self.0.read_at(offset, buf)
    }
    fn write_at(&self, offset: HostOffset, buf: &[u8]) -> Result<(), StorageError> {
        shuttle::thread::yield_now();
        self.0.write_at(offset, buf)
    }
    fn write_zeroes(&self, offset: HostOffset, len: u64, mode: ZeroMode) -> Result<(), StorageError> {
        shuttle::thread::yield_now();
        self.0.write_zeroes(offset, len, mode)
    }
    fn discard(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        shuttle::thread::yield_now();
        self.0.discard(offset, len)
    }
    fn allocate(&self, offset: HostOffset, len: u64) -> Result<(), StorageError> {
        self.0.allocate(offset, len)
    }
    fn set_len(&self, len: u64) -> Result<(), StorageError> {
        self.0.set_len(len)
    }
    fn flush(&self) -> Result<(), StorageError> {
        shuttle::thread::yield_now();
        self.0.flush()
    }
}

/// Each thread owns one quarter of every cluster, so that pieces of different threads share clusters, and
/// only the owner writes a piece. Returns the bytes that the thread expects.
fn work(image: &Image, me: u64) -> Vec<u8> {
    let piece = CLUSTER / 4;
    let mut known = vec![0u8; DISK as usize];
    let mut rng = shuttle::rand::thread_rng();
    for step in 1..8u8 {
        let cluster = rng.gen_range(0..DISK / CLUSTER);
        let at = cluster * CLUSTER + me * piece;
        let fill = me as u8 * 60 + step;
        match rng.gen_range(0..10) {
            0..=2 => {
                image.write_at(GuestOffset::new(at), &vec![fill; piece as usize]).unwrap();
                known[at as usize..(at + piece) as usize].fill(fill);
            }
            3 => {
                let range = GuestRange::new(GuestOffset::new(at), piece).unwrap();
                image.write_zeroes(range, ZeroMode::MayUnmap).unwrap();
                known[at as usize..(at + piece) as usize].fill(0);
            }
            4 => image.flush().unwrap(),
            8 | 9 => {
                let starts = piece_starts(&mut rng, me);
                let bytes = vec![fill; piece as usize];
                let parts: Vec<_> = starts.iter().map(|&at| (GuestOffset::new(at), &bytes[..])).collect();
                image.write_parts(&parts).unwrap();
                for at in starts {
                    known[at as usize..(at + piece) as usize].fill(fill);
                }
            }
            5 | 6 => look_at_churn(image, rng.gen_range(0..4)),
            _ => {
                let mut seen = pattern::unread(piece as usize);
                image.read_at(GuestOffset::new(at), &mut seen).unwrap();
                assert_eq!(
                    seen,
                    known[at as usize..(at + piece) as usize],
                    "thread {me} step {step} at {at:#x}"
                );
            }
        }
    }
    known
}

/// Offsets of a thread's pieces in some adjacent clusters, ascending or descending, so that threads claim the
/// same clusters in opposite order.
fn piece_starts(rng: &mut impl Rng, me: u64) -> Vec<u64> {
    let count = rng.gen_range(2..5);
    let first = rng.gen_range(0..DISK / CLUSTER - count);
    let mut starts: Vec<_> =
        (first..first + count).map(|cluster| cluster * CLUSTER + me * CLUSTER / 4).collect();
    if rng.gen_bool(0.5) {
        starts.reverse();
    }
    starts
}

/// Reads a cluster that is freed and reused all the time: it must have its own bytes or zeroes, never those
/// of the next user of its old host cluster.
fn look_at_churn(image: &Image, cluster: u64) {
    let mut seen = [pattern::UNREAD; CLUSTER as usize];
    image.read_at(GuestOffset::new(DISK + cluster * CLUSTER), &mut seen).unwrap();
    let own = 200 + cluster as u8;
    assert!(
        seen.iter().all(|&b| b == 0 || b == own),
        "cluster {cluster} shows bytes of another: {}",
        seen[0]
    );
}

/// Writes and discards whole clusters past the part of the other threads, so that host clusters are freed and
/// reused; in the end all are discarded.
fn churn(image: &Image) {
    let mut rng = shuttle::rand::thread_rng();
    for step in 0..24 {
        let cluster = rng.gen_range(0..4);
        let at = GuestOffset::new(DISK + cluster * CLUSTER);
        match rng.gen_range(0..4) {
            0 | 1 => image.write_at(at, &[200 + cluster as u8; CLUSTER as usize]).unwrap(),
            2 => image.discard(GuestRange::new(at, CLUSTER).unwrap()).unwrap(),
            _ => image.flush().unwrap(),
        }
        if step == 23 {
            image.discard(GuestRange::new(GuestOffset::new(DISK), 4 * CLUSTER).unwrap()).unwrap();
        }
    }
}

fn scenario() {
    let storage: Arc<dyn Storage> = Arc::new(Yielding(Arc::new(MemoryStorage::new())));
    let mut options = CreateOptions::new(DISK + 4 * CLUSTER);
    options.cluster_size = CLUSTER;
    create(&storage, None, &options).unwrap();
    let image = open(&storage);
    let workers: Vec<_> = (0..THREADS)
        .map(|me| {
            let image = Arc::clone(&image);
            shuttle::thread::spawn(move || work(&image, me))
        })
        .collect();
    let churner = {
        let image = Arc::clone(&image);
        shuttle::thread::spawn(move || churn(&image))
    };
    let known: Vec<Vec<u8>> = workers.into_iter().map(|w| w.join().unwrap()).collect();
    churner.join().unwrap();
    image.close().unwrap();
    drop(image);
    let image = open(&storage);
    let mut seen = pattern::unread(DISK as usize);
    image.read_at(GuestOffset::new(0), &mut seen).unwrap();
    for (at, &byte) in seen.iter().enumerate() {
        let owner = at as u64 % CLUSTER / (CLUSTER / 4);
        let wanted = known.get(owner as usize).map_or(0, |k| k[at]);
        assert_eq!(byte, wanted, "byte {at:#x}");
    }
    let mut end = pattern::unread(4 * CLUSTER as usize);
    image.read_at(GuestOffset::new(DISK), &mut end).unwrap();
    assert!(end.iter().all(|&b| b == 0), "a discarded cluster reads as zeroes");
}

/// How many schedules to try; more with `SHUTTLE_SCHEDULES`.
fn schedules() -> usize {
    std::env::var("SHUTTLE_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(300)
}

#[test]
fn random_schedules_lose_no_write() {
    shuttle::check_random(scenario, schedules());
}

#[test]
fn schedules_with_rare_preemptions_lose_no_write() {
    shuttle::check_pct(scenario, schedules(), 3);
}
