//! The memory limit for bitmaps: past it a call fails with `NoSpace`, or a bitmap gets extra marks. No bitmap
//! is lost, and none misses a change. Bitmap tables that share clusters are damage.
#![allow(missing_docs, clippy::unwrap_used)]

use qcow2_core::{
    ErrorKind, GuestOffset, GuestRange, Image, ImageFormat, Layers, NoResolver, OpenOptions, ResolvedSource,
    Storage, ZeroMode,
};
use qcow2_format::bitmap::Bitmap;
use qcow2_format::header::{Header, Version};
use qcow2_testkit::audit::audit;
use qcow2_testkit::builder::Builder;
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::storage::PageStorage;
use std::sync::Arc;

const SIZE: u64 = 1 << 30;
/// Bytes of the disk that one leaf of bits covers, at the finest granularity.
const STEP: u64 = 4096 * 512;
/// Enough memory for about 100 leaves.
const LITTLE: u64 = 64 << 10;

fn new_image() -> Arc<PageStorage> {
    let mut header = Header::new(Version::V3, 12);
    header.size = SIZE;
    Arc::new(PageStorage::new(PageBytes::from_bytes(&Builder::with_header(header).build().bytes)))
}

fn open(storage: &Arc<PageStorage>, memory: Option<u64>) -> Arc<Image> {
    let mut options = OpenOptions::default();
    options.writable = true;
    options.layers = Layers::NoBacking;
    options.bitmap_memory = memory.unwrap_or(options.bitmap_memory);
    let source = ResolvedSource {
        storage: Arc::clone(storage) as Arc<dyn Storage>,
        format: ImageFormat::Qcow2,
        name: "image".to_owned(),
        id: None,
        resolver: Arc::new(NoResolver),
    };
    Image::open(source, &options).unwrap()
}

/// Writes `count` sectors, each in the range of another leaf.
fn write_places(image: &Image, count: u64) {
    for place in 0..count {
        image.write_at(GuestOffset::new(place * STEP), &[1; 512]).unwrap();
    }
}

fn range(len: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(0), len).unwrap()
}

fn bytes(storage: &PageStorage) -> Vec<u8> {
    let mut bytes = vec![0; storage.len().unwrap() as usize];
    storage.bytes().read(0, &mut bytes);
    bytes
}

#[track_caller]
fn check_refused<T>(result: Result<T, qcow2_core::Error>) {
    let error = result.err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("bitmap 'one' does not fit"), "{error}");
}

/// If recording bitmaps do not fit, the first change fails and changes nothing; the bitmaps can be removed.
#[test]
fn recording_bitmaps_over_the_limit_fail_the_first_change() {
    let storage = new_image();
    let image = open(&storage, None);
    image.add_bitmap(b"one", 9).unwrap();
    write_places(&image, 300);
    image.close().unwrap();
    let before = bytes(&storage);
    let image = open(&storage, Some(LITTLE));
    check_refused(image.write_at(GuestOffset::new(0), &[2; 512]));
    check_refused(image.discard(range(512)));
    check_refused(image.resize(SIZE / 2));
    check_refused(image.bitmap_bits(b"one"));
    let mut byte = [0; 1];
    image.read_at(GuestOffset::new(0), &mut byte).unwrap();
    assert_eq!((byte, image.bitmaps().unwrap().len()), ([1], 1));
    image.close().unwrap();
    assert!(bytes(&storage) == before, "nothing has changed");
    let image = open(&storage, Some(LITTLE));
    // A disabled bitmap is not read.
    image.enable_bitmap(b"one", false).unwrap();
    image.write_at(GuestOffset::new(0), &[2; 512]).unwrap();
    check_refused(image.enable_bitmap(b"one", true));
    image.close().unwrap();
    assert!(!open(&storage, None).bitmaps().unwrap()[0].auto, "it misses a change");
    let image = open(&storage, Some(LITTLE));
    image.remove_bitmap(b"one").unwrap();
    image.close().unwrap();
    let audit = audit(&storage.bytes(), None);
    assert!(audit.is_sound() && audit.leaks == 0);
}

