//! Images with the dirty bit set: opening for writing makes their refcounts exact.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::{
    CreateOptions, GuestOffset, HostOffset, Image, ImageFormat, NoResolver, OpenOptions, ResolvedSource,
    Storage, create,
};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::CrashWorld;
use qcow2_testkit::cut::Cut;
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use qcow2_testkit::storage::PageStorage;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

fn open<S: Storage + 'static>(storage: &Arc<S>, writable: bool) -> Arc<Image> {
    let source = ResolvedSource {
        storage: Arc::clone(storage) as Arc<dyn Storage>,
        format: ImageFormat::Qcow2,
        name: "pages".into(),
        id: None,
        resolver: Arc::new(NoResolver),
    };
    let mut options = OpenOptions::default();
    options.writable = writable;
    Image::open(source, &options).unwrap()
}

/// An image with data and the dirty bit set, after `spoil` has damaged its refcount structure; and the data.
fn spoilt(
    cluster_size: u64,
    refcount_bits: u64,
    spoil: impl Fn(&PageStorage, &qcow2_core::format::Header),
) -> (Arc<PageStorage>, Vec<u8>) {
    let storage = Arc::new(PageStorage::new(PageBytes::new()));
    let mut options = CreateOptions::new(4 << 20);
    options.cluster_size = cluster_size;
    options.refcount_bits = refcount_bits;
    create(&(Arc::clone(&storage) as Arc<dyn Storage>), None, &options).unwrap();
    let image = open(&storage, true);
    let data: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8 + 1).collect();
    image.write_at(GuestOffset::new(12_345), &data).unwrap();
    image.close().unwrap();
    let header = image.header();
    storage.write_at(HostOffset::new(72), &1u64.to_be_bytes()).unwrap();
    spoil(&storage, &header);
    (storage, data)
}

/// Opens the image for writing: it must be clean and its refcounts exact. A power cut during that must leave
/// it dirty or exact.
#[track_caller]
fn check(cluster_size: u64, refcount_bits: u64, spoil: impl Fn(&PageStorage, &qcow2_core::format::Header)) {
    let (storage, data) = spoilt(cluster_size, refcount_bits, spoil);
    let what = format!("{cluster_size} {refcount_bits}");
    check_power_cuts(&storage, &what);
    let reader = open(&storage, false);
    assert!(reader.header().is_dirty(), "opening for reading changes nothing");
    let image = open(&storage, true);
    assert!(!image.header().is_dirty());
    let mut seen = pattern::unread(data.len());
    image.read_at(GuestOffset::new(12_345), &mut seen).unwrap();
    assert!(seen == data);
    image.write_at(GuestOffset::new(2_000_000), &data).unwrap();
    image.close().unwrap();
    let audit = audit(&storage.bytes(), None);
    assert!(audit.is_sound() && audit.leaks == 0 && !audit.dirty, "{what}: {audit:?}");
}

/// Opens a copy for writing, with a power cut at every step.
#[track_caller]
fn check_power_cuts(storage: &PageStorage, what: &str) {
    let world = CrashWorld::new();
    let copy = world.add(storage.bytes());
    let marked = Arc::new(AtomicU64::new(0));
    let (seen, what) = (Arc::clone(&marked), what.to_owned());
    let rng = Mutex::new(Rng::new(7));
    world.set_hook(Some(Arc::new(move |event, cut: &Cut<'_>| {
        let mut rng = rng.lock().unwrap();
        let images = [cut.nothing(), cut.everything(), cut.sample(&mut rng), cut.sample(&mut rng)];
        for image in images {
            let audit = audit(&image.disks[0], None);
            assert!(audit.dirty || audit.is_sound(), "{what}, {event:?}: {audit:?}");
            seen.fetch_add(u64::from(audit.dirty), Ordering::Relaxed);
        }
    })));
    assert!(!open(&copy, true).header().is_dirty());
    assert!(marked.load(Ordering::Relaxed) > 0, "the image was marked on the way");
}

fn block(storage: &PageStorage, header: &qcow2_core::format::Header, index: u64) -> HostOffset {
    let mut raw = [0; 8];
    storage.read_at(HostOffset::new(header.refcount_table_offset.value() + index * 8), &mut raw).unwrap();
    HostOffset::new(u64::from_be_bytes(raw))
}

const SHAPES: [(u64, u64); 4] = [(512, 16), (4096, 1), (65536, 16), (65536, 64)];

#[test]
fn refcounts_too_low_or_too_high_are_corrected() {
    for (cluster_size, refcount_bits) in SHAPES {
        for byte in [0, 0xff] {
            check(cluster_size, refcount_bits, |storage, header| {
                let at = block(storage, header, 0);
                storage.write_at(at, &vec![byte; cluster_size as usize]).unwrap();
            });
        }
    }
}

#[test]
fn missing_refcount_blocks_cause_a_rebuild() {
    for (cluster_size, refcount_bits) in SHAPES {
        check(cluster_size, refcount_bits, |storage, header| {
            storage.write_at(header.refcount_table_offset, &vec![0; cluster_size as usize]).unwrap();
        });
    }
}

#[test]
fn a_damaged_refcount_table_causes_a_rebuild() {
    for (cluster_size, refcount_bits) in SHAPES {
        check(cluster_size, refcount_bits, |storage, header| {
            storage.write_at(header.refcount_table_offset, &[0x12; 8]).unwrap();
        });
    }
}

/// Two million L1 entries that all point to one full L2 table: reading it for each would be 128 GiB.
#[test]
fn an_l2_table_with_many_references_is_read_once() {
    const TABLES: u64 = 2 << 20;
    let storage = Arc::new(PageStorage::new(PageBytes::new()));
    let mut options = CreateOptions::new(TABLES << 29);
    options.refcount_bits = 64;
    create(&(Arc::clone(&storage) as Arc<dyn Storage>), None, &options).unwrap();
    let image = open(&storage, true);
    image.write_at(GuestOffset::new(0), &[7; 65536]).unwrap();
    image.close().unwrap();
    let l1 = image.header().l1_table_offset;
    let mut entry = [0; 8];
    storage.read_at(l1, &mut entry).unwrap();
    storage.write_at(l1, &entry.repeat(TABLES as usize)).unwrap();
    let table = HostOffset::new(u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00);
    storage.read_at(table, &mut entry).unwrap();
    storage.write_at(table, &entry.repeat(8192)).unwrap();
    storage.write_at(HostOffset::new(72), &1u64.to_be_bytes()).unwrap();

    let image = open(&storage, true);
    assert!(!image.header().is_dirty());
    let mut counts = [0; 8];
    let data = u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00;
    let at = block(&storage, &image.header(), 0).value() + data / 65536 * 8;
    storage.read_at(HostOffset::new(at), &mut counts).unwrap();
    assert_eq!(u64::from_be_bytes(counts), TABLES * 8192);
}
