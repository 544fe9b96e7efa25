//! `OpenFiles`: a file that is open for writing cannot be opened a second time, under any name.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use qcow2_core::Reference;
use qcow2_io::{
    Create, Locking, OpenError, OpenErrorKind, OpenFile, OpenFiles, Policy, SourceOptions, open_source,
};
use std::fs;
use std::path::Path;

fn refused<T>(opened: Result<T, OpenError>) -> String {
    let error = opened.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), OpenErrorKind::SameFile);
    error.reason()
}

/// A folder with a file, a hard link and a symbolic link to it, and options that take no locks.
fn world(together: &OpenFiles) -> (tempfile::TempDir, OpenFile, OpenFile) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("disk"), b"precious").unwrap();
    fs::hard_link(dir.path().join("disk"), dir.path().join("hard")).unwrap();
    std::os::unix::fs::symlink("disk", dir.path().join("soft")).unwrap();
    let unlocked = |file: OpenFile| file.with_locking(Locking::Off).among(together);
    (dir, unlocked(OpenFile::read_only()), unlocked(OpenFile::writable().with_create(Create::Truncate)))
}

#[test]
fn a_file_open_for_reading_is_not_truncated_under_any_name() {
    let together = OpenFiles::new();
    let (dir, read, write) = world(&together);
    let at = |name: &str| dir.path().join(name);
    let sources = [read.open(&at("disk")).unwrap(), read.open(&at("soft")).unwrap()];
    for name in ["disk", "hard", "soft"] {
        let reason = refused(write.open(&at(name)));
        assert!(reason.ends_with("is being read and cannot be written to"), "{reason}");
        assert_eq!(reason.contains("is the same file as"), name != "disk");
        assert_eq!(fs::read(at("disk")).unwrap(), b"precious");
    }
    let [first, second] = sources;
    drop(first);
    refused(write.open(&at("hard")));
    drop(second);
    let writer = write.open(&at("hard")).unwrap();
    for again in [&read, &write] {
        let reason = refused(again.open(&at("disk")));
        assert!(reason.ends_with("is being written to and cannot be opened again"), "{reason}");
    }
    // A separate set does not conflict with this one.
    let others = OpenFiles::new();
    drop(read.clone().among(&others).open(&at("disk")).unwrap());
    drop(writer);
    read.open(&at("disk")).unwrap();
}

#[test]
fn a_path_can_be_registered_without_opening_it() {
    let together = OpenFiles::new();
    let (dir, read, write) = world(&together);
    let at = |name: &str| dir.path().join(name);
    let held = together.hold_path(&at("soft"), "the base").unwrap();
    assert!(held.is_some());
    read.open(&at("disk")).unwrap();
    let reason = refused(write.open(&at("hard")));
    assert!(reason.ends_with("is the same file as the base, which is being read and cannot be written to"));
    drop(held);
    assert!(together.hold_path(Path::new("no/such/file"), "").unwrap().is_none());
    assert!(together.hold_path(Path::new("/dev/null"), "").unwrap().is_none());
    let _writer = write.open(&at("hard")).unwrap();
    together.hold_path(&at("soft"), "the base").unwrap_err();
}

/// The files an image names join the set too, and so does a source whose format is probed.
#[test]
fn files_named_by_images_are_checked_too() {
    let together = OpenFiles::new();
    let (dir, read, write) = world(&together);
    let at = |name: &str| dir.path().join(name);
    fs::write(at("top"), b"top").unwrap();
    let top = open_source(&at("top"), &SourceOptions::new(read).with_policy(Policy::Allow)).unwrap();
    refused(write.open(&at("top")));
    for reference in [Reference::Backing { name: "disk", format: None }, Reference::DataFile { name: "disk" }]
    {
        let below = top.resolver.resolve(reference, false).unwrap();
        refused(write.open(&at("hard")));
        drop(below);
    }
    let _writer = write.with_create(Create::Never).open(&at("hard")).unwrap();
    top.resolver.resolve(Reference::Backing { name: "disk", format: Some("raw") }, false).unwrap_err();
}
