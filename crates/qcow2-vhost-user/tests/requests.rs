//! What a small virtio driver sees of the device.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod driver;

use driver::{Driver, HEADER, NEXT, STATUS, WRITE, with_device};
use qcow2_image::Disk;

#[test]
fn a_driver_reads_what_it_wrote_and_so_does_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.qcow2");
    with_device(&image, |socket, disk| {
        let mut driver = Driver::connect(socket);
        assert_eq!(driver.config(0, 8), 8192_u64.to_le_bytes());
        assert_eq!(driver.request(1, 100, &[7; 4096], 0), (0, vec![]));
        assert_eq!(driver.request(0, 100, &[], 4096), (0, vec![7; 4096]));
        assert_eq!(driver.request(4, 0, &[], 0), (0, vec![]));
        assert_eq!(driver.request(0, 8192, &[], 512).0, 1);
        // A larger disk is announced by the space that describes it.
        disk.resize(8 << 20).unwrap();
        assert_eq!(driver.config(0, 8), 16_384_u64.to_le_bytes());
        assert_eq!(driver.request(1, 16_000, &[8; 512], 0), (0, vec![]));
        drop(driver);
        let mut next = Driver::connect(socket);
        assert_eq!(next.request(0, 100, &[], 4096), (0, vec![7; 4096]));
        assert_eq!(next.request(0, 16_000, &[], 512), (0, vec![8; 512]));
    });
    let disk = Disk::open(&image).unwrap();
    let mut bytes = [0; 4096];
    disk.read_at(51_200, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 4096]);
}

#[test]
fn broken_chains_hurt_nobody() {
    let folder = tempfile::tempdir().unwrap();
    with_device(&folder.path().join("disk.qcow2"), |socket, _| {
        let mut driver = Driver::connect(socket);
        // A chain that leads back to itself, one outside memory, one without a place for the status.
        driver.describe(0, HEADER, 16, NEXT, 0);
        assert_eq!(driver.submit(), 0);
        driver.describe(0, u64::MAX - 4, 16, NEXT, 1);
        driver.describe(1, STATUS, 1, WRITE, 0);
        assert_eq!(driver.submit(), 0);
        driver.describe(0, HEADER, 16, 0, 0);
        assert_eq!(driver.submit(), 0);
        assert_eq!(driver.request(1, 0, &[9; 512], 0), (0, vec![]));
        assert_eq!(driver.request(0, 0, &[], 512), (0, vec![9; 512]));
    });
}
