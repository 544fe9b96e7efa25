//! Commits, rebases and external snapshots through the facade.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Folder, assert_clean, content, pattern};
use qcow2_image::{Disk, DiskOptions, ErrorKind, ImageFormat};

const MIB: u64 = 1 << 20;

fn trusted() -> DiskOptions {
    Disk::options().follow_backing_files()
}

/// base.qcow2 <- middle.qcow2 <- top.qcow2, each with data of its own; returns the guest content of the top.
fn chain(folder: &Folder) -> Vec<u8> {
    let base = Disk::create(folder.path("base.qcow2"), MIB).unwrap();
    base.write_at(0, &pattern(300_000, 1)).unwrap();
    base.close().unwrap();
    for (old, new, seed) in [("base", "middle", 5), ("middle", "top", 9)] {
        let path = folder.path(&format!("{new}.qcow2"));
        trusted().snapshot_externally(folder.path(&format!("{old}.qcow2")), &path).unwrap();
        let disk = trusted().writable().open(&path).unwrap();
        disk.write_at(u64::from(seed) * 50_000, &pattern(100_000, seed)).unwrap();
        disk.close().unwrap();
    }
    shown(folder, "top.qcow2")
}

fn shown(folder: &Folder, name: &str) -> Vec<u8> {
    content(&trusted().open(folder.path(name)).unwrap())
}

#[test]
fn commit_moves_the_data_down_and_empties_the_overlay() {
    let folder = Folder::new();
    let expected = chain(&folder);
    assert!(trusted().commit(folder.path("top.qcow2")).unwrap().data_bytes > 0);
    for name in ["middle.qcow2", "top.qcow2"] {
        assert!(shown(&folder, name) == expected, "{name}");
        assert_clean(&folder.path(name));
    }
    assert!(Disk::options().without_backing_file().open(folder.path("top.qcow2")).is_ok());
    assert_eq!(trusted().commit(folder.path("top.qcow2")).unwrap().data_bytes, 0);
    folder.ask_qemu("driver=qcow2,file.filename=middle.qcow2", None, &expected);
}

#[test]
fn commit_into_a_deeper_layer_keeps_the_overlay() {
    let folder = Folder::new();
    let expected = chain(&folder);
    trusted().commit_into(folder.path("top.qcow2"), folder.path("base.qcow2")).unwrap();
    assert!(shown(&folder, "base.qcow2") == expected);
    assert!(shown(&folder, "top.qcow2") == expected);
    let missing = trusted().commit_into(folder.path("top.qcow2"), folder.path("none.qcow2"));
    assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
    let none = trusted().commit(folder.path("base.qcow2"));
    assert_eq!(none.unwrap_err().kind(), ErrorKind::Unsupported);
    let denied = Disk::options().commit(folder.path("top.qcow2"));
    assert_eq!(denied.unwrap_err().kind(), ErrorKind::NameDenied);
    let gone = trusted().commit(folder.path("gone.qcow2"));
    assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn rebase_keeps_the_guest_content() {
    let folder = Folder::new();
    let expected = chain(&folder);
    let path = folder.path("top.qcow2");
    let report = trusted().rebase(&path, Some(("base.qcow2", ImageFormat::Qcow2))).unwrap();
    assert!(report.data_bytes > 0);
    assert!(shown(&folder, "top.qcow2") == expected);
    let recorded = Disk::options().without_backing_file().open(&path).unwrap();
    let header = recorded.as_image().unwrap().header();
    assert_eq!(header.backing_file_name().as_deref(), Some("base.qcow2"));
    drop(recorded);
    let long = "./".repeat(600) + "base.qcow2";
    let refused = trusted().rebase(&path, Some((&long, ImageFormat::Qcow2)));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidOption);
    let gone = trusted().rebase(&path, Some(("gone.qcow2", ImageFormat::Qcow2)));
    assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
    trusted().rebase(&path, None).unwrap();
    assert!(content(&Disk::open(&path).unwrap()) == expected);
    assert_clean(&path);
    folder.ask_qemu("driver=qcow2,file.filename=top.qcow2", None, &expected);
}

#[test]
fn external_snapshot_refuses_existing_files_and_images_in_use() {
    let folder = Folder::new();
    chain(&folder);
    let (base, new) = (folder.path("base.qcow2"), folder.path("new.qcow2"));
    let before = std::fs::read(&base).unwrap();
    let exists = trusted().snapshot_externally(&base, folder.path("top.qcow2"));
    assert_eq!(exists.unwrap_err().kind(), ErrorKind::Exists);
    trusted().snapshot_externally(&base, &new).unwrap();
    assert!(std::fs::read(&base).unwrap() == before);
    std::fs::remove_file(&new).unwrap();
    #[cfg(target_os = "linux")]
    {
        let writer = Disk::options().writable().open(&base).unwrap();
        let in_use = trusted().snapshot_externally(&base, &new);
        assert_eq!(in_use.unwrap_err().kind(), ErrorKind::InUse);
        writer.close().unwrap();
    }
    std::fs::write(folder.path("old.raw"), [1; 700]).unwrap();
    trusted().format(ImageFormat::Raw).snapshot_externally(folder.path("old.raw"), &new).unwrap();
    assert_eq!(trusted().open(&new).unwrap().size(), 1024);
}
