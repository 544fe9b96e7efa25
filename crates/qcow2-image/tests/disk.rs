//! Operations on an open disk, and the errors of those that fail.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Folder, assert_clean, content, pattern};
use qcow2_image::{
    BitmapAction, Comparison, CreateOptions, Disk, ErrorKind, ImageFormat, Locking, NewDisk, Preallocation,
};
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;

#[track_caller]
fn check<T: std::fmt::Debug>(result: qcow2_image::Result<T>, kind: ErrorKind) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error:#}");
}

#[test]
fn several_threads_share_a_disk() {
    fn shared<T: Send + Sync>() {}
    shared::<Disk>();
    shared::<qcow2_image::DiskOptions>();
    shared::<qcow2_image::Error>();
    let folder = Folder::new();
    let disk = Disk::create(folder.path("disk.qcow2"), 16 * MIB).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let disk = &disk;
            scope.spawn(move || disk.write_at(thread * 4 * MIB + 100, &pattern(MIB as usize, thread as u8)));
        }
    });
    for thread in 0..4 {
        let mut bytes = vec![0; MIB as usize];
        disk.read_at(thread * 4 * MIB + 100, &mut bytes).unwrap();
        assert!(bytes == pattern(MIB as usize, thread as u8));
    }
    disk.close().unwrap();
    assert_clean(&folder.path("disk.qcow2"));
}

#[test]
fn zero_discard_and_resize() {
    let folder = Folder::new();
    let path = folder.path("disk.qcow2");
    let disk = Disk::create(&path, 4 * MIB).unwrap();
    let mut bytes = pattern(4 * MIB as usize, 4);
    disk.write_at(0, &bytes).unwrap();
    disk.write_zeroes(100..200_000).unwrap();
    bytes[100..200_000].fill(0);
    disk.discard(MIB..2 * MIB).unwrap();
    bytes[MIB as usize..2 * MIB as usize].fill(0);
    assert!(content(&disk) == bytes);
    disk.resize(5 * MIB).unwrap();
    bytes.resize(5 * MIB as usize, 0);
    assert!(content(&disk) == bytes);
    check(disk.resize(3 * MIB), ErrorKind::InvalidOption);
    check(disk.resize(6 * MIB + 1), ErrorKind::InvalidOption);
    disk.shrink(3 * MIB).unwrap();
    assert!(content(&disk) == bytes[..3 * MIB as usize]);
    check(disk.read_at(3 * MIB - 1, &mut [0; 2]), ErrorKind::OutOfRange);
    check(disk.write_at(u64::MAX, &[0; 2]), ErrorKind::OutOfRange);
    check(disk.discard(0..u64::MAX), ErrorKind::OutOfRange);
    disk.close().unwrap();
    assert_clean(&path);
}

#[test]
fn missing_existing_and_locked_files_are_refused() {
    let folder = Folder::new();
    let path = folder.path("disk.qcow2");
    check(Disk::open(&path), ErrorKind::NotFound);
    check(Disk::open(folder.path("")), ErrorKind::Unsupported);
    let disk = Disk::create(&path, MIB).unwrap();
    check(Disk::create(&path, MIB), ErrorKind::Exists);
    if cfg!(target_os = "linux") {
        check(Disk::open(&path), ErrorKind::InUse);
        check(NewDisk::qcow2().size(MIB).overwrite().create(&path), ErrorKind::InUse);
        Disk::options().locking(Locking::Shared).open(&path).unwrap();
    }
    disk.write_at(0, b"still there").unwrap();
    disk.close().unwrap();
    let disk = Disk::open(&path).unwrap();
    check(disk.write_at(0, b"x"), ErrorKind::ReadOnly);
    check(disk.create_snapshot("x"), ErrorKind::ReadOnly);
    assert_eq!(disk.path(), path);
    drop(disk);
    NewDisk::qcow2().size(2 * MIB).overwrite().create(&path).unwrap().close().unwrap();
    assert!(content(&Disk::open(&path).unwrap()) == vec![0; 2 * MIB as usize]);
}

#[test]
fn invalid_requests_create_no_files() {
    let folder = Folder::new();
    let path = folder.path("disk");
    for new in [
        NewDisk::qcow2(),
        NewDisk::qcow2().size(MIB).cluster_size(1000),
        NewDisk::qcow2().size(u64::MAX),
        NewDisk::qcow2().size(MIB).with(|new| new.refcount_bits = 3),
        NewDisk::qcow2().size(MIB).backing_file("a\0b", ImageFormat::Raw),
        NewDisk::raw().size(MIB).cluster_size(4096),
        NewDisk::raw().size(MIB).password("x"),
        NewDisk::raw().size(MIB).preallocation(Preallocation::Metadata),
        NewDisk::raw().size(MIB).data_file("data"),
    ] {
        check(new.create(&path), ErrorKind::InvalidOption);
    }
    let missing = NewDisk::qcow2().backing_file("none.raw", ImageFormat::Raw);
    check(missing.create(&path), ErrorKind::NotFound);
    let into_itself = NewDisk::qcow2().size(MIB).data_file("disk");
    check(into_itself.clone().create(&path), ErrorKind::Exists);
    check(into_itself.overwrite().create(&path), ErrorKind::InUse);
    // Encryption without a key is an error, not silently dropped.
    let aes = |new: &mut CreateOptions| new.encryption = Some(qcow2_image::core::NewEncryption::Aes);
    check(NewDisk::qcow2().size(MIB).with(aes).create(&path), ErrorKind::Password);
    assert_eq!(std::fs::read_dir(folder.path("")).unwrap().count(), 0);
}

