//! Closing a disk, dropping it, and dropping it when closing fails.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Folder, assert_clean, pattern};
use qcow2_image::core::{ResolvedSource, Storage};
use qcow2_image::io::MemoryStorage;
use qcow2_image::{Disk, ErrorKind, ImageFormat, NewDisk};
use qcow2_testkit::fault::{CHANGING_CALLS, Fault, FaultPlan, FaultStorage};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

#[test]
fn dropping_a_disk_closes_it() {
    let folder = Folder::new();
    let path = folder.path("disk.qcow2");
    let disk = Disk::create(&path, 4 * MIB).unwrap();
    disk.add_bitmap("since").unwrap();
    disk.write_at(MIB, &pattern(100_000, 3)).unwrap();
    disk.discard(MIB..MIB + 65_536).unwrap();
    drop(disk);
    assert_clean(&path);
    let disk = Disk::open(&path).unwrap();
    let mut bytes = vec![0; 34_464];
    disk.read_at(MIB + 65_536, &mut bytes).unwrap();
    assert!(bytes == pattern(100_000, 3)[65_536..]);
    assert_eq!(disk.bitmap("since").unwrap().marked_ranges().count(), 1);
}

#[test]
fn dropping_a_raw_disk_flushes_it() {
    let folder = Folder::new();
    let disk = NewDisk::raw().size(MIB).create(folder.path("disk.raw")).unwrap();
    disk.write_at(0, b"raw").unwrap();
    drop(disk);
    assert_eq!(std::fs::read(folder.path("disk.raw")).unwrap()[..4], *b"raw\0");
}

#[test]
fn dropping_after_the_image_was_closed_is_silent() {
    let folder = Folder::new();
    let disk = Disk::create(folder.path("disk.qcow2"), MIB).unwrap();
    disk.as_image().unwrap().close().unwrap();
    assert_eq!(disk.write_at(0, b"late").unwrap_err().kind(), ErrorKind::Poisoned);
    drop(disk);
}

/// A disk on a storage with injectable faults.
fn on_faulty_storage() -> (Disk, Arc<FaultStorage>) {
    let folder = Folder::new();
    Disk::create(folder.path("disk.qcow2"), 4 * MIB).unwrap().close().unwrap();
    let bytes = std::fs::read(folder.path("disk.qcow2")).unwrap();
    let storage = Arc::new(FaultStorage::new(Arc::new(MemoryStorage::from(bytes))));
    let source = ResolvedSource::new(Arc::clone(&storage) as Arc<dyn Storage>, ImageFormat::Qcow2, "memory");
    (Disk::options().writable().open_source(source).unwrap(), storage)
}

fn fail_from_now_on(storage: &FaultStorage) {
    let calls = CHANGING_CALLS.to_vec();
    storage.set_plan(Some(FaultPlan { calls, nth: 0, sticky: true, fault: Fault::Io }));
}

#[test]
fn unreported_error_on_drop_panics_in_debug_builds() {
    let (disk, storage) = on_faulty_storage();
    disk.write_at(0, b"written, and never durable").unwrap();
    // A refused request does not count as reporting the error.
    assert_eq!(disk.write_at(u64::MAX, b"x").unwrap_err().kind(), ErrorKind::OutOfRange);
    fail_from_now_on(&storage);
    let dropped = catch_unwind(AssertUnwindSafe(|| drop(disk)));
    assert_eq!(dropped.is_err(), cfg!(debug_assertions));

    let (disk, storage) = on_faulty_storage();
    disk.write_at(0, b"written, and never durable").unwrap();
    fail_from_now_on(&storage);
    assert_eq!(disk.close().unwrap_err().kind(), ErrorKind::Io, "close reports it");
}

#[test]
fn reported_error_does_not_panic_on_drop() {
    let (disk, storage) = on_faulty_storage();
    fail_from_now_on(&storage);
    assert_eq!(disk.write_at(0, b"never written").unwrap_err().kind(), ErrorKind::Io);
    drop(disk);
}

#[test]
fn drop_during_unwinding_does_not_panic() {
    let (disk, storage) = on_faulty_storage();
    disk.write_at(0, b"written, and never durable").unwrap();
    let panic = catch_unwind(AssertUnwindSafe(|| {
        let _disk = disk;
        fail_from_now_on(&storage);
        panic!("the first");
    }));
    assert_eq!(panic.unwrap_err().downcast_ref::<&str>(), Some(&"the first"));
}
