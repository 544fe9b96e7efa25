//! Images that claim to be huge: the work is proportional to the tables in the file, and long work can be
//! stopped.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::{
    CreateOptions, ErrorKind, ExtentState, GuestOffset, GuestRange, HostOffset, Image, ImageFormat,
    NoResolver, OpenOptions, ResolvedSource, Storage, create,
};
use qcow2_testkit::audit::audit;
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::storage::PageStorage;
use std::ops::ControlFlow;
use std::sync::Arc;

fn new_image(cluster_size: u64, size: u64) -> Arc<PageStorage> {
    let storage = Arc::new(PageStorage::new(PageBytes::new()));
    let mut options = CreateOptions::new(size);
    options.cluster_size = cluster_size;
    create(&(Arc::clone(&storage) as Arc<dyn Storage>), None, &options).unwrap();
    storage
}

fn source(storage: &Arc<PageStorage>) -> ResolvedSource {
    ResolvedSource {
        storage: Arc::clone(storage) as Arc<dyn Storage>,
        format: ImageFormat::Qcow2,
        name: "image".to_owned(),
        id: None,
        resolver: Arc::new(NoResolver),
    }
}

fn open(storage: &Arc<PageStorage>) -> Arc<Image> {
    let mut options = OpenOptions::default();
    options.writable = true;
    Image::open(source(storage), &options).unwrap()
}

/// All runs of the disk.
fn extents(image: &Image) -> Vec<(u64, ExtentState)> {
    let (mut runs, mut at) = (Vec::new(), 0);
    while at < image.size() {
        let range = GuestRange::between(GuestOffset::new(at), GuestOffset::new(image.size()));
        let extent = image.extent_at(range).unwrap();
        at += extent.len;
        runs.push((extent.len, extent.state));
    }
    runs
}

/// The largest disk in clusters of 512 bytes.
const LARGEST: u64 = 1 << 37;

#[test]
fn a_snapshot_of_an_impossible_disk_size_is_refused() {
    let storage = new_image(512, 1 << 20);
    let image = open(&storage);
    image.write_at(GuestOffset::new(0), &[1; 512]).unwrap();
    image.create_snapshot(&Default::default()).unwrap();
    image.close().unwrap();
    let size_field = HostOffset::new(image.header().snapshots_offset.value() + 48);
    let snapshot = |size: u64| {
        storage.write_at(size_field, &size.to_be_bytes()).unwrap();
        Image::open_snapshot(source(&storage), &OpenOptions::default(), |_| Some(0))
    };
    for size in [LARGEST + 512, 1 << 60, 1 << 62, u64::MAX - 511, u64::MAX] {
        let error = snapshot(size).err().unwrap_or_else(|| panic!("a disk of {size} bytes"));
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(error.to_string(), format!("snapshot's disk of {size} bytes is too large"));
    }
    // The largest size: the snapshot's L1 table is much shorter, and everything past it is unallocated.
    let old = snapshot(LARGEST).unwrap();
    assert_eq!(old.size(), LARGEST);
    let runs = extents(&old);
    assert!(runs.len() <= 5, "{runs:?}");
    assert_eq!(runs.last().map(|run| run.1), Some(ExtentState::Unallocated));
    let mut byte = [9];
    old.read_at(GuestOffset::new(LARGEST - 1), &mut byte).unwrap();
    assert_eq!(byte, [0]);
}

/// An empty L1 table of four million entries is a few runs; so is one with a single entry.
#[test]
fn large_empty_l1_tables_are_a_few_runs() {
    let size = (2 << 20) * ((2 << 20) / 8) * (4 << 20) - (2 << 20);
    let image = open(&new_image(2 << 20, size));
    assert!(extents(&image).len() <= 64);
    let middle = size / 2 - 12_345;
    image.write_at(GuestOffset::new(middle), &[1]).unwrap();
    let runs = extents(&image);
    let data: Vec<_> = runs.iter().filter(|run| run.1 != ExtentState::Unallocated).collect();
    assert!(matches!(data[..], [(len, ExtentState::Data { .. })] if *len == 2 << 20), "{data:?}");
    let first = runs.iter().take_while(|run| run.1 == ExtentState::Unallocated).map(|run| run.0).sum::<u64>();
    assert_eq!(first, middle - middle % (2 << 20));
    // The only L2 table gives one run for each of its pages.
    assert!(runs.len() <= 64 + 520, "{}", runs.len());
}

/// Shrinking can be stopped, and leaves a size between the old and the new one.
#[test]
fn shrinking_can_be_stopped_in_between() {
    const GIB: u64 = 1 << 30;
    for asked in [0, 1, 5, 15, 16, 100] {
        let storage = new_image(512, 2 * GIB + 1024);
        let image = open(&storage);
        let places = [0, GIB / 2, GIB + 512, 2 * GIB - 4096, 2 * GIB + 512];
        places.iter().for_each(|&at| image.write_at(GuestOffset::new(at), &[7; 512]).unwrap());
        image.add_bitmap(b"changes", 9).unwrap();
        let mut left = asked;
        let mut go_on = || {
            left -= 1;
            if left < 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let wanted = GIB / 4 + 512;
        let resized = image.resize_while(wanted, &mut go_on);
        // 2^18 clusters of 512 bytes are 128 MiB.
        let size = match asked {
            0 => 2 * GIB + 1024,
            1..=14 => 2 * GIB - (asked as u64 - 1) * (GIB / 8),
            _ => wanted,
        };
        assert_eq!(image.size(), size, "{asked}");
        match resized {
            Ok(()) => assert_eq!(size, wanted),
            Err(error) => assert_eq!((error.kind(), size > wanted), (ErrorKind::Stopped, true)),
        }
        image.close().unwrap();
        let found = audit(&storage.bytes(), None);
        assert!(found.is_sound() && found.leaks == 0, "{asked}: {found:?}");
        let image = open(&storage);
        assert_eq!((image.size(), image.bitmap_bits(b"changes").unwrap().size()), (size, size));
        for at in places.into_iter().filter(|at| *at < size) {
            let mut seen = [0; 512];
            image.read_at(GuestOffset::new(at), &mut seen).unwrap();
            assert_eq!(seen, [7; 512], "{asked}: byte {at}");
        }
        image.resize(2 * GIB).unwrap();
        let mut seen = [1; 512];
        image.read_at(GuestOffset::new(2 * GIB - 4096), &mut seen).unwrap();
        assert_eq!(seen == [0; 512], size <= 2 * GIB - 4096, "{asked}");
    }
}
