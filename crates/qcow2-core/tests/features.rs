//! Feature bits that this engine does not know: I6 and I7 of the architecture.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::{
    CreateOptions, ErrorKind, GuestOffset, HostOffset, Image, ImageFormat, NoResolver, OpenOptions,
    ResolvedSource, Storage, create,
};
use qcow2_testkit::crash::{CrashStorage, CrashWorld};
use qcow2_testkit::pages::PageBytes;
use std::sync::Arc;

const INCOMPATIBLE: u64 = 72;
const COMPATIBLE: u64 = 80;
const AUTOCLEAR: u64 = 88;
const BITMAPS: u64 = 1;

fn open(storage: &Arc<CrashStorage>, writable: bool) -> qcow2_core::Result<Arc<Image>> {
    let mut options = OpenOptions::default();
    options.writable = writable;
    let source = ResolvedSource {
        storage: Arc::clone(storage) as Arc<dyn Storage>,
        format: ImageFormat::Qcow2,
        name: "image".to_owned(),
        id: None,
        resolver: Arc::new(NoResolver),
    };
    Image::open(source, &options)
}

/// An image with data and a bitmap, with `bits` set in the header word at `at`. All of it is durable.
fn image(at: u64, bits: u64) -> (Arc<CrashWorld>, Arc<CrashStorage>) {
    let world = CrashWorld::new();
    let storage = world.add(PageBytes::new());
    create(&(Arc::clone(&storage) as Arc<dyn Storage>), None, &CreateOptions::new(1 << 20)).unwrap();
    let image = open(&storage, true).unwrap();
    image.add_bitmap(b"b", 16).unwrap();
    image.write_at(GuestOffset::new(0), &[7; 512]).unwrap();
    image.close().unwrap();
    let word = word(&storage.live(), at) | bits;
    storage.write_at(HostOffset::new(at), &word.to_be_bytes()).unwrap();
    storage.flush().unwrap();
    (world, storage)
}

fn word(bytes: &PageBytes, at: u64) -> u64 {
    let mut word = [0; 8];
    bytes.read(at, &mut word);
    u64::from_be_bytes(word)
}

fn unknown_bits(first: u32) -> impl Iterator<Item = u64> {
    [first, 17, 40, 63].into_iter().map(|bit| 1 << bit).chain([1 << 63 | 1 << 17])
}

#[test]
fn unknown_autoclear_bits_are_cleared_before_the_first_change() {
    for bits in unknown_bits(2) {
        let (world, storage) = image(AUTOCLEAR, bits);
        assert_eq!(word(&storage.live(), AUTOCLEAR), bits | BITMAPS);
        let before = storage.live().to_vec();
        let reader = open(&storage, false).unwrap();
        reader.read_at(GuestOffset::new(0), &mut [9; 512]).unwrap();
        reader.close().unwrap();
        assert!(storage.live().to_vec() == before, "reading changes nothing");

        let writer = open(&storage, true).unwrap();
        let durable = world.cut(|cut| cut.nothing());
        assert_eq!(
            word(&durable.disks[0], AUTOCLEAR),
            BITMAPS,
            "what is known stays, the rest is gone for good"
        );
        writer.write_at(GuestOffset::new(0), &[8; 512]).unwrap();
        writer.close().unwrap();
        assert_eq!(word(&storage.live(), AUTOCLEAR), BITMAPS);
        assert_eq!(open(&storage, false).unwrap().bitmaps().unwrap().len(), 1);
    }
}

#[test]
fn unknown_incompatible_bits_stop_the_open() {
    for bits in unknown_bits(5) {
        let (_, storage) = image(INCOMPATIBLE, bits);
        let before = storage.live().to_vec();
        for writable in [false, true] {
            let error = open(&storage, writable).map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Format, "{bits:#x}");
        }
        assert!(storage.live().to_vec() == before);
    }
}

#[test]
fn unknown_compatible_bits_are_kept() {
    for bits in unknown_bits(1) {
        let (_, storage) = image(COMPATIBLE, bits);
        let image = open(&storage, true).unwrap();
        image.write_at(GuestOffset::new(0), &[8; 512]).unwrap();
        image.resize(2 << 20).unwrap();
        image.close().unwrap();
        assert_eq!(word(&storage.live(), COMPATIBLE), bits);
    }
}
