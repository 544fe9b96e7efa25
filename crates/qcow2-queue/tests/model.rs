//! Random requests in flight beside each other, on many kinds of disks, compared with plain bytes.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use qcow2_image::io::CacheMode;
use qcow2_image::{Disk, ImageFormat, NewDisk};
use qcow2_queue::{Completion, GuestOffset, GuestRange, IoBuffer, Queue, QueueOptions, Request, ZeroMode};
use qcow2_testkit::rng::Rng;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

const SIZE: u64 = 3 << 20;

fn filled(disk: &Disk, seed: u64) -> Vec<u8> {
    let (mut rng, mut bytes) = (Rng::new(seed), vec![0; SIZE as usize]);
    for _ in 0..12 {
        let at = rng.below(SIZE - 300_000);
        let len = rng.between(1, 300_000) as usize;
        let part = &mut bytes[at as usize..at as usize + len];
        rng.fill(part);
        disk.write_at(at, part).unwrap();
    }
    disk.flush().unwrap();
    bytes
}

type Made = (Disk, Vec<u8>);

fn plain(folder: &Path, seed: u64, new: NewDisk) -> Made {
    let disk = new.size(SIZE).create(folder.join("disk")).unwrap();
    let bytes = filled(&disk, seed);
    (disk, bytes)
}

/// An overlay whose backing file has the bytes.
fn overlay(folder: &Path, seed: u64, new: NewDisk, format: ImageFormat) -> Made {
    let base = new.size(SIZE).create(folder.join("base")).unwrap();
    let bytes = filled(&base, seed);
    base.close().unwrap();
    let top = NewDisk::qcow2().backing_file("base", format).follow_backing_files();
    (top.create(folder.join("disk")).unwrap(), bytes)
}

fn direct(folder: &Path, seed: u64, new: NewDisk, format: ImageFormat) -> Made {
    let disk = new.size(SIZE).create(folder.join("disk")).unwrap();
    let bytes = filled(&disk, seed);
    disk.close().unwrap();
    let options = Disk::options().writable().format(format).cache(CacheMode::None);
    (options.open(folder.join("disk")).unwrap(), bytes)
}

/// Bytes of which half are compressed.
fn compressed(folder: &Path) -> Made {
    let disk = NewDisk::qcow2().size(SIZE).create(folder.join("disk")).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    for (n, cluster) in bytes.chunks_mut(65_536).enumerate().step_by(2) {
        cluster.fill(n as u8 + 1);
        let offset = GuestOffset::new(n as u64 * 65_536);
        disk.as_image().unwrap().write_compressed(offset, cluster).unwrap();
    }
    (disk, bytes)
}

