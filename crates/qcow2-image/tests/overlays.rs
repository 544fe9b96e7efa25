//! Overlays on a disk that is open, in files.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Folder, assert_clean, content, pattern};
use qcow2_image::{Disk, ErrorKind, ImageFormat, NewDisk, Policy};
use qcow2_testkit::oracle::Tool;

const SIZE: u64 = 3 << 20;

/// An image with a raw backing file, written to, and what it reads as.
fn base(folder: &Folder) -> Vec<u8> {
    let bottom = NewDisk::raw().size(SIZE).create(folder.path("bottom.raw")).unwrap();
    bottom.write_at(0, &pattern(SIZE as usize, 3)).unwrap();
    bottom.close().unwrap();
    let new = NewDisk::qcow2().backing_file("bottom.raw", ImageFormat::Raw);
    let base = new.create(folder.path("base.qcow2")).unwrap();
    base.write_at(100_000, &[5; 70_000]).unwrap();
    let expected = content(&base);
    base.close().unwrap();
    expected
}

fn on_base() -> NewDisk {
    NewDisk::qcow2().backing_file("base.qcow2", ImageFormat::Qcow2)
}

#[test]
fn overlays_in_files_are_whole_and_do_not_touch_each_other() {
    let folder = Folder::new();
    let below = base(&folder);
    let chain = Disk::options().names(Policy::Allow).open(folder.path("base.qcow2")).unwrap();
    let news = [
        on_base(),
        on_base().cluster_size(512),
        on_base().cluster_size(2 << 20).size(SIZE * 2),
        on_base().zstd().with(|options| options.extended_l2 = true),
    ];
    let disks: Vec<_> = (0..news.len() * 2)
        .map(|id| news[id / 2].create_on(folder.path(&format!("{id}.qcow2")), &chain).unwrap())
        .collect();
    // The overlays keep the chain open.
    drop(chain);
    for (id, disk) in disks.iter().enumerate() {
        disk.write_at(id as u64 * 30_000, &[id as u8; 40_000]).unwrap();
    }
    for (id, disk) in disks.into_iter().enumerate() {
        let mut expected = below.clone();
        expected.resize(disk.size() as usize, 0);
        expected[id * 30_000..id * 30_000 + 40_000].fill(id as u8);
        assert!(content(&disk) == expected, "overlay {id}");
        disk.close().unwrap();
        let name = format!("{id}.qcow2");
        assert_clean(&folder.path(&name));
        let opened = Disk::options().follow_backing_files().open(folder.path(&name)).unwrap();
        assert!(content(&opened) == expected, "overlay {id}, opened by its names");
        folder.ask_qemu(&format!("driver=qcow2,file.filename={name}"), None, &expected);
    }
    let chain = Disk::options().follow_backing_files().open(folder.path("base.qcow2")).unwrap();
    assert!(content(&chain) == below, "the base has changed");
}

/// What `qemu-img info` prints is the same for an overlay of its own, of one made on an open chain, and one
/// of `create`, but for the file's name.
#[test]
fn qemu_describes_an_overlay_as_one_of_its_own() {
    let Some(qemu) = Tool::find("qemu-img") else { return };
    let folder = Folder::new();
    base(&folder);
    let chain = Disk::options().follow_backing_files().open(folder.path("base.qcow2")).unwrap();
    on_base().create_on(folder.path("a.qcow2"), &chain).unwrap().close().unwrap();
    on_base().follow_backing_files().create(folder.path("b.qcow2")).unwrap().close().unwrap();
    let dir = folder.path("");
    let create = ["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "c.qcow2"];
    qemu.run_in(&dir, &create).success();
    let bytes = ["a", "b"].map(|name| std::fs::read(folder.path(&format!("{name}.qcow2"))).unwrap());
    assert!(bytes[0] == bytes[1], "create_on and create write the same file");
    let described = ["a.qcow2", "b.qcow2", "c.qcow2"].map(|name| {
        qemu.run_in(&dir, &["check", "-q", name]).success();
        let text = qemu.run_in(&dir, &["info", name]).success().stdout.replace(name, "NAME");
        let lines =
            text.lines().filter(|line| !line.starts_with("disk size") && !line.contains("file length"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    });
    assert_eq!(described[0], described[2]);
    assert_eq!(described[1], described[2]);
}

#[test]
fn an_overlay_that_another_program_would_open_otherwise_is_refused() {
    let folder = Folder::new();
    base(&folder);
    std::fs::copy(folder.path("base.qcow2"), folder.path("copy.qcow2")).unwrap();
    let chain = Disk::options().follow_backing_files().open(folder.path("base.qcow2")).unwrap();
    let refused = |new: NewDisk, below: &Disk, why: &str| {
        let error = new.create_on(folder.path("new.qcow2"), below).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidOption, "{error:#}");
        assert!(format!("{error:#}").contains(why), "{error:#}");
        assert!(!folder.path("new.qcow2").exists(), "{why}");
    };
    let copy = NewDisk::qcow2().backing_file("copy.qcow2", ImageFormat::Qcow2);
    refused(copy, &chain, "not that of the disk below");
    let missing = NewDisk::qcow2().backing_file("missing.qcow2", ImageFormat::Qcow2);
    refused(missing, &chain, "not that of the disk below");
    refused(NewDisk::qcow2(), &chain, "the name of the backing file is not given");
    refused(on_base().data_file("data"), &chain, "without an external data file");
    refused(NewDisk::raw(), &chain, "without an external data file");
    drop(chain);
    let writable = Disk::options().writable().follow_backing_files().open(folder.path("base.qcow2")).unwrap();
    refused(on_base(), &writable, "opened for writing");
    writable.create_snapshot("old").unwrap();
    writable.close().unwrap();
    let options = Disk::options().follow_backing_files();
    let snapshot = options.open_snapshot(folder.path("base.qcow2"), "old").unwrap();
    refused(on_base(), &snapshot, "is a snapshot");
}

/// The new file is locked, and one that is in use, or below, is not overwritten.
#[test]
fn files_in_use_are_not_overwritten() {
    let folder = Folder::new();
    let below = base(&folder);
    let chain = Disk::options().follow_backing_files().open(folder.path("base.qcow2")).unwrap();
    let overlay = on_base().create_on(folder.path("a.qcow2"), &chain).unwrap();
    let error = |path: &str, new: NewDisk| new.create_on(folder.path(path), &chain).unwrap_err().kind();
    assert_eq!(error("a.qcow2", on_base()), ErrorKind::Exists);
    assert_eq!(error("base.qcow2", on_base().overwrite()), ErrorKind::InUse);
    assert_eq!(Disk::open(folder.path("a.qcow2")).map(drop).unwrap_err().kind(), ErrorKind::InUse);
    overlay.close().unwrap();
    assert!(content(&chain) == below);
    on_base().overwrite().create_on(folder.path("a.qcow2"), &chain).unwrap().close().unwrap();
    assert_clean(&folder.path("a.qcow2"));
}
