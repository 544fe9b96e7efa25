//! Runs the conformance suite on every storage of this crate.
#![allow(clippy::unwrap_used)]

use qcow2_core::Storage;
use qcow2_io::{CacheMode, Create, LimitStorage, MemoryStorage, OpenFile, TraceStorage, conformance};
use qcow2_testkit::oracle::skip;
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

/// Runs the suite on files in `dir`, opened in `mode`.
fn check_files(name: &str, dir: &Path, mode: CacheMode) {
    let count = Cell::new(0);
    conformance::check(name, &|| {
        count.set(count.get() + 1);
        let path = dir.join(format!("disk-{}", count.get()));
        OpenFile::writable().with_create(Create::New).with_cache(mode).open(&path).unwrap()
    });
}

#[test]
fn memory_storage() {
    conformance::check("memory", &|| Arc::new(MemoryStorage::new()));
}

#[test]
fn files_in_every_cache_mode() {
    for mode in [CacheMode::Writeback, CacheMode::None, CacheMode::Unsafe] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        check_files(&format!("file, {mode:?}"), dir.path(), mode);
    }
}

#[test]
fn files_that_flush_each_write() {
    // fsync on a disk is slow and this suite makes many; a memory file system keeps their number and not
    // their cost.
    let place = Path::new("/dev/shm");
    let dir = if place.is_dir() { tempfile::tempdir_in(place) } else { tempfile::tempdir() }.unwrap();
    check_files("file, Writethrough", dir.path(), CacheMode::Writethrough);
}

#[test]
fn files_on_tmpfs() {
    let place = Path::new("/dev/shm");
    if !place.is_dir() {
        skip("no /dev/shm");
        return;
    }
    let dir = tempfile::tempdir_in(place).unwrap();
    check_files("file on tmpfs", dir.path(), CacheMode::Writeback);
}

#[test]
fn wrapping_storages() {
    conformance::check("trace", &|| Arc::new(TraceStorage::with_log(Arc::new(MemoryStorage::new()), 10)));
    conformance::check("limit", &|| {
        Arc::new(LimitStorage::new(Arc::new(MemoryStorage::new()), 1 << 30)) as Arc<dyn Storage>
    });
}