fn meets(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// What is in flight: where, whether it writes, and the bytes that a read must see.
type InFlight = HashMap<u64, (Range<u64>, bool, Option<Vec<u8>>)>;

fn finish(flight: &mut InFlight, completion: Completion) {
    let Completion { token, buffer, result } = completion;
    result.unwrap();
    let (range, _, wanted) = flight.remove(&token).expect("a token that was submitted once");
    if let Some(wanted) = wanted {
        assert!(buffer.unwrap()[..] == wanted[..], "a read of {range:?}");
    }
}

fn buffer(rng: &mut Rng, len: usize) -> IoBuffer {
    if rng.one_in(2) { IoBuffer::zeroed(len) } else { IoBuffer::from(vec![1; len]) }
}

fn request(rng: &mut Rng, range: &Range<u64>, bytes: &mut [u8]) -> (Request, bool, Option<Vec<u8>>) {
    let here = &mut bytes[range.start as usize..range.end as usize];
    let (offset, len) = (GuestOffset::new(range.start), here.len());
    match rng.below(12) {
        0..5 => {
            let buffer = buffer(rng, len);
            (Request::Read { offset, buffer }, false, Some(here.to_vec()))
        }
        5..10 => {
            let mut buffer = buffer(rng, len);
            rng.fill(&mut buffer);
            here.copy_from_slice(&buffer);
            (Request::Write { offset, buffer }, true, None)
        }
        10 => {
            here.fill(0);
            let mode = rng.pick(&[ZeroMode::KeepAllocated, ZeroMode::MayUnmap]);
            (Request::Zeroes { range: GuestRange::new(offset, len as u64).unwrap(), mode }, true, None)
        }
        _ => (Request::Flush, false, None),
    }
}

/// Random requests; returns whether io_uring took part.
fn run((disk, mut bytes): Made, seed: u64, options: &QueueOptions) -> bool {
    let guest = disk.as_guest_disk();
    let mut queue = Queue::new(guest, options);
    let (mut rng, mut flight) = (Rng::new(seed), InFlight::new());
    for token in 0..600 {
        let aligned = rng.one_in(2);
        let unit = if aligned { 4096 } else { 1 };
        let longest = rng.pick(&[4096, 4096, 70_000, 400_000]);
        let start = rng.below(SIZE - longest) / unit * unit;
        let len = rng.between(1, longest).next_multiple_of(unit).min(SIZE - start);
        let range = start..start + len;
        // No order among requests in flight: those that would notice wait.
        while flight.values().any(|(other, writes, _)| *writes && meets(other, &range)) || flight.len() >= 32
        {
            queue.wait(|done| finish(&mut flight, done)).unwrap();
        }
        let reads = flight.values().any(|(other, _, wanted)| wanted.is_some() && meets(other, &range));
        let (request, writes, wanted) = request(&mut rng, &range, &mut bytes);
        if writes && reads {
            while !flight.is_empty() {
                queue.wait(|done| finish(&mut flight, done)).unwrap();
            }
        }
        flight.insert(token, (range, writes, wanted));
        queue.submit(token, request);
        assert_eq!(queue.in_flight(), flight.len());
        if rng.one_in(4) {
            queue.poll(|done| finish(&mut flight, done)).unwrap();
        }
    }
    while !flight.is_empty() {
        queue.wait(|done| finish(&mut flight, done)).unwrap();
    }
    let uses_ring = queue.uses_ring();
    drop(queue);
    let path = disk.path().to_owned();
    let format = disk.format().clone();
    let mut seen = vec![0; SIZE as usize];
    disk.read_at(0, &mut seen).unwrap();
    assert!(seen == bytes, "the disk after all");
    disk.close().unwrap();
    let again = Disk::options().format(format).follow_backing_files().password("pw").open(path).unwrap();
    again.read_at(0, &mut seen).unwrap();
    assert!(seen == bytes, "the disk after all, opened again");
    uses_ring
}

/// Whether the system lets us use io_uring; a container may not.
fn has_ring() -> bool {
    #[cfg(target_os = "linux")]
    {
        let ring = qcow2_image::io::FileRing::<()>::new(1);
        if let Err(error) = &ring {
            println!("skipped by the ring: {error}");
        }
        ring.is_ok()
    }
    #[cfg(not(target_os = "linux"))]
    false
}

fn check(make: impl Fn(&Path, u64) -> Made, by_ring: bool) {
    let ways = [(0, 0), (0, 3), (1, 0), (3, 2), (64, 0), (64, 4)];
    for (seed, (depth, threads)) in ways.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let seed = seed as u64;
        let options = QueueOptions::default().with_depth(depth).with_threads(threads);
        let uses_ring = run(make(folder.path(), seed), seed, &options);
        assert_eq!(uses_ring, by_ring && depth > 0 && has_ring(), "{options:?}");
    }
}

#[test]
fn qcow2() {
    check(|folder, seed| plain(folder, seed, NewDisk::qcow2()), true);
}

#[test]
fn small_clusters() {
    check(|folder, seed| plain(folder, seed, NewDisk::qcow2().cluster_size(512)), true);
}

#[test]
fn subclusters() {
    check(|folder, seed| plain(folder, seed, NewDisk::qcow2().with(|o| o.extended_l2 = true)), true);
}

#[test]
fn raw() {
    check(|folder, seed| plain(folder, seed, NewDisk::raw()), true);
}

#[test]
fn data_file() {
    let new = || NewDisk::qcow2().data_file("data").follow_backing_files();
    check(|folder, seed| plain(folder, seed, new()), true);
}

#[test]
fn overlay_on_qcow2() {
    check(|folder, seed| overlay(folder, seed, NewDisk::qcow2(), ImageFormat::Qcow2), true);
}

#[test]
fn overlay_on_raw() {
    check(|folder, seed| overlay(folder, seed, NewDisk::raw(), ImageFormat::Raw), true);
}

#[test]
fn direct_io() {
    check(|folder, seed| direct(folder, seed, NewDisk::qcow2(), ImageFormat::Qcow2), true);
    check(|folder, seed| direct(folder, seed, NewDisk::raw(), ImageFormat::Raw), true);
}

#[test]
fn half_compressed() {
    check(|folder, _| compressed(folder), true);
}

#[test]
fn encrypted() {
    let new = || NewDisk::qcow2().password("pw").unlock_time(std::time::Duration::from_millis(1));
    check(|folder, seed| plain(folder, seed, new()), false);
}