#[test]
fn overlay_does_not_overwrite_its_backing_file() {
    let folder = Folder::new();
    let path = folder.path("disk.qcow2");
    let disk = Disk::create(&path, MIB).unwrap();
    disk.write_at(0, b"precious").unwrap();
    disk.close().unwrap();
    let new = NewDisk::qcow2().backing_file("disk.qcow2", ImageFormat::Qcow2).overwrite();
    check(new.create(&path), ErrorKind::InUse);
    assert_eq!(content(&Disk::open(&path).unwrap())[..8], *b"precious");
}

#[test]
fn snapshots_are_created_read_applied_and_deleted() {
    let folder = Folder::new();
    let path = folder.path("disk.qcow2");
    let disk = Disk::create(&path, 4 * MIB).unwrap();
    disk.write_at(0, b"before").unwrap();
    let taken = disk.create_snapshot("first").unwrap();
    assert_eq!((taken.id_text(), taken.name_text()), ("1".into(), "first".into()));
    disk.write_at(0, b"after ").unwrap();

    let first = disk.open_snapshot("first").unwrap();
    disk.write_at(2, b"TER").unwrap();
    assert_eq!(content(&first)[..6], *b"before");
    check(first.write_at(0, b"x"), ErrorKind::ReadOnly);
    check(disk.delete_snapshot("first"), ErrorKind::InUse);
    check(disk.open_snapshot("second"), ErrorKind::NotFound);
    assert_eq!(content(&disk)[..6], *b"afTER ");
    drop(first);

    disk.apply_snapshot("1").unwrap();
    assert_eq!(content(&disk)[..6], *b"before");
    disk.close().unwrap();
    let first = Disk::options().open_snapshot(&path, "first").unwrap();
    assert_eq!(content(&first)[..6], *b"before");
    drop(first);
    let disk = Disk::options().writable().open(&path).unwrap();
    disk.delete_snapshot("first").unwrap();
    assert!(disk.snapshots().unwrap().is_empty());
    check(disk.delete_snapshot("first"), ErrorKind::NotFound);
    disk.close().unwrap();
    assert_clean(&path);
}

#[test]
fn bitmaps_record_writes() {
    let folder = Folder::new();
    let path = folder.path("disk.qcow2");
    let disk = Disk::create(&path, 4 * MIB).unwrap();
    disk.add_bitmap("backup").unwrap();
    check(disk.add_bitmap("backup"), ErrorKind::Exists);
    check(disk.bitmap("other"), ErrorKind::NotFound);
    disk.write_at(MIB + 5, b"x").unwrap();
    disk.close().unwrap();

    let disk = Disk::options().writable().open(&path).unwrap();
    assert_eq!(disk.bitmaps().unwrap(), ["backup"]);
    disk.write_at(2 * MIB, &pattern(65_537, 0)).unwrap();
    let bitmap = disk.bitmap("backup").unwrap();
    let marked: Vec<_> = bitmap.marked_ranges().collect();
    assert_eq!(marked, [MIB..MIB + 65_536, 2 * MIB..2 * MIB + 131_072]);
    assert!(bitmap.is_marked(MIB) && !bitmap.is_marked(0) && bitmap.granularity() == 65_536);
    disk.change_bitmap("fine", &BitmapAction::Add { granularity: Some(512) }).unwrap();
    disk.change_bitmap("fine", &BitmapAction::Merge { source: "backup".into() }).unwrap();
    assert_eq!(disk.bitmap("fine").unwrap().marked_ranges().collect::<Vec<_>>(), marked);
    disk.clear_bitmap("backup").unwrap();
    assert_eq!(disk.bitmap("backup").unwrap().marked_ranges().count(), 0);
    disk.remove_bitmap("backup").unwrap();
    disk.close().unwrap();
    assert_eq!(Disk::open(&path).unwrap().bitmaps().unwrap(), ["fine"]);
    assert_clean(&path);
}

