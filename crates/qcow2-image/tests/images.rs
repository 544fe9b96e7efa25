//! Creates images of every kind, reads them back, and checks them with QEMU.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Folder, assert_clean, content, pattern};
use qcow2_image::{Disk, DiskOptions, ErrorKind, ImageFormat, NewDisk, Policy};
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Short, because tests need no strong passwords.
const QUICK: Duration = Duration::from_millis(5);

/// The first example of the README, as a function.
fn first_bytes(options: &DiskOptions, path: &Path) -> qcow2_image::Result<[u8; 16]> {
    let disk = options.open(path)?;
    let mut bytes = [0; 16];
    disk.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// Fills a disk of 4 MiB with data, a hole, and data that begins and ends inside clusters.
fn fill(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; 4 * MIB as usize];
    bytes[..300_000].copy_from_slice(&pattern(300_000, 1));
    bytes[2_000_001..2_100_002].copy_from_slice(&pattern(100_001, 9));
    disk.write_at(0, &bytes[..300_000]).unwrap();
    disk.write_at(2_000_001, &bytes[2_000_001..2_100_002]).unwrap();
    bytes
}

#[test]
fn plain_image_round_trips() {
    let folder = Folder::new();
    let path = folder.path("disk.qcow2");
    let disk = Disk::create(&path, 4 * MIB).unwrap();
    let bytes = fill(&disk);
    assert!(content(&disk) == bytes);
    disk.close().unwrap();
    assert_clean(&path);
    assert_eq!(first_bytes(&Disk::options(), &path).unwrap(), bytes[..16]);
    folder.ask_qemu("driver=qcow2,file.filename=disk.qcow2", None, &bytes);
}

#[test]
fn compressed_images_round_trip() {
    for (name, new) in [("deflate.qcow2", NewDisk::qcow2()), ("zstd.qcow2", NewDisk::qcow2().zstd())] {
        let folder = Folder::new();
        let disk = Disk::create(folder.path("disk.qcow2"), 4 * MIB).unwrap();
        let bytes = fill(&disk);
        let path = folder.path(name);
        let report = disk.convert().compress().to(&path, &new).unwrap();
        assert!(report.compressed_clusters > 3, "{name}: {report:?}");
        assert_eq!(first_bytes(&Disk::options(), &path).unwrap(), bytes[..16]);
        let compressed = Disk::options().writable().open(&path).unwrap();
        assert!(content(&compressed) == bytes, "{name}");
        assert_eq!(compressed.checksum().unwrap(), disk.checksum().unwrap());
        compressed.write_at(70_000, b"over a compressed cluster").unwrap();
        compressed.close().unwrap();
        let mut bytes = bytes;
        bytes[70_000..70_025].copy_from_slice(b"over a compressed cluster");
        assert_clean(&path);
        folder.ask_qemu(&format!("driver=qcow2,file.filename={name}"), None, &bytes);
    }
}

#[test]
fn encrypted_image_needs_its_password() {
    let folder = Folder::new();
    let path = folder.path("secret.qcow2");
    let new = NewDisk::qcow2().size(4 * MIB).password("open sesame").unlock_time(QUICK);
    let disk = new.create(&path).unwrap();
    let bytes = fill(&disk);
    assert!(content(&disk) == bytes);
    disk.close().unwrap();
    let file = std::fs::read(&path).unwrap();
    assert!(
        !file.windows(64).any(|window| window == &bytes[1000..1064]),
        "guest data is in the file unencrypted"
    );

    let by_bytes = Disk::options().password("open sesame");
    assert_eq!(first_bytes(&by_bytes, &path).unwrap(), bytes[..16]);
    let name = path.display().to_string();
    let asked = Disk::options().password_from(move |asked| (asked == name).then(|| b"open sesame".to_vec()));
    assert!(content(&asked.open(&path).unwrap()) == bytes);
    for (options, says) in [
        (Disk::options(), "no key is given"),
        (Disk::options().password("open sesame!"), "invalid password"),
        (Disk::options().password_from(|_| None), "there is no password for"),
    ] {
        let error = options.open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Password, "{error:#}");
        assert!(format!("{error:#}").contains(says), "{error:#}");
        assert!(!format!("{error:?} {options:?}").contains("sesame"), "the password is shown");
    }
    assert_clean(&path);
    let opts = "driver=qcow2,encrypt.key-secret=key,file.filename=secret.qcow2";
    folder.ask_qemu(opts, Some("open sesame"), &bytes);
}

