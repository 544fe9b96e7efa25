//! Random requests on scattered memory, each compared with an array of bytes: disks whose bytes go straight
//! between file and guest, and those that need a buffer.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod driver;

use driver::{Driver, with_disk};
use qcow2_core::{LiveDisk, ZeroMode};
use qcow2_image::{Disk, ImageFormat, NewDisk};
use qcow2_testkit::rng::Rng;
use std::path::Path;
use std::sync::Arc;

const SIZE: u64 = 1 << 20;
const SECTORS: u64 = SIZE / 512;
const STEPS: u64 = 300;

/// Cuts `sectors` into at most five ranges of any length.
fn cuts(rng: &mut Rng, sectors: u64) -> Vec<u32> {
    let mut left = sectors as u32 * 512;
    let mut parts = Vec::new();
    while left > 0 && parts.len() < 4 {
        let part = rng.between(1, u64::from(left)) as u32;
        parts.push(part);
        left -= part;
    }
    parts.extend(Some(left).filter(|&left| left > 0));
    parts
}

fn random_requests(driver: &mut Driver, content: &mut [u8], seed: u64) {
    let mut rng = Rng::new(seed);
    for step in 0..STEPS {
        let sector = rng.below(SECTORS);
        let sectors = rng.between(1, (SECTORS - sector).min(100));
        let range = (sector * 512) as usize..((sector + sectors) * 512) as usize;
        let parts = cuts(&mut rng, sectors);
        match rng.below(8) {
            0..4 => {
                let (status, bytes) = driver.scattered_read(sector, &parts);
                assert_eq!(status, 0, "read {step} of {sector}, {parts:?}");
                assert!(bytes == content[range], "read {step} of {sector}, {parts:?}");
            }
            4..7 => {
                let bytes: Vec<u8> = range.clone().map(|_| rng.next_u64() as u8).collect();
                assert_eq!(driver.scattered_write(sector, &bytes, &parts), 0, "write {step} to {sector}");
                content[range].copy_from_slice(&bytes);
            }
            _ => {
                // One discarding or zeroing request with one range.
                let mut segment = sector.to_le_bytes().to_vec();
                segment.extend((sectors as u32).to_le_bytes());
                segment.extend(1_u32.to_le_bytes());
                assert_eq!(driver.request(13, 0, &segment, 0).0, 0);
                content[range].fill(0);
            }
        }
    }
}

fn check(seed: u64, make: impl FnOnce(&Path, &mut [u8]) -> Disk) {
    let folder = tempfile::tempdir().unwrap();
    let mut content = vec![0; SIZE as usize];
    let disk = make(folder.path(), &mut content);
    let path = disk.path().to_owned();
    let format = disk.format().clone();
    let guest = Arc::clone(disk.as_guest_disk());
    let live = Arc::new(LiveDisk::new(guest));
    with_disk(live, &folder.path().join("socket"), |socket| {
        random_requests(&mut Driver::connect(socket), &mut content, seed);
    });
    let mut bytes = vec![0; SIZE as usize];
    disk.read_at(0, &mut bytes).unwrap();
    assert!(bytes == content, "{}: another content", path.display());
    disk.close().unwrap();
    if format == ImageFormat::Qcow2 {
        assert_eq!(qcow2_image::check(&path).unwrap().findings, []);
    }
}

/// A base with data, zeroes and holes, and what it reads as.
fn base(path: &Path, content: &mut [u8]) {
    let disk = NewDisk::qcow2().size(SIZE).cluster_size(16 << 10).create(path).unwrap();
    for at in [0, 100_000, 300_000, 700_000] {
        let bytes: Vec<u8> = (0..50_000_u32).map(|n| (n / 3) as u8).collect();
        disk.write_at(at, &bytes).unwrap();
        content[at as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    disk.close().unwrap();
}

#[test]
fn a_qcow2_image() {
    check(1, |folder, _| NewDisk::qcow2().size(SIZE).cluster_size(4096).create(folder.join("disk")).unwrap());
}

#[test]
fn a_raw_disk() {
    check(2, |folder, _| NewDisk::raw().size(SIZE).create(folder.join("disk")).unwrap());
}

#[test]
fn an_overlay_with_subclusters() {
    check(3, |folder, content| {
        base(&folder.join("base"), content);
        let overlay = NewDisk::qcow2().backing_file("base", ImageFormat::Qcow2).follow_backing_files();
        overlay.with(|options| options.extended_l2 = true).create(folder.join("disk")).unwrap()
    });
}

#[test]
fn compressed_clusters() {
    check(4, |folder, content| {
        base(&folder.join("base"), content);
        let base = Disk::options().format(ImageFormat::Qcow2).open(folder.join("base")).unwrap();
        let new = NewDisk::qcow2().cluster_size(16 << 10);
        base.convert().compress().to(folder.join("disk"), &new).unwrap();
        base.close().unwrap();
        Disk::options().writable().open(folder.join("disk")).unwrap()
    });
}

#[test]
fn an_encrypted_image() {
    check(5, |folder, _| {
        let new = NewDisk::qcow2().size(SIZE).password("secret");
        new.unlock_time(std::time::Duration::from_millis(10)).create(folder.join("disk")).unwrap()
    });
}

#[test]
fn an_external_data_file() {
    check(6, |folder, _| NewDisk::qcow2().size(SIZE).data_file("data").create(folder.join("disk")).unwrap());
}

/// The copy that a snapshot keeps is not what the guest writes to.
#[test]
fn a_snapshot_keeps_its_clusters() {
    check(7, |folder, content| {
        base(&folder.join("disk"), content);
        let disk = Disk::options().writable().open(folder.join("disk")).unwrap();
        disk.create_snapshot("before").unwrap();
        let guest = disk.as_guest_disk();
        guest
            .write_zeroes(
                qcow2_core::GuestRange::new(qcow2_core::GuestOffset::new(0), 4096).unwrap(),
                ZeroMode::MayUnmap,
            )
            .unwrap();
        content[..4096].fill(0);
        disk
    });
}
