//! An enabled bitmap records every changed guest byte, whichever call changes it.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::{
    Codecs, CreateOptions, GuestOffset, GuestRange, Image, ImageFormat, NoResolver, OpenOptions, Piece,
    ResolvedSource, Storage, ZeroMode, create,
};
use qcow2_io::MemoryStorage;
use qcow2_testkit::pattern;
use qcow2_testkit::sim::RunCodec;
use std::sync::Arc;

const CLUSTER: u64 = 4096;
const SIZE: u64 = 32 * CLUSTER;
const SECTOR: usize = 512;
/// A seed whose pattern the codec compresses.
const COMPRESSIBLE: u64 = 4;

fn open(storage: &Arc<dyn Storage>, writable: bool) -> Arc<Image> {
    let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
    let source =
        ResolvedSource { storage: Arc::clone(storage), format, name: "memory".into(), id: None, resolver };
    let mut options = OpenOptions::default();
    options.writable = writable;
    options.codecs = Codecs::new(Arc::new(RunCodec), Arc::new(RunCodec));
    Image::open(source, &options).unwrap()
}

/// An image with data in clusters 8 to 15 and two empty bitmaps: "fine" is enabled, "off" is disabled.
fn image() -> Arc<dyn Storage> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = CLUSTER;
    create(&storage, None, &options).unwrap();
    let image = open(&storage, true);
    image
        .write_at(GuestOffset::new(8 * CLUSTER), &pattern::bytes(1, 8 * CLUSTER, 8 * CLUSTER as usize))
        .unwrap();
    image.add_bitmap(b"fine", 9).unwrap();
    image.add_bitmap(b"off", 9).unwrap();
    image.clear_bitmap(b"fine").unwrap();
    image.enable_bitmap(b"off", false).unwrap();
    image.close().unwrap();
    storage
}

fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0x5a; image.size() as usize];
    image.read_at(GuestOffset::new(0), &mut bytes).unwrap();
    bytes
}

/// Makes `change`, which affects guest bytes `start..end`. The enabled bitmap must mark exactly those, the
/// disabled one nothing.
#[track_caller]
fn check(start: u64, end: u64, change: impl FnOnce(&Image)) {
    let storage = image();
    let image = open(&storage, true);
    let before = content(&image);
    change(&image);
    let now = content(&image);
    assert!(now != before, "nothing has changed");
    image.close().unwrap();

    let image = open(&storage, false);
    assert!(content(&image) == now && image.bitmaps().unwrap().iter().all(|bitmap| !bitmap.in_use));
    let bits = image.bitmap_bits(b"fine").unwrap();
    let sectors = now.chunks(SECTOR).zip(before.chunks(SECTOR));
    for (at, (now, before)) in (0..).step_by(SECTOR).zip(sectors) {
        assert!(now == before || bits.is_marked(at), "sector at {at:#x} has changed and is not marked");
    }
    let first = start - start % 512;
    let marked: Vec<_> = bits.marked_runs().collect();
    assert_eq!(marked, [(first, end.next_multiple_of(512) - first)]);
    assert_eq!(image.bitmap_bits(b"off").unwrap().marked_runs().next(), None);
}

fn range(start: u64, end: u64) -> GuestRange {
    GuestRange::between(GuestOffset::new(start), GuestOffset::new(end))
}

/// Writes with a ticket and the caller's own I/O, as an event loop does.
fn write_by_ticket(image: &Image, start: u64, bytes: &[u8]) {
    let (mut at, mut rest) = (start, bytes);
    while !rest.is_empty() {
        let ticket = image.prepare_write(range(at, at + rest.len() as u64)).unwrap();
        let (part, next) = rest.split_at(ticket.range().len() as usize);
        let data = image.data_storage().unwrap();
        for piece in ticket.pieces() {
            match piece {
                Piece::Guest { host } => data.write_at(host, part).unwrap(),
                Piece::Bytes { host, bytes } => data.write_at(host, bytes).unwrap(),
                Piece::Zeroes { host, len } => data.write_zeroes(host, len, ZeroMode::KeepAllocated).unwrap(),
                other => panic!("{other:?}"),
            }
        }
        ticket.commit().unwrap();
        at += part.len() as u64;
        rest = next;
    }
}

