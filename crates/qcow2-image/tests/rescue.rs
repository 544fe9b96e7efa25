//! Rescues of damaged images, with what belongs to them: a password, a backing file, a data file.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Folder, content, pattern};
use qcow2_image::{Disk, ErrorKind, ImageFormat, NewDisk, Policy};
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const CLUSTER: usize = 64 << 10;

/// Zeroes `len` bytes of the file.
fn damage(path: &Path, at: usize, len: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at..at + len].fill(0);
    fs::write(path, bytes).unwrap();
}

/// Where the L1 table is.
fn l1_of(path: &Path) -> usize {
    u64::from_be_bytes(fs::read(path).unwrap()[40..48].try_into().unwrap()) as usize
}

/// Bytes in the first half of a disk of 4 MiB.
fn fill(disk: &Disk) -> Vec<u8> {
    let mut bytes = pattern(2 * MIB as usize, 3);
    disk.write_at(0, &bytes).unwrap();
    bytes.resize(4 * MIB as usize, 0);
    bytes
}

#[test]
fn an_image_without_header_and_l1_table_is_copied() {
    let folder = Folder::new();
    let path = folder.path("disk.qcow2");
    let disk = Disk::create(&path, 4 * MIB).unwrap();
    let bytes = fill(&disk);
    disk.close().unwrap();
    damage(&path, l1_of(&path), 512);
    damage(&path, 0, CLUSTER);
    let before = fs::read(&path).unwrap();
    assert_eq!(Disk::open(&path).unwrap_err().kind(), ErrorKind::NotAnImage);
    let rescued = Disk::rescue().size(4 * MIB).open(&path).unwrap();
    assert!(content(rescued.disk()) == bytes);
    assert!(!rescued.report().is_complete() && rescued.report().lost.bytes == 0, "{}", rescued.report());
    assert_eq!(rescued.disk().write_at(0, b"x").unwrap_err().kind(), ErrorKind::ReadOnly);
    // The image itself is no target.
    let onto_itself = rescued.disk().convert().to(&path, &NewDisk::qcow2().overwrite()).unwrap_err();
    assert_eq!(onto_itself.kind(), ErrorKind::InUse, "{onto_itself:#}");
    rescued.disk().convert().to(folder.path("new.qcow2"), &NewDisk::qcow2()).unwrap();
    assert!(content(&Disk::open(folder.path("new.qcow2")).unwrap()) == bytes);
    assert!(fs::read(&path).unwrap() == before, "nothing was written");
    let stop = AtomicBool::new(true);
    assert_eq!(Disk::rescue().stop_on(&stop).open(&path).unwrap_err().kind(), ErrorKind::Stopped);
    assert_eq!(Disk::rescue().cluster_size(1000).open(&path).unwrap_err().kind(), ErrorKind::InvalidOption);
}

#[test]
fn a_password_a_backing_file_and_a_data_file_are_given() {
    let folder = Folder::new();
    let path = folder.path("secret.qcow2");
    let new = NewDisk::qcow2().size(4 * MIB).password("open sesame").unlock_time(Duration::from_millis(5));
    let disk = new.create(&path).unwrap();
    let bytes = fill(&disk);
    disk.close().unwrap();
    damage(&path, l1_of(&path), 512);
    let opened = Disk::rescue().options(&Disk::options().password("open sesame")).open(&path).unwrap();
    assert!(content(opened.disk()) == bytes);
    let wrong = Disk::rescue().options(&Disk::options().password("open")).open(&path);
    assert_eq!(wrong.unwrap_err().kind(), ErrorKind::Password);
    assert!(Disk::rescue().open(&path).unwrap().report().lost.bytes >= 2 * MIB);

    let base = NewDisk::raw().size(4 * MIB).create(folder.path("base.raw")).unwrap();
    let bytes = fill(&base);
    base.close().unwrap();
    let path = folder.path("top.qcow2");
    let top = NewDisk::qcow2().backing_file("base.raw", ImageFormat::Raw).create(&path).unwrap();
    top.write_at(0, b"top").unwrap();
    top.close().unwrap();
    // No name in it is followed, whatever the options allow.
    let trusting = Disk::options().names(Policy::Allow);
    let without = Disk::rescue().options(&trusting).open(&path).unwrap();
    assert_eq!(without.report().lost.bytes, 4 * MIB - CLUSTER as u64);
    let base = Disk::options().format(ImageFormat::Raw).open(folder.path("base.raw")).unwrap();
    let with = Disk::rescue().backing(&base).open(&path).unwrap();
    assert!(content(with.disk())[3..] == bytes[3..] && with.report().is_complete());

    let path = folder.path("split.qcow2");
    let disk = NewDisk::qcow2().size(4 * MIB).data_file("data.raw").create(&path).unwrap();
    let bytes = fill(&disk);
    disk.close().unwrap();
    damage(&path, l1_of(&path), 512);
    let rescued = Disk::rescue().data_file(folder.path("data.raw")).open(&path).unwrap();
    assert!(content(rescued.disk()) == bytes);
    assert!(rescued.report().is_complete(), "offsets in the data file tell the place: {}", rescued.report());
}

/// Offsets in the data file tell which part of the disk each table maps, in whatever order they were made.
#[test]
fn tables_of_an_image_with_a_data_file_have_a_place() {
    let folder = Folder::new();
    let path = folder.path("split.qcow2");
    let disk = NewDisk::qcow2().size(8 << 30).data_file("data.raw").create(&path).unwrap();
    let places = [5 << 30, 1 << 30, (3 << 30) + 12 * MIB, 0, 7 << 30];
    for (at, number) in places.into_iter().zip(1..) {
        disk.write_at(at, &pattern(100_000, number)).unwrap();
    }
    disk.close().unwrap();
    damage(&path, l1_of(&path), 512);
    let rescued = Disk::rescue().data_file(folder.path("data.raw")).open(&path).unwrap();
    for (at, number) in places.into_iter().zip(1..) {
        let mut bytes = vec![0; 100_000];
        rescued.disk().read_at(at, &mut bytes).unwrap();
        assert!(bytes == pattern(100_000, number), "at {at}");
    }
    let report = rescued.report();
    let guessed = report.placed.listed.iter().filter(|range| range.what.0.is_guess()).count();
    assert_eq!((report.placed.listed.len(), guessed), (5, 0), "{report}");
}
