//! Image locks against qemu-io.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use qcow2_core::ImageFormat;
use qcow2_io::{Create, Locking, OpenErrorKind, OpenFile, SourceOptions, open_source};
use qcow2_testkit::locks::{Holder, locked_bytes};
use qcow2_testkit::oracle::Qemu;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Serializes the tests: a child process that another test is just starting holds a copy of every descriptor,
/// and its locks, until exec.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An empty qcow2 image; `None`, after printing why, if qemu-io is missing.
fn image() -> Option<(tempfile::TempDir, PathBuf)> {
    Qemu::find()?;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status();
    assert!(made.unwrap().success());
    Some((dir, path))
}

/// Opens the image with qemu-io and `options`; the error is its output.
fn qemu_io(path: &Path, options: &[&str]) -> Result<(), String> {
    let output =
        Command::new("qemu-io").args(["-c", "read -q 0 512"]).args(options).arg(path).output().unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8(output.stderr).unwrap()) }
}

/// A qemu-io with `options` that keeps the image open.
fn hold(path: &Path, options: &[&str]) -> Holder {
    let folder = path.parent().unwrap();
    Holder::new(Path::new("qemu-io"), folder, options.iter().map(OsStr::new).chain([path.as_os_str()]))
        .unwrap()
}

/// The permission that keeps us from opening the image, and whether its holder has it or does not share it.
fn refused(options: &OpenFile, path: &Path) -> (&'static str, bool) {
    let error = options.open(path).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), OpenErrorKind::Locked);
    let conflict = error.lock_conflict().unwrap();
    (conflict.permission().name(), conflict.is_shared())
}

/// What qemu-io says after "can't open device NAME: ".
fn expected(path: &Path, lock: &str) -> String {
    format!("Failed to get {lock} lock\nIs another process using the image [{}]?", path.display())
}

#[test]
fn qemu_io_respects_our_locks() {
    let _alone = alone();
    let Some((_dir, path)) = image() else { return };
    let writer = OpenFile::writable().open(&path).unwrap();
    let device = path.display();
    let theirs = |lock| Err(format!("qemu-io: can't open device {device}: {}\n", expected(&path, lock)));
    assert_eq!(qemu_io(&path, &[]), theirs("\"write\""));
    assert_eq!(qemu_io(&path, &["-r"]), theirs("shared \"write\""));
    assert_eq!(qemu_io(&path, &["-r", "-U"]), Ok(()));
    drop(writer);
    assert_eq!(qemu_io(&path, &[]), Ok(()));

    let reader = OpenFile::read_only().open(&path).unwrap();
    assert_eq!(qemu_io(&path, &[]), theirs("\"write\""));
    assert_eq!(qemu_io(&path, &["-r"]), Ok(()));
    drop(reader);

    let forced = OpenFile::read_only().with_locking(Locking::Shared).open(&path).unwrap();
    assert_eq!(qemu_io(&path, &[]), Ok(()));
    drop(forced);
    let unlocked = OpenFile::writable().with_locking(Locking::Off).open(&path).unwrap();
    assert_eq!(qemu_io(&path, &[]), Ok(()));
    drop(unlocked);
}

#[test]
fn we_respect_the_locks_of_qemu_io() {
    let _alone = alone();
    let Some((_dir, path)) = image() else { return };
    let holder = hold(&path, &[]);
    assert_eq!(refused(&OpenFile::writable(), &path), ("write", false));
    assert_eq!(refused(&OpenFile::read_only(), &path), ("write", true));
    OpenFile::read_only().with_locking(Locking::Shared).open(&path).unwrap();
    OpenFile::writable().with_locking(Locking::Off).open(&path).unwrap();
    drop(holder);
    OpenFile::writable().open(&path).unwrap();

    let holder = hold(&path, &["-r"]);
    assert_eq!(refused(&OpenFile::writable(), &path), ("write", false));
    OpenFile::read_only().open(&path).unwrap();
    drop(holder);

    let holder = hold(&path, &["-r", "-U"]);
    OpenFile::writable().open(&path).unwrap();
    drop(holder);
}

#[test]
fn a_locked_file_is_not_truncated() {
    let _alone = alone();
    let Some((_dir, path)) = image() else { return };
    let holder = hold(&path, &[]);
    let len = std::fs::metadata(&path).unwrap().len();
    assert!(len > 0);
    refused(&OpenFile::writable().with_create(Create::Truncate), &path);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), len);
    drop(holder);
}

#[test]
fn our_lock_bytes_equal_those_of_qemu() {
    let _alone = alone();
    let Some((_dir, path)) = image() else { return };
    let writable = OpenFile::writable;
    let read_only = OpenFile::read_only;
    let shared = || read_only().with_locking(Locking::Shared);
    // Our options, qemu-io's options, and whether qemu-io opens the image as raw.
    let cases: [(OpenFile, &[&str], bool); 6] = [
        (writable(), &[], false),
        (read_only(), &["-r"], false),
        (shared(), &["-r", "-U"], false),
        (writable(), &["-f", "raw"], true),
        (read_only(), &["-f", "raw", "-r"], true),
        (shared(), &["-f", "raw", "-r", "-U"], true),
    ];
    for (file, theirs, raw) in cases {
        let holder = hold(&path, theirs);
        let expected = holder.locked_bytes(&path).unwrap();
        drop(holder);
        assert!(!expected.is_empty());
        let mut options = SourceOptions::new(file);
        if raw {
            options = options.with_format(ImageFormat::Raw);
        }
        let ours = open_source(&path, &options).unwrap();
        assert_eq!(locked_bytes(std::process::id(), &path).unwrap(), expected, "{theirs:?}");
        drop(ours);
        assert!(locked_bytes(std::process::id(), &path).unwrap().is_empty());
    }
}
