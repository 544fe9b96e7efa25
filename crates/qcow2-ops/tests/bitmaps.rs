//! Bitmaps copied from one image to another.
#![allow(clippy::unwrap_used, clippy::disallowed_types, reason = "these are tests")]

use qcow2_core::{
    CreateOptions, GuestDisk, GuestOffset, Image, ImageFormat, NoResolver, OpenOptions, ResolvedSource,
    Storage, create,
};
use qcow2_io::MemoryStorage;
use qcow2_ops::bitmap::copy_bitmaps;
use std::sync::Arc;

const SIZE: u64 = 4 << 20;

fn new_image(cluster_size: u64) -> Arc<dyn Storage> {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = cluster_size;
    create(&storage, None, &options).unwrap();
    storage
}

fn open(storage: &Arc<dyn Storage>, writable: bool) -> Arc<Image> {
    let mut options = OpenOptions::default();
    options.writable = writable;
    let source = ResolvedSource {
        storage: Arc::clone(storage),
        format: ImageFormat::Qcow2,
        name: "memory".into(),
        id: None,
        resolver: Arc::new(NoResolver),
    };
    Image::open(source, &options).unwrap()
}

/// Name, log2 of the granularity, whether it records, and what it marks.
type Seen = (String, u8, bool, Vec<(u64, u64)>);

fn bitmaps(storage: &Arc<dyn Storage>) -> Vec<Seen> {
    let image = open(storage, false);
    let seen = |bitmap: qcow2_core::format::bitmap::Bitmap| {
        assert!(!bitmap.in_use);
        let bits = image.bitmap_bits(&bitmap.name).unwrap();
        let runs = bits.marked_runs().collect();
        (bitmap.name_text(), bitmap.granularity_bits, bitmap.auto, runs)
    };
    image.bitmaps().unwrap().into_iter().map(seen).collect()
}

#[test]
fn a_copied_bitmap_keeps_granularity_marks_and_whether_it_records() {
    let from = new_image(65_536);
    let image = open(&from, true);
    for (name, granularity_bits) in [("coarse", 16), ("fine", 9), ("off", 12), ("empty", 12)] {
        image.add_bitmap(name.as_bytes(), granularity_bits).unwrap();
    }
    image.enable_bitmap(b"empty", false).unwrap();
    image.write_at(GuestOffset::new(100_000), &[1; 5000]).unwrap();
    image.enable_bitmap(b"off", false).unwrap();
    image.write_at(GuestOffset::new(3 << 20), &[1; 70_000]).unwrap();
    image.close().unwrap();
    let before = bitmaps(&from);
    let expected: [Seen; 4] = [
        ("coarse".into(), 16, true, vec![(65_536, 65_536), (3 << 20, 131_072)]),
        ("fine".into(), 9, true, vec![(99_840, 5632), (3 << 20, 70_144)]),
        ("off".into(), 12, false, vec![(98_304, 8192)]),
        ("empty".into(), 12, false, vec![]),
    ];
    assert_eq!(before, expected);

    let to = new_image(4096);
    let image = open(&to, true);
    assert!(copy_bitmaps(&open(&from, false), &image, false).unwrap().is_empty());
    image.close().unwrap();
    assert_eq!(bitmaps(&to), before);
}