#[test]
fn every_kind_of_change_is_marked() {
    // In unallocated clusters, in data, and across both; whole clusters and parts of sectors.
    for (start, end) in [
        (2 * CLUSTER, 3 * CLUSTER),
        (8 * CLUSTER, 9 * CLUSTER),
        (7 * CLUSTER, 10 * CLUSTER),
        (7 * CLUSTER + 100, 8 * CLUSTER + 700),
        (9 * CLUSTER + 513, 9 * CLUSTER + 514),
    ] {
        let bytes = pattern::bytes(3, start, (end - start) as usize);
        check(start, end, |image| image.write_at(GuestOffset::new(start), &bytes).unwrap());
        check(start, end, |image| write_by_ticket(image, start, &bytes));
        let (first, second) = bytes.split_at(bytes.len() / 2);
        let middle = start + first.len() as u64;
        let parts = [(GuestOffset::new(middle), second), (GuestOffset::new(start), first)];
        check(start, end, |image| image.write_parts(&parts).unwrap());
        if end > 8 * CLUSTER {
            for mode in [ZeroMode::KeepAllocated, ZeroMode::MayUnmap] {
                check(start, end, |image| image.write_zeroes(range(start, end), mode).unwrap());
            }
        }
    }
    check(8 * CLUSTER, 11 * CLUSTER, |image| image.discard(range(8 * CLUSTER, 11 * CLUSTER)).unwrap());
}

#[test]
fn compressed_writes_are_marked() {
    let cluster = |index: u64| pattern::bytes(COMPRESSIBLE, index * CLUSTER, CLUSTER as usize);
    let offset = |index: u64| GuestOffset::new(index * CLUSTER);
    check(2 * CLUSTER, 3 * CLUSTER, |image| image.write_compressed(offset(2), &cluster(2)).unwrap());
    // A cluster that does not shrink is stored uncompressed.
    let noise = pattern::bytes(3, 2 * CLUSTER, CLUSTER as usize);
    check(2 * CLUSTER, 3 * CLUSTER, |image| image.write_compressed(offset(2), &noise).unwrap());
    check(2 * CLUSTER, 5 * CLUSTER, |image| {
        let mut streams = Vec::new();
        for index in 2..5 {
            let mut stream = vec![0; CLUSTER as usize - 1];
            let len = image.codec().unwrap().compress(&cluster(index), &mut stream).unwrap().unwrap();
            stream.truncate(len);
            streams.push((offset(index), stream));
        }
        let streams: Vec<_> = streams.iter().map(|(at, stream)| (*at, &stream[..])).collect();
        image.write_compressed_streams(&streams).unwrap();
    });
}

/// The in-use flag is on disk before the first byte of a change is written, so that a crash leaves it set.
#[test]
fn a_recording_bitmap_is_in_use_before_the_first_change() {
    let bytes = [7; 1000];
    let changes: [&dyn Fn(&Image); 4] = [
        &|image| image.write_at(GuestOffset::new(9000), &bytes).unwrap(),
        &|image| drop(image.prepare_write(range(9000, 10_000)).unwrap()),
        &|image| image.discard(range(8 * CLUSTER, 9 * CLUSTER)).unwrap(),
        &|image| image.resize(SIZE + CLUSTER).unwrap(),
    ];
    for (index, change) in changes.iter().enumerate() {
        let storage = image();
        let image = open(&storage, true);
        let in_use = || {
            let seen = open(&storage, false).bitmaps().unwrap();
            seen.iter().map(|bitmap| bitmap.in_use).collect::<Vec<_>>()
        };
        assert_eq!(in_use(), [false, false]);
        change(&image);
        // A resize changes all bitmaps, also disabled ones.
        assert_eq!(in_use(), [true, index == 3], "change {index}");
        image.close().unwrap();
        assert_eq!(in_use(), [false, false]);
    }
}
