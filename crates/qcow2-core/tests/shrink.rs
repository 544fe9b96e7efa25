//! Power cuts while a disk with several L2 tables and refcount blocks shrinks and its file gets shorter.
#![allow(missing_docs, clippy::unwrap_used, clippy::field_reassign_with_default)]

use qcow2_core::{
    CreateOptions, GuestOffset, Image, ImageFormat, NoResolver, OpenOptions, ResolvedSource, Storage, create,
};
use qcow2_testkit::audit::audit;
use qcow2_testkit::crash::CrashWorld;
use qcow2_testkit::cut::{CrashImage, Cut};
use qcow2_testkit::pages::PageBytes;
use qcow2_testkit::pattern;
use qcow2_testkit::rng::Rng;
use std::sync::{Arc, Mutex};

/// An L2 table maps 32 KiB, a refcount block counts 32 KiB.
const CLUSTER: u64 = 512;
const SIZE: u64 = 256 << 10;
const SEED: u64 = 5;

fn open(storage: Arc<dyn Storage>, writable: bool) -> Arc<Image> {
    let (format, resolver) = (ImageFormat::Qcow2, Arc::new(NoResolver));
    let source = ResolvedSource { storage, format, name: "image".into(), id: None, resolver };
    let mut options = OpenOptions::default();
    options.writable = writable;
    options.discard_freed = true;
    Image::open(source, &options).unwrap()
}

/// The disk has its old size or the new one, the bytes up to `kept` are right, and no table is outside.
fn judge(image: &CrashImage, kept: u64, sizes: [u64; 2]) {
    let found = audit(&image.disks[0], None);
    assert!(found.is_sound(), "{found:?}");
    let disk = open(image.storage(0), false);
    assert!(sizes.contains(&disk.size()), "{}", disk.size());
    let mut seen = vec![0; kept as usize];
    disk.read_at(GuestOffset::new(0), &mut seen).unwrap();
    assert!(seen == pattern::bytes(SEED, 0, kept as usize), "bytes that are kept have changed");
}

#[track_caller]
fn check(written: u64, kept: u64, expected: u64) {
    let world = CrashWorld::new();
    let storage = world.add(PageBytes::new());
    let options = CreateOptions::new(SIZE).with_cluster_size(CLUSTER).with_refcount_bits(64);
    create(&(Arc::clone(&storage) as Arc<dyn Storage>), None, &options).unwrap();
    let image = open(storage.clone(), true);
    image.write_at(GuestOffset::new(0), &pattern::bytes(SEED, 0, written as usize)).unwrap();
    image.flush().unwrap();
    let before = storage.live().len();
    let rng = Mutex::new(Rng::new(1));
    world.set_hook(Some(Arc::new(move |_, cut: &Cut<'_>| {
        let mut rng = rng.lock().unwrap();
        let samples = (0..12).map(|_| cut.sample(&mut rng)).collect::<Vec<_>>();
        samples
            .iter()
            .chain([&cut.everything(), &cut.nothing()])
            .for_each(|cut| judge(cut, kept, [SIZE, kept]));
    })));
    image.resize(kept).unwrap();
    world.set_hook(None);
    let after = storage.live().len();
    assert!(after == expected && expected < before, "{after} of {before} bytes are left");
    // What was dropped is there again when it is needed.
    image.resize(SIZE).unwrap();
    image.write_at(GuestOffset::new(0), &pattern::bytes(SEED, 0, SIZE as usize)).unwrap();
    image.close().unwrap();
    judge(&CrashImage { disks: vec![storage.live()] }, SIZE, [SIZE; 2]);
}

#[test]
fn a_power_cut_while_a_full_disk_shrinks_loses_and_shares_nothing() {
    check(SIZE, CLUSTER, 3072);
    check(SIZE, 40 << 10, 44_544);
    check(SIZE / 2, 40 << 10, 44_544);
}
