//! Persistent bitmaps across copies and conversions.
#![allow(clippy::unwrap_used, clippy::disallowed_types, reason = "these are tests")]

use qcow2_core::{
    CreateOptions, GuestDisk, GuestOffset, HostOffset, Image, ImageFormat, NoResolver, OpenOptions, RawDisk,
    ResolvedSource, Storage, create,
};
use qcow2_io::MemoryStorage;
use qcow2_ops::bitmap::copy_bitmaps;
use qcow2_ops::{ConvertOptions, Inline, Silent, convert};
use qcow2_testkit::crash::CrashWorld;
use qcow2_testkit::pages::PageBytes;
use std::sync::Arc;

const SIZE: u64 = 4 << 20;

fn new_image(cluster_size: u64) -> Arc<dyn Storage> {
    new_image_in(Arc::new(MemoryStorage::new()), cluster_size)
}

fn new_image_in(storage: Arc<dyn Storage>, cluster_size: u64) -> Arc<dyn Storage> {
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

/// Name, log2 of the granularity, enabled or not, and the marked runs.
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
fn copied_bitmap_keeps_granularity_bits_and_enabled_state() {
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

/// Converts into an existing image with a bitmap, by reading and writing or by copy offload.
#[test]
fn convert_marks_the_target_bitmap() {
    for offload in [false, true] {
        let world = CrashWorld::new();
        let (source, target) = (world.add(PageBytes::new()), world.add(PageBytes::new()));
        for (at, len) in [(70_000, 5000), (1 << 20, 300_000), ((4 << 20) - 512, 512)] {
            source.write_at(HostOffset::new(at), &vec![7; len]).unwrap();
        }
        let target = new_image_in(target, 65_536);
        let image = open(&target, true);
        image.add_bitmap(b"b", 9).unwrap();
        image.close().unwrap();

        let image = open(&target, true);
        let disk: Arc<dyn GuestDisk> = Arc::new(RawDisk::new(source, false).unwrap());
        let mut options = ConvertOptions::default();
        (options.target_is_zero, options.offload) = (true, offload);
        let report = convert(&[disk], &*image, &options, &Inline, &Silent).unwrap();
        assert_eq!(report.offloaded_bytes > 0, offload);
        let mut now = vec![0x5a; SIZE as usize];
        image.read_at(GuestOffset::new(0), &mut now).unwrap();
        image.close().unwrap();
        let bits = open(&target, false).bitmap_bits(b"b").unwrap();
        for (at, sector) in (0..).step_by(512).zip(now.chunks(512)) {
            let marked = bits.is_marked(at);
            assert!(
                sector.iter().all(|&byte| byte == 0) || marked,
                "{at:#x} is not marked, offload {offload}"
            );
        }
    }
}