/// Guest writes past the limit succeed, with extra marks, which are stored.
#[test]
fn guest_writes_over_the_limit_succeed_with_extra_marks() {
    let storage = new_image();
    let image = open(&storage, Some(LITTLE));
    image.add_bitmap(b"one", 9).unwrap();
    image.add_bitmap(b"two", 9).unwrap();
    write_places(&image, 300);
    image.close().unwrap();
    assert!(audit(&storage.bytes(), None).is_sound());
    let image = open(&storage, None);
    for name in [b"one", b"two"] {
        let bits = image.bitmap_bits(name).unwrap();
        assert!((0..300).all(|place| bits.is_marked(place * STEP)));
        assert!(!bits.is_marked(512), "there was room in the beginning");
        assert!(bits.is_marked(299 * STEP + 512), "there was none in the end");
    }
}

/// A merge over the limit fails and leaves the bitmap unchanged.
#[test]
fn a_merge_is_exact_or_fails() {
    let (rich, poor) = (new_image(), new_image());
    let source = open(&rich, None);
    source.add_bitmap(b"many", 9).unwrap();
    write_places(&source, 300);
    let many = source.bitmap_bits(b"many").unwrap();
    let image = open(&poor, Some(LITTLE));
    image.add_bitmap(b"one", 9).unwrap();
    image.write_at(GuestOffset::new(0), &[1; 512]).unwrap();
    image.close().unwrap();
    let image = open(&poor, Some(LITTLE));
    check_refused(image.merge_bitmap(b"one", &many));
    image.close().unwrap();
    let marked: Vec<_> = open(&poor, None).bitmap_bits(b"one").unwrap().marked_runs().collect();
    assert_eq!(marked, [(0, 512)]);
}

/// A resize to more bytes than a bitmap of this granularity can cover fails before the size changes.
#[test]
fn a_resize_too_large_for_a_bitmap_is_refused() {
    let storage = new_image();
    let image = open(&storage, None);
    image.add_bitmap(b"one", 9).unwrap();
    image.close().unwrap();
    let image = open(&storage, None);
    assert_eq!(image.resize(4 << 40).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(image.size(), SIZE);
    image.write_at(GuestOffset::new(0), &[1; 512]).unwrap();
    image.close().unwrap();
    assert!(open(&storage, None).bitmap_bits(b"one").unwrap().is_marked(0));
}

/// Fully marked ranges take no space, in memory or on disk.
#[test]
fn fully_marked_bitmaps_take_no_space() {
    let storage = new_image();
    let image = open(&storage, Some(LITTLE));
    for name in 0..50u8 {
        image.add_bitmap(&[b'a' + name], 9).unwrap();
    }
    image.write_zeroes(range(SIZE), ZeroMode::MayUnmap).unwrap();
    let before = storage.len().unwrap();
    image.close().unwrap();
    // Only the bitmap's table takes a cluster.
    assert!(storage.len().unwrap() <= before + 52 * 4096);
    let image = open(&storage, Some(LITTLE));
    image.write_at(GuestOffset::new(0), &[1; 512]).unwrap();
    image.close().unwrap();
    let audit = audit(&storage.bytes(), None);
    assert!(audit.is_sound() && audit.leaks == 0);
    let runs: Vec<_> = open(&storage, None).bitmap_bits(b"b").unwrap().marked_runs().collect();
    assert_eq!(runs, [(0, SIZE)]);
}

/// Bitmap tables that refer to more bytes than the file has are damage, found before the bits are read.
#[test]
fn bitmap_tables_that_share_clusters_are_damage() {
    let storage = new_image();
    let image = open(&storage, None);
    image.add_bitmap(b"one", 9).unwrap();
    image.write_at(GuestOffset::new(0), &[1; 512]).unwrap();
    image.close().unwrap();
    let image = open(&storage, None);
    let Bitmap { table_offset, table_entries, .. } = image.bitmaps().unwrap().remove(0);
    let mut entry = [0; 8];
    storage.read_at(table_offset, &mut entry).unwrap();
    storage.write_at(table_offset, &entry.repeat(table_entries as usize)).unwrap();
    let image = open(&storage, None);
    let error = image.bitmap_bits(b"one").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("they share clusters"), "{error}");
    assert!(qcow2_core::bitmap::check_bitmaps(&*storage, &image.header()).is_err());
    image.write_at(GuestOffset::new(0), &[2; 512]).unwrap();
    image.close().unwrap();
    assert!(open(&storage, None).bitmaps().unwrap().is_empty());
}