#[test]
fn overlay_opens_only_allowed_files() {
    let folder = Folder::new();
    let disk = NewDisk::raw().size(4 * MIB).create(folder.path("base.raw")).unwrap();
    let mut bytes = fill(&disk);
    disk.close().unwrap();
    let middle = NewDisk::qcow2().backing_file("base.raw", ImageFormat::Raw);
    middle.create(folder.path("middle.qcow2")).unwrap().close().unwrap();
    let path = folder.path("top.qcow2");
    let new = NewDisk::qcow2().backing_file("middle.qcow2", ImageFormat::Qcow2);

    // The caller named the middle layer; only the middle layer names the base.
    assert_eq!(new.create(&path).unwrap_err().kind(), ErrorKind::NameDenied);
    assert!(!path.exists(), "a new image that cannot be opened is deleted");
    let top = new.follow_backing_files().create(&path).unwrap();
    assert_eq!(top.size(), 4 * MIB);
    assert!(content(&top) == bytes);
    top.write_at(5, b"overlay").unwrap();
    bytes[5..12].copy_from_slice(b"overlay");
    top.close().unwrap();

    let denied = Disk::open(&path).unwrap_err();
    assert_eq!(denied.kind(), ErrorKind::NameDenied, "{denied:#}");
    assert!(format!("{denied:#}").contains("middle.qcow2"), "{denied:#}");
    assert_eq!(first_bytes(&Disk::options().follow_backing_files(), &path).unwrap(), bytes[..16]);
    assert!(content(&Disk::options().names(Policy::SameDirectory).open(&path).unwrap()) == bytes);
    Disk::options().without_backing_file().open(&path).unwrap().snapshots().unwrap();
    let info = qcow2_image::info(&path).unwrap();
    assert_eq!(info.qcow2.unwrap().backing.unwrap().name, "middle.qcow2");
    folder.ask_qemu("driver=qcow2,file.filename=top.qcow2", None, &bytes);

    std::fs::remove_file(folder.path("base.raw")).unwrap();
    let broken = Disk::options().follow_backing_files().open(&path).unwrap_err();
    assert_eq!(broken.kind(), ErrorKind::BrokenChain, "{broken:#}");
}

#[test]
fn encrypted_overlay_on_an_encrypted_image() {
    let folder = Folder::new();
    let encrypted = |password: &str| NewDisk::qcow2().password(password).unlock_time(QUICK);
    let base = encrypted("below").size(4 * MIB).create(folder.path("base.qcow2")).unwrap();
    let bytes = fill(&base);
    base.close().unwrap();
    let new = encrypted("above").backing_file("base.qcow2", ImageFormat::Qcow2);
    assert_eq!(new.create(folder.path("top.qcow2")).unwrap_err().kind(), ErrorKind::Password);
    let top =
        new.backing_password_from(|_| Some(b"below".to_vec())).create(folder.path("top.qcow2")).unwrap();
    assert!(content(&top) == bytes);
    top.close().unwrap();
    let ask =
        |name: &str| Some(if name.ends_with("top.qcow2") { b"above".to_vec() } else { b"below".to_vec() });
    let options = Disk::options().follow_backing_files().password_from(ask);
    assert!(content(&options.open(folder.path("top.qcow2")).unwrap()) == bytes);
}

#[test]
fn image_with_an_external_data_file() {
    let folder = Folder::new();
    let path = folder.path("disk.qcow2");
    let new = NewDisk::qcow2().size(4 * MIB).data_file("disk.data").with(|new| new.data_file_raw = true);
    let disk = new.create(&path).unwrap();
    let bytes = fill(&disk);
    disk.close().unwrap();
    assert!(std::fs::read(folder.path("disk.data")).unwrap() == bytes);
    assert_eq!(Disk::open(&path).unwrap_err().kind(), ErrorKind::NameDenied);
    assert!(content(&Disk::options().follow_backing_files().open(&path).unwrap()) == bytes);
    folder.ask_qemu("driver=qcow2,file.filename=disk.qcow2", None, &bytes);
}

#[test]
fn other_formats_are_opened_on_request_only() {
    let folder = Folder::new();
    let path = folder.path("disk.raw");
    let disk = NewDisk::raw().size(4 * MIB).create(&path).unwrap();
    let bytes = fill(&disk);
    disk.close().unwrap();
    assert_eq!(Disk::open(&path).unwrap_err().kind(), ErrorKind::NotAnImage);
    for options in [Disk::options().format(ImageFormat::Raw), Disk::options().probe_format()] {
        let disk = options.open(&path).unwrap();
        assert_eq!(disk.format(), &ImageFormat::Raw);
        assert!(content(&disk) == bytes);
        assert_eq!(disk.snapshots().unwrap_err().kind(), ErrorKind::Unsupported);
    }
}

/// The second example of the README, on an encrypted overlay of a compressed image.
#[test]
fn readme_example() {
    let folder = Folder::new();
    let disk = Disk::create(folder.path("disk.qcow2"), 4 * MIB).unwrap();
    let mut bytes = fill(&disk);
    disk.convert().compress().to(folder.path("base.qcow2"), &NewDisk::qcow2()).unwrap();
    let overlay = folder.path("overlay.qcow2");
    let new = NewDisk::qcow2().backing_file("base.qcow2", ImageFormat::Qcow2).password("secret");
    new.unlock_time(QUICK).create(&overlay).unwrap().close().unwrap();

    let options = Disk::options().writable().follow_backing_files().password("secret");
    let disk = options.open(&overlay).unwrap();
    disk.create_snapshot("before").unwrap();
    disk.write_at(1 << 20, b"changed").unwrap();
    disk.convert().compress().to(folder.path("whole.qcow2"), &NewDisk::qcow2().zstd()).unwrap();
    disk.close().unwrap();

    let before = options.open_snapshot(&overlay, "before").unwrap();
    assert!(content(&before) == bytes);
    drop(before);
    bytes[1 << 20..(1 << 20) + 7].copy_from_slice(b"changed");
    assert!(content(&options.open(&overlay).unwrap()) == bytes);
    assert!(content(&Disk::open(folder.path("whole.qcow2")).unwrap()) == bytes);
    assert_clean(&overlay);
    folder.ask_qemu("driver=qcow2,file.filename=whole.qcow2", None, &bytes);
    let opts = "driver=qcow2,encrypt.key-secret=key,file.filename=overlay.qcow2";
    folder.ask_qemu(opts, Some("secret"), &bytes);
}