#[test]
fn conversions_report_progress_and_stop() {
    let folder = Folder::new();
    let disk = Disk::create(folder.path("disk.qcow2"), 64 * MIB).unwrap();
    disk.write_at(0, &pattern(20 * MIB as usize, 1)).unwrap();
    let (calls, last) = (AtomicU64::new(0), AtomicU64::new(0));
    let convert = disk.convert().threads(3).progress(|work| {
        // What is to be copied; the rest is a hole.
        assert_eq!(work.total, 20 * MIB);
        calls.fetch_add(1, Ordering::Relaxed);
        last.fetch_max(work.done, Ordering::Relaxed);
    });
    convert.to(folder.path("disk.raw"), &NewDisk::raw()).unwrap();
    assert!(calls.into_inner() > 10);
    assert_eq!(last.into_inner(), 20 * MIB);
    let raw = Disk::options().format(ImageFormat::Raw).writable().open(folder.path("disk.raw")).unwrap();
    assert_eq!(disk.compare(&raw).unwrap(), Comparison::Identical);
    raw.write_at(3 * MIB + 700, b"x").unwrap();
    assert_eq!(disk.compare(&raw).unwrap(), Comparison::Content { offset: 3 * MIB + 512 });
    raw.write_at(40 * MIB, b"unallocated in the other").unwrap();
    disk.convert().onto(&raw).unwrap();
    assert_eq!(disk.checksum().unwrap(), raw.checksum().unwrap());

    let stop = AtomicBool::new(true);
    check(disk.convert().stop_on(&stop).to(folder.path("new"), &NewDisk::qcow2()), ErrorKind::Stopped);
    assert!(!folder.path("new").exists(), "an incomplete image is deleted");
    std::fs::write(folder.path("old"), b"something").unwrap();
    let new = NewDisk::qcow2().overwrite();
    check(disk.convert().stop_on(&stop).to(folder.path("old"), &new), ErrorKind::Stopped);
    assert_eq!(std::fs::metadata(folder.path("old")).unwrap().len(), 0);
}

#[test]
fn conversion_does_not_overwrite_its_source() {
    let folder = Folder::new();
    let path = folder.path("disk.raw");
    std::fs::write(&path, vec![7; MIB as usize]).unwrap();
    let disk = Disk::options().format(ImageFormat::Raw).open(&path).unwrap();
    check(disk.convert().to(&path, &NewDisk::qcow2().overwrite()), ErrorKind::InUse);
    assert!(std::fs::read(&path).unwrap() == vec![7; MIB as usize]);
    check(disk.convert().compress().to(folder.path("x"), &NewDisk::raw()), ErrorKind::Unsupported);
    check(disk.convert().to(folder.path("x"), &NewDisk::raw().size(512)), ErrorKind::InvalidOption);
    assert!(!folder.path("x").exists());
}

#[test]
fn cursor_stops_at_the_end_of_the_disk() {
    let folder = Folder::new();
    let disk = Disk::create(folder.path("disk.qcow2"), MIB).unwrap();
    let mut cursor = disk.cursor();
    assert_eq!(cursor.seek(SeekFrom::End(-3)).unwrap(), MIB - 3);
    assert_eq!(cursor.write(b"hello").unwrap(), 3);
    assert_eq!(cursor.write(b"lo").unwrap(), 0);
    assert_eq!(cursor.read(&mut [0; 5]).unwrap(), 0);
    cursor.seek(SeekFrom::Current(-3)).unwrap();
    let mut text = Vec::new();
    cursor.read_to_end(&mut text).unwrap();
    assert_eq!(text, b"hel");
    cursor.seek(SeekFrom::Start(2 * MIB)).unwrap();
    assert_eq!(cursor.read(&mut [0; 5]).unwrap(), 0, "nothing to read past the end");
    assert!(cursor.seek(SeekFrom::End(-2 * MIB as i64)).is_err());
    cursor.flush().unwrap();
}

#[test]
fn leaks_are_found_and_repaired() {
    let folder = Folder::new();
    let encrypted = NewDisk::qcow2().password("not asked for").unlock_time(Duration::from_millis(5));
    for (name, new) in [("plain", NewDisk::qcow2()), ("encrypted", encrypted)] {
        let path = folder.path(name);
        let disk = new.size(4 * MIB).create(&path).unwrap();
        disk.write_at(0, &pattern(300_000, 1)).unwrap();
        let bytes = content(&disk);
        disk.close().unwrap();
        let mut file = std::fs::read(&path).unwrap();
        // The header's refcount is the first one in the first block. Raise it from 1 to 2.
        let block = 2 * 65_536;
        file[block..block + 2].copy_from_slice(&2u16.to_be_bytes());
        std::fs::write(&path, file).unwrap();
        assert_eq!(qcow2_image::check(&path).unwrap().leaks, 1);
        let (report, repaired) = qcow2_image::repair(&path).unwrap();
        assert_eq!((report.leaks, repaired.leaks_fixed), (1, 1));
        assert_clean(&path);
        assert!(content(&Disk::options().password("not asked for").open(&path).unwrap()) == bytes);
    }
    std::fs::write(folder.path("none"), b"no image").unwrap();
    check(qcow2_image::check(folder.path("none")), ErrorKind::NotAnImage);
    check(qcow2_image::repair(folder.path("none")), ErrorKind::NotAnImage);
}
