//! The pattern of a verifying load generator: sixteen jobs write 4 to 64 KiB at random offsets of a warm
//! overlay and read back what they wrote; the jobs' ranges are interleaved within the same clusters.
//!
//! `QCOW2_VERIFY_SECONDS` sets the duration (600 for a campaign), `QCOW2_SEED` the seed of the offsets.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout, clippy::field_reassign_with_default)]

use qcow2_core::{CreateOptions, GuestOffset, Image, ImageFormat, OpenOptions, create};
use qcow2_io::{Create, OpenFile, Policy, SourceOptions, open_source};
use qcow2_testkit::oracle::Tool;
use qcow2_testkit::rng::Rng;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const JOBS: u64 = 16;
const BLOCK: u64 = 4096;
/// Blocks in a job's unit; units start in the middle of clusters, so that adjacent jobs share clusters.
const UNIT: u64 = 16;
const SHIFT: u64 = 5 * BLOCK;
const UNITS: u64 = 6400;
const SIZE: u64 = UNITS * UNIT * BLOCK + SHIFT;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Content of `block` after its `version`-th write; version 0 is the backing file's.
fn content(block: u64, version: u32, out: &mut [u8]) {
    let mut word = ((block << 20) ^ u64::from(version)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in out.chunks_exact_mut(8) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        chunk.copy_from_slice(&word.to_le_bytes());
    }
}

fn open(path: &Path) -> Arc<Image> {
    let options =
        SourceOptions::new(OpenFile::writable()).with_format(ImageFormat::Qcow2).with_policy(Policy::Allow);
    let mut open = OpenOptions::default();
    open.writable = true;
    Image::open(open_source(path, &options).unwrap(), &open).unwrap()
}

/// One job: it owns every sixteenth unit and counts the writes of each of their blocks.
struct Job<'a> {
    image: &'a Image,
    number: u64,
    versions: Vec<u32>,
    buffer: Vec<u8>,
    wanted: Vec<u8>,
}

impl Job<'_> {
    fn slot(&self, unit: u64, block: u64) -> usize {
        (unit * UNIT + block) as usize
    }

    fn place(&self, unit: u64, block: u64) -> u64 {
        (unit * JOBS + self.number) * UNIT + block
    }

    fn write(&mut self, unit: u64, first: u64, count: u64) {
        for i in 0..count {
            let (slot, place) = (self.slot(unit, first + i), self.place(unit, first + i));
            self.versions[slot] += 1;
            let bytes = (i * BLOCK) as usize..((i + 1) * BLOCK) as usize;
            content(place, self.versions[slot], &mut self.buffer[bytes]);
        }
        let at = GuestOffset::new(SHIFT + self.place(unit, first) * BLOCK);
        self.image.write_at(at, &self.buffer[..(count * BLOCK) as usize]).unwrap();
    }

    fn verify(&mut self, unit: u64, first: u64, count: u64) {
        let at = SHIFT + self.place(unit, first) * BLOCK;
        let len = (count * BLOCK) as usize;
        self.image.read_at(GuestOffset::new(at), &mut self.buffer[..len]).unwrap();
        for i in 0..count {
            let bytes = (i * BLOCK) as usize..((i + 1) * BLOCK) as usize;
            let (slot, place) = (self.slot(unit, first + i), self.place(unit, first + i));
            content(place, self.versions[slot], &mut self.wanted);
            assert!(
                self.buffer[bytes] == self.wanted,
                "job {} block {place} version {}",
                self.number,
                self.versions[slot]
            );
        }
    }

    fn run(&mut self, seed: u64, until: Instant) -> u64 {
        let mut rng = Rng::new(seed * JOBS + self.number);
        let units = UNITS / JOBS;
        let mut operations = 0;
        while Instant::now() < until {
            let (unit, first) = (rng.below(units), rng.below(UNIT));
            let count = 1 + rng.below(UNIT - first);
            match rng.below(1000) {
                0 => self.image.flush().unwrap(),
                1..=700 => self.write(unit, first, count),
                _ => self.verify(unit, first, count),
            }
            operations += 1;
        }
        for unit in 0..units {
            self.verify(unit, 0, UNIT);
        }
        operations
    }
}

fn make(folder: &Path) -> Arc<Image> {
    let mut base = vec![0; SIZE as usize];
    for (block, bytes) in base[SHIFT as usize..].chunks_exact_mut(BLOCK as usize).enumerate() {
        content(block as u64, 0, bytes);
    }
    std::fs::write(folder.join("base.raw"), base).unwrap();
    let path = folder.join("over.qcow2");
    let mut options = CreateOptions::new(SIZE);
    options = options.with_backing("base.raw", "raw");
    create(&OpenFile::writable().with_create(Create::New).open(&path).unwrap(), None, &options).unwrap();
    let image = open(&path);
    // Warm: every L2 table exists and is cached. The first bytes of the disk belong to no job.
    image.write_at(GuestOffset::new(0), &[1; 512]).unwrap();
    for at in (0..SIZE).step_by(64 << 20) {
        image.read_at(GuestOffset::new(at), &mut [0; 512]).unwrap();
    }
    image
}

#[test]
fn sixteen_interleaved_jobs_read_back_what_they_wrote() {
    let (seconds, seed) = (number("QCOW2_VERIFY_SECONDS", 3), number("QCOW2_SEED", 1));
    let folder = tempfile::tempdir().unwrap();
    let image = make(folder.path());
    let until = Instant::now() + Duration::from_secs(seconds);
    let operations = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for number in 0..JOBS {
            let (image, operations) = (&*image, &operations);
            scope.spawn(move || {
                let versions = vec![0; (UNITS / JOBS * UNIT) as usize];
                let (buffer, wanted) = (vec![0; (UNIT * BLOCK) as usize], vec![0; BLOCK as usize]);
                let done = Job { image, number, versions, buffer, wanted }.run(seed, until);
                operations.fetch_add(done, Ordering::Relaxed);
            });
        }
    });
    image.close().unwrap();
    drop(image);
    println!("{} operations, 0 mismatches", operations.into_inner());
    if let Some(qemu) = Tool::find("qemu-img") {
        qemu.run_in(folder.path(), &["check", "over.qcow2"]).success();
    }
}
